"""The verbs in any order on a model with quantized layers, against dense float64 matrices.

They are read off the plain layers, and after `requantize=True` off new layers of the library's own.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import refusal
from helpers.packages import imported
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lora_inject as li

N_EXAMPLES = int(os.environ.get("LORA_MACHINE_EXAMPLES", "12"))
N, RANK, ROWS = 64, 2, 3
Mix = dict[str, float]


def plain(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(N, N)


def four_bit(layer: nn.Linear, **options: Any) -> nn.Module:
    made = imported("bitsandbytes").nn.Linear4bit(N, N, compute_dtype=torch.float32, **options)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # type: ignore[no-any-return]


def int8(layer: nn.Linear) -> nn.Module:
    quantization, net = imported("torchao.quantization"), nn.Sequential(layer)
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net[0]


FORMS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "nf4": lambda layer: four_bit(layer, quant_type="nf4"),
    "fp4": lambda layer: four_bit(layer, quant_type="fp4", compress_statistics=False),
    "torchao": int8,
}
AGAIN = {"plain", "nf4", "fp4"}  # what can be quantized again


def matrix(layer: nn.Module) -> Tensor:
    """W of a layer, `(out, in)`, in float64."""
    bias: Any = layer.bias  # without a gradient, bitsandbytes multiplies in bfloat16
    products = copy.deepcopy(layer)(torch.eye(N, requires_grad=True)) - bias
    return products.detach().t().double()  # type: ignore[no-any-return]


def quantized(form: str, W: Tensor, bias: Tensor) -> Tensor:
    layer = plain(0)
    layer.load_state_dict({"weight": W.float(), "bias": bias})
    return matrix(FORMS[form](layer))


class Net(nn.Module):
    def __init__(self, forms: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FORMS[form](plain(i)) for i, form in enumerate(forms))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


has_adapters = precondition(lambda self: self.adapters)
is_unmerged = precondition(lambda self: self.merged is None)
is_merged = precondition(lambda self: self.merged is not None)


class Machine(RuleBasedStateMachine):
    @initialize(forms=st.lists(st.sampled_from(sorted(FORMS)), min_size=2, max_size=3))
    def start(self, forms: list[str]) -> None:
        self.forms, self.model = forms, Net(forms).eval()
        self.W = [matrix(layer) for layer in self.model.layers]
        self.bias = [layer.bias.detach().clone() for layer in self.model.layers]
        self.adapters: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self.active: Mix = {}
        self.merged: Mix | None = None
        self.before: tuple[list[str], list[Tensor]] = (forms, self.W)
        self.x = torch.randn(ROWS, N, requires_grad=True)

    def refused(self, run: Callable[[], Any], *, must: bool) -> bool:
        raised = refusal(run, li.LoraInjectError)
        assert (raised is not None) == must, raised
        return must

    def delta(self, i: int, mix: Mix) -> Tensor:
        pairs = [(w, *self.adapters[n][i]) for n, w in mix.items() if i in self.adapters[n]]
        return sum((w * B @ A for w, A, B in pairs), torch.zeros(N, N, dtype=torch.float64))

    def run(self, mix: Mix, x: Tensor) -> Tensor:
        x = x.double()
        for i, (W, bias) in enumerate(zip(self.W, self.bias, strict=True)):
            x = torch.tanh(x @ (W + self.delta(i, mix)).t() + bias.double())
        return x

    def close(self, y: Tensor, mix: Mix, x: Tensor | None = None) -> None:
        due = self.run(mix, self.x if x is None else x)
        error = (y.detach().double() - due.detach()).abs().max()
        assert error < 1e-4, f"off by {error:.1e}"

    def some_mix(self, data: Any) -> Mix:
        weights = st.sampled_from([1.0, 0.5, -1.0])
        return data.draw(st.dictionaries(st.sampled_from(sorted(self.adapters)), weights), "mix")

    @rule(data=st.data(), name=st.sampled_from(["a", "b"]), seed=st.integers(0, 3))
    def inject(self, data: Any, name: str, seed: int) -> None:
        places = data.draw(st.sets(st.integers(0, len(self.forms) - 1), min_size=1), "places")
        config = {"rank": RANK, "alpha": 3, "targets": [rf"layers\.{i}" for i in places]}
        must = name in self.adapters or self.merged is not None
        if self.refused(lambda: li.inject(self.model, config, name), must=must):
            return
        generator = torch.Generator().manual_seed(seed)
        for parameter in li.adapter_parameters(self.model, name).values():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.adapters[name] = {
            int(site.rpartition(".")[2]): (s.A.double().clone(), s.scale * s.B.double())
            for site, s in li.adapter_state(self.model, name).sites.items()
        }
        self.active = {name: 1.0}

    @has_adapters
    @rule(data=st.data())
    def activate(self, data: Any) -> None:
        mix = self.some_mix(data)
        if not self.refused(lambda: li.activate(self.model, mix), must=self.merged is not None):
            self.active = mix

    @has_adapters
    @rule(
        data=st.data(),
        how=st.sampled_from([{}, {"dequantize": "float32"}, {"requantize": True}]),
        eject=st.booleans(),
    )
    def merge(self, data: Any, how: dict[str, Any], eject: bool) -> None:
        mix = self.some_mix(data) if data.draw(st.booleans(), "named") else dict(self.active)
        changed = {i for name in mix for i in self.adapters[name]}
        packed = {self.forms[i] for i in changed} - {"plain"}
        wrong = packed if not how else packed - AGAIN if "requantize" in how else set()
        name = mix if mix != self.active else None
        must = self.merged is not None or not mix or bool(wrong)
        if self.refused(lambda: li.merge(self.model, name=name, eject=eject, **how), must=must):
            return
        before, forms = (self.forms, self.W), list(self.forms)
        W = [W + self.delta(i, mix) for i, W in enumerate(self.W)]
        for i, form in enumerate(forms):
            if "dequantize" in how:
                forms[i] = "plain"
            elif i in changed and form != "plain":
                W[i] = quantized(form, W[i], self.bias[i])
        self.forms, self.W, self.merged = forms, W, self.active
        self.before, self.active = before, {}
        if eject:
            self.adapters, self.merged = {}, None

    @is_merged
    @rule()
    def unmerge(self) -> None:
        li.unmerge(self.model)
        (self.forms, self.W), self.active, self.merged = self.before, self.merged, None

    @has_adapters
    @rule(data=st.data())
    def eject(self, data: Any) -> None:
        name = data.draw(st.sampled_from([None, *sorted(self.adapters)]), "name")
        must = name is not None and self.merged is not None
        if self.refused(lambda: li.eject(self.model, name), must=must):
            return
        for gone in [name] if name is not None else list(self.adapters):
            del self.adapters[gone]
            self.active.pop(gone, None)
        self.active = self.active if self.adapters else {}
        self.merged = None

    @rule()
    def inference(self) -> None:
        """In which bitsandbytes rearranges its codes, unless adapters train."""
        if any(info.trainable for info in li.adapters(self.model).values()):
            with torch.no_grad():
                self.close(self.model(self.x), self.active)

    @rule()
    def copies(self) -> None:
        """Their own layers come back from a pickle as others."""
        self.model = copy.deepcopy(self.model)

    @is_unmerged
    @has_adapters
    @rule(data=st.data(), format=st.sampled_from(["native", "peft"]))
    def leave_and_return(self, data: Any, format: str) -> None:  # noqa: A002
        name = data.draw(st.sampled_from(sorted(self.adapters)), "name")
        with tempfile.TemporaryDirectory() as folder:
            path = li.save_adapter(self.model, Path(folder, "a.safetensors"), name, format=format)
            li.eject(self.model, name)
            # What a dequantized or a written base was made of, a fingerprint cannot tell.
            li.load_adapter(self.model, path, name, base="quantized")
        self.active.pop(name, None)
        self.active = self.active or {name: 1.0}

    @is_unmerged
    @has_adapters
    @rule(data=st.data())
    def contexts(self, data: Any) -> None:
        names = st.sampled_from([None, *sorted(self.adapters)])
        rows = data.draw(st.lists(names, min_size=ROWS, max_size=ROWS), "rows")
        with li.routed(self.model, rows):
            y = self.model(self.x)
        for i, name in enumerate(rows):
            self.close(y[[i]], {} if name is None else {name: 1.0}, self.x[[i]])
        with li.disabled(self.model):
            self.close(self.model(self.x), {})

    @is_unmerged
    @has_adapters
    @rule()
    def gradients(self) -> None:
        trains = [name for name, info in li.adapters(self.model).items() if info.trainable]
        places = [(n, i) for n in trains if n in self.active for i in self.adapters[n]]
        if not places:
            return
        tensors = [t.requires_grad_() for name, i in places for t in self.adapters[name][i]]
        due = torch.autograd.grad(self.run(self.active, self.x).sum(), tensors)
        for tensor in tensors:
            tensor.requires_grad_(False)
        held = [
            li.adapter_parameters(self.model, name)[f"layers.{i}.lora_{role}"]
            for name, i in places
            for role in "AB"
        ]
        grads = torch.autograd.grad(self.model(self.x).sum(), held)
        scales = [1.0, 3 / RANK] * len(places)
        for grad, wanted, scale in zip(grads, due, scales, strict=True):
            error = (grad.double() / scale - wanted).abs().max()
            assert error < 1e-3 * max(1.0, float(wanted.abs().max())), error

    @invariant()
    def computes_the_dense_model(self) -> None:
        self.close(self.model(self.x), self.active)
        assert sorted(li.adapters(self.model)) == sorted(self.adapters)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.merged is not None:
            self.unmerge()
            self.computes_the_dense_model()
        li.eject(self.model)
        self.adapters, self.active = {}, {}
        self.computes_the_dense_model()


@pytest.mark.filterwarnings("ignore")
class TestMachine(Machine.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(
        max_examples=N_EXAMPLES,
        stateful_step_count=20,
        deadline=None,
        derandomize="LORA_MACHINE_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )

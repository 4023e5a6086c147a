"""What every model of the zoo is held to.

Zero start bit for bit; freezing; every site's B has an effect on an output; adapted equals a dense
reference that is formed here, also for whoever reads a weight; what is saved gives the same outputs
on a fresh copy, bit for bit; merged equals unmerged, which restores the bits; eject is exact in
values, keys, classes, objects, attributes and flags.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import same_bits
from torch import Tensor, nn

import lora_inject as li
from zoo.build import build
from zoo.exceptions import EXEMPTIONS, Exemption
from zoo.inputs import dummy_inputs
from zoo.targets import ALPHA, either, targets_of

# The largest difference over the largest value of an output, in float32. The zoo's largest are
# 5e-5, while the adapters move the outputs by 3e-2 at least.
TOLERANCE, MOVES = 1e-4, 1e-2

Calls = Sequence[Mapping[str, Any]]


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return site to (A, B), the Parameters themselves."""
    parameters = li.adapter_parameters(model)
    names = [name.removesuffix(".lora_A") for name in parameters if name.endswith(".lora_A")]
    return {n: (parameters[f"{n}.lora_A"], parameters[f"{n}.lora_B"]) for n in names}


def saved(model: nn.Module, folder: Path) -> Path:
    try:
        return li.save_adapter(model, folder / "adapter")
    except li.FormatError as error:  # `zoo.exchange` asserts for which models PEFT is refused
        if 'format="native"' not in error.remedy:
            raise
        return li.save_adapter(model, folder / "adapter.safetensors", format="native")


class Held:
    """A model type that was held to the steps."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.failures: list[str] = []  # what did not hold, step by step
        self.dead: list[str] = []  # sites whose B has no effect
        self.exemption = EXEMPTIONS.get(model_type, Exemption("none"))
        self.model = build(model_type)
        self.calls = dummy_inputs(self.model, model_type)
        self.start()
        self.inject()
        self.effects()
        self.dense()
        self.trained()
        loaded = self.save_and_load()
        if self.exemption.untying:
            self.refuse_to_merge(loaded)
        else:
            self.merge(loaded)
        self.eject()

    def check(self, step: str, ok: bool, found: object = "") -> None:
        if not ok:
            self.failures.append(f"{step}: {found}")

    def near(self, step: str, model: nn.Module) -> None:
        off = distance(self.run(model), self.adapted)
        self.check(step, off <= TOLERANCE, f"{off:.1e}")

    def run(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return run(model, self.calls)

    def start(self) -> None:
        """The plain model is one that can be compared with at all."""
        self.unfrozen = self.run(self.model)
        self.check("model: two forwards are the same", same(self.unfrozen, self.run(self.model)))
        finite = all(torch.isfinite(x).any() for x in self.unfrozen if x.numel())
        self.check("model: finite outputs", finite)
        fresh = build(self.model_type)
        self.check("model: two builds are the same", same(self.unfrozen, self.run(fresh)))
        # Torch multiplies in another order where a weight requires a gradient (`should_fold` of
        # at::matmul), also under no_grad: to be compared with is the frozen model.
        self.plain = self.run(fresh.requires_grad_(False))
        self.before, self.values = snapshot(self.model), values_of(self.model)

    def inject(self) -> None:
        targets = targets_of(self.model)
        self.model = li.inject(self.model, targets.config())
        of_sites = factors(self.model)
        n, wanted = len(of_sites), len(targets.modules) + len(targets.experts)
        self.check("sites: one for each target", n == wanted > 0, (n, wanted))
        self.check("zero start", same(self.plain, self.run(self.model)))
        ours = {id(p) for pair in of_sites.values() for p in pair}
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        self.check("freezing: the adapter trains, all else does not", ours == trainable)

    def effects(self) -> None:
        of_sites = factors(self.model)
        randomise_factors(of_sites.values())
        self.adapted = self.run(self.model)
        moved = distance(self.plain, self.adapted)
        self.check("effect: the outputs move", moved >= MOVES, f"{moved:.1e}")
        loss_of(run(self.model, self.calls)).backward()
        # Where nothing is differentiable in B, a different B must show.
        silent = [n for n, (_, B) in of_sites.items() if B.grad is None or not bool(B.grad.any())]
        self.model.zero_grad(set_to_none=True)
        for name in silent:
            with changed(of_sites[name][1]):
                if same(self.adapted, self.run(self.model)):
                    self.dead.append(name)
        claimed = re.compile(self.exemption.dead or r"(?!)")
        unexpected = [name for name in self.dead if not claimed.fullmatch(name)]
        self.check("effect: every site has one", not unexpected, unexpected)

    @torch.no_grad()
    def dense(self) -> None:
        """Outputs, and what whoever reads a weight gets, are those of W + delta."""
        wide, state = build(self.model_type).requires_grad_(False), li.adapter_state(self.model)
        make_dense(wide, state)
        self.near("adapted equals dense", wide)
        for site in state.sites.values():
            key = site.spec.weight
            off = distance([attribute(wide, key)], [attribute(self.model, key)])
            self.check("dense: whoever reads", off < 1e-5, f"{key} {off:.1e}")

    @torch.no_grad()
    def trained(self) -> None:
        """With all parameters trained, outputs and who reads are as with those values in place."""
        model, wide = (build(self.model_type).requires_grad_(False) for _ in range(2))
        named = [(n, wide.get_submodule(n.rpartition(".")[0])) for n, _ in wide.named_parameters()]
        # What normalizes batches moves its buffers while it trains, which is refused.
        names = [name for name, owner in named if getattr(owner, "running_mean", None) is None]
        li.inject(model, {"targets": [], "train": [either(names)]})
        generator = torch.Generator().manual_seed(3)
        for copy in li.adapter_parameters(model).values():
            copy.mul_(1 + 0.1 * torch.randn(copy.shape, generator=generator))
        values = li.adapter_state(model).trained
        for name, value in values.items():
            wide.get_parameter(name).copy_(value)
        off = distance(self.run(wide), self.run(model))
        self.check("trained: same outputs", off <= TOLERANCE, f"{off:.1e}")
        self.check("trained: all of them", values.keys() >= set(names))
        differ = differences(values, {name: attribute(model, name) for name in values})
        self.check("trained: whoever reads", not differ, differ[:3])

    def save_and_load(self) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            path = saved(self.model, Path(folder))
            loaded = li.load_adapter(build(self.model_type), path).eval()
        self.near("load: same outputs", loaded)
        self.check("load: same bits", same(self.adapted, self.run(loaded)))
        return loaded

    def merge(self, loaded: nn.Module) -> None:
        li.merge(loaded)
        self.near("merged equals unmerged", loaded)
        li.unmerge(loaded)
        differ = differences(self.values, values_of(loaded))
        self.check("unmerge: same values", not differ, differ[:3])
        self.check("unmerge: same outputs", same(self.adapted, self.run(loaded)))

    def refuse_to_merge(self, loaded: nn.Module) -> None:
        before = values_of(loaded)
        try:
            li.merge(loaded)
        except li.LayerError as error:
            self.check("merge: the refusal names the head", "lm_head" in str(error), error)
        else:
            self.check("merge: refused", False)
        self.check("merge: nothing changed", not differences(before, values_of(loaded)))
        self.check("merge: same outputs", same(self.adapted, self.run(loaded)))

    def eject(self) -> None:
        model = li.eject(self.model)
        after = snapshot(model)
        for what, before in self.before.items():
            self.check(f"eject: same {what}", before == after[what])
        differ = differences(self.values, values_of(model))
        self.check("eject: same values", not differ, differ[:3])
        self.check("eject: same outputs", same(self.unfrozen, self.run(model)))


# ------------------------------------------------------------------------------------ what they use


def attribute(model: nn.Module, name: str) -> Tensor:
    """Return what whoever reads a parameter gets, in a method of any name."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key).clone()


def run(model: nn.Module, calls: Calls) -> list[Tensor]:
    """Return every tensor among the outputs, with the same random numbers each time."""
    torch.manual_seed(0)
    return [tensor for inputs in calls for tensor in tensors_in(model(**inputs))]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested outputs, caches included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dict__") and not isinstance(output, type):
        held = (Tensor, list, tuple, Mapping)
        yield from tensors_in([value for value in vars(output).values() if isinstance(value, held)])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two outputs are the same bits."""
    return len(a) == len(b) and all(map(same_bits, a, b))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference over the largest value of the same output, of all outputs.

    Infinite where the outputs have other shapes or are not finite in the same places.
    """
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    off = [0.0]
    for x, y in zip((x.double() for x in a), (y.double() for y in b), strict=True):
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            return float("inf")
        if finite.any():
            scale = x[finite].abs().max().clamp_min(1e-30)
            off.append(float((x[finite] - y[finite]).abs().max() / scale))
    return max(off)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return what eject must bring back, but for the values."""
    named = list(model.named_parameters(remove_duplicate=False))
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "modules": [(name, id(module)) for name, module in modules],
        "classes": [(name, type(module)) for name, module in modules],
        "attributes": [(name, sorted(vars(module))) for name, module in modules],
        "parameters": [(name, id(parameter)) for name, parameter in named],
        "requires_grad": [(name, parameter.requires_grad) for name, parameter in named],
        "keys": list(model.state_dict()),
    }


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers, those included that no state dict has."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose values are gone or are other bits."""
    return [k for k, v in before.items() if k not in after or not same([v], [after[k]])]


@torch.no_grad()
def randomise_factors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give A and B random values, with deltas of the order of the weights."""
    generator = torch.Generator().manual_seed(1)
    for A, B in pairs:
        A.copy_(torch.randn(A.shape, generator=generator) * A.shape[-1] ** -0.5)
        B.copy_(torch.randn(B.shape, generator=generator) * 0.2)


@contextlib.contextmanager
def changed(tensor: Tensor) -> Iterator[None]:
    """Run the body with a tensor that is very different."""
    with torch.no_grad():
        kept = tensor.clone()
        tensor.mul_(-30)
        yield
        tensor.copy_(kept)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Return one number that depends on every element of the outputs."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.is_floating_point() and x.requires_grad:
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            total = total + (torch.where(torch.isfinite(x), x, 0) * noise).double().sum()
    return total


def make_dense(model: nn.Module, state: li.AdapterState) -> None:
    """Give `model` the weights `W + scale * B @ A`, formed here and by nothing of the package.

    Each module gets a tensor of its own, so that a tied embedding stays what it is.
    """
    for site in state.sites.values():
        owner, _, key = site.spec.weight.rpartition(".")
        module = model.get_submodule(owner)
        weight = module._parameters[key]
        delta = ALPHA / site.spec.rank * (site.B.double() @ site.A.double())
        if site.spec.transposed:
            delta = delta.transpose(-1, -2)
        merged = (weight.double() + delta.reshape(weight.shape)).to(weight.dtype)
        module._parameters[key] = nn.Parameter(merged, requires_grad=False)

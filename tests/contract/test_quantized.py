"""Quantized bases: their layers carry adapters and are merged into on request only.

For packages that no set installs stand classes of the same structure.
"""

import copy
import functools
import re
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.packages import compressed, imported, loaded
from helpers.quantized import N, bitsandbytes, dequantized, plain_net, quantized
from helpers.reference import SCALE, config, saved
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes below stand for those of these modules."""
    modules = ("gptqmodel.nn_modules.qlinear", "hqq.core.quantize")
    modules += ("optimum.quanto.nn.qlinear", "compressed_tensors.quantization")
    loaded(monkeypatch, *modules)


def torchao(config_name: str, net: nn.Module) -> nn.Module:
    quantization = imported("torchao.quantization")
    quantization.quantize_(net, getattr(quantization, config_name)())
    return net


def coded(W: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes of a matrix between -levels and levels, and the step of each row."""
    steps = W.detach().abs().amax(1, keepdim=True) / levels
    return (W.detach() / steps).round(), steps


class BaseQuantLinear(nn.Module):
    """As gptqmodel builds it for GPTQ and AWQ: packed integers, scales and bias are buffers."""

    __module__ = "gptqmodel.nn_modules.qlinear"
    SUPPORTS_TRAINING = True  # which each kernel states

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        codes, steps = coded(plain.weight, 7)  # eight codes of 4 bits along the input
        codes = (codes.t().to(torch.int32) + 8).view(-1, 8, self.out_features)
        packed = (codes << torch.arange(0, 32, 4)[None, :, None]).sum(1)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", steps.flatten())
        self.register_buffer("bias", plain.bias.detach().clone())


class TorchLinear(BaseQuantLinear):
    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def forward(self, x: Tensor) -> Tensor:
        codes = self.qweight[:, None, :] >> torch.arange(0, 32, 4)[None, :, None] & 15
        return x @ ((codes.reshape(self.in_features, -1) - 8) * self.scales) + self.bias


class HQQLinear(nn.Module):
    """As hqq builds it: codes are a parameter, bias is not."""

    __module__ = "hqq.core.quantize"

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        codes, steps = coded(plain.weight, 127)
        self.W_q = nn.Parameter((codes + 128).to(torch.uint8), requires_grad=False)
        self.meta = {"scale": steps, "zero": 128}
        self.backend = SimpleNamespace(value="forward_pytorch_backprop")
        self.bias = plain.bias.detach().clone()

    def dequantize(self) -> Tensor:
        return (self.W_q.float() - self.meta["zero"]) * self.meta["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().t() + self.bias


class QModuleMixin(ABC):  # noqa: B024 - as optimum-quanto has it
    """Stands before nn.Linear, with a memory layout of its own."""


class QBytes(nn.Parameter):
    __module__ = "optimum.quanto.tensor.weights.qbytes"

    def dequantize(self) -> Tensor:
        return self.data * self.scale


class QLinear(QModuleMixin, nn.Linear):
    __module__ = "optimum.quanto.nn.qlinear"

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        codes, steps = coded(plain.weight, 127)
        self.bias, self.weight = plain.bias, QBytes(codes.to(torch.int8), requires_grad=False)
        self.weight.scale = steps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dequantize(), self.bias)


def replaced(make: Callable[[Any], nn.Module], net: Any) -> nn.Module:
    net[0], net[2] = make(net[0]), make(net[2])
    return net


FORMATS: dict[str, Callable[[Any], nn.Module]] = {
    "compressed-tensors": lambda net: replaced(compressed, net.requires_grad_(False)),
    "gptq": functools.partial(replaced, TorchLinear),
    "hqq": functools.partial(replaced, HQQLinear),
    "torchao int8": functools.partial(torchao, "Int8WeightOnlyConfig"),
    "torchao float8": functools.partial(torchao, "Float8WeightOnlyConfig"),
    "bitsandbytes 8-bit": lambda net: bitsandbytes("Linear8bitLt", net, has_fp16_weights=False),
    "bitsandbytes nf4": lambda net: bitsandbytes("Linear4bit", net, quant_type="nf4"),
}
PACKED = [form for form in FORMATS if form != "compressed-tensors"]  # which unpacks its weights
BITSANDBYTES = [form for form in FORMATS if form.startswith("bitsandbytes")]
DENSE = [form for form in FORMATS if form.startswith(("torchao", "bitsandbytes", "hqq"))]
every = pytest.mark.parametrize("form", FORMATS)
packed = pytest.mark.parametrize("form", PACKED)
pytestmark = [pytest.mark.recent, pytest.mark.filterwarnings("ignore")]  # the quantizers' own


def build(form: str) -> tuple[Any, Tensor]:
    return FORMATS[form](plain_net()), torch.randn(3, N)


def held(net: Any) -> list[Any]:
    """All that a net is made of, with the very parameters and buffers."""
    return [
        (type(m), sorted(m.__dict__), dict(m._parameters), dict(m._buffers), vars(m).get("forward"))
        for m in net.modules()
    ]


def delta(net: nn.Module, site: str = "0") -> Tensor:
    state = li.adapter_state(net).sites[site]
    return SCALE * state.B.double() @ state.A.double()


def measured(layer: Any) -> Tensor:
    """What the weight of a layer is, by what it makes of unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)).double() - layer.bias.double()).t()


@every
def test_the_start_and_the_end_are_the_quantized_model_and_a_file_needs_no_word(
    form: str, tmp_path: Path
) -> None:
    net, x = build(form)
    before, kept = net(x), held(net)
    own = {name: id(parameter) for name, parameter in net.named_parameters()}
    li.inject(net, config("0", "2"))
    assert same_bits(net(x), before)
    assert own.items() <= {name: id(p) for name, p in net.named_parameters()}.items()
    sites = li.adapters(net)["default"].sites.values()
    widths = [(s.in_features, s.out_features, s.update) for s in sites]
    assert widths == [(N, N, "forward"), (N, 32, "forward")], "not those of packed weights"
    fill(net)
    for layout in ("native", "peft"):
        path, _ = saved(net, tmp_path, layout)
        assert same_bits(li.load_adapter(build(form)[0], path)(x), net(x))
    li.eject(net)
    assert same_bits(net(x), before)
    assert held(net) == kept


@every
def test_the_update_is_the_dense_one_and_its_gradients_are(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    with li.disabled(net):
        bare = [net[0](x), net[2](x)]
    (through,) = torch.autograd.grad(net(x).sum(), [li.adapter_parameters(net)["0.lora_A"]])
    assert through.any()
    for layer, plain, site in zip((net[0], net[2]), bare, "02", strict=True):
        y, up = layer(x), torch.randn(3, layer.out_features)
        assert error(y, plain.double() + x.double() @ delta(net, site).t()) < 1e-5
        (y * up).sum().backward()
        state, G = li.adapter_state(net).sites[site], up.double().t() @ x.double()
        grads = [li.adapter_parameters(net)[f"{site}.lora_{role}"].grad for role in "AB"]
        assert error(grads[0], SCALE * state.B.double().t() @ G) < 1e-5
        assert error(grads[1], SCALE * G @ state.A.double().t()) < 1e-5


@pytest.mark.parametrize("when", ["before inject", "in training", "before train_only"])
@pytest.mark.parametrize("form", BITSANDBYTES)
def test_an_evaluation_changes_no_gradient_of_later_training(form: str, when: str) -> None:
    """On some CPUs bitsandbytes rearranges 4-bit codes for a kernel without a backward pass."""

    def gradients(when: str) -> list[Tensor]:
        net, x = build(form)
        net[0].bias = net[2].bias = None  # without it bitsandbytes does not even raise
        evaluate = torch.no_grad()(lambda: net.eval()(x) * net.train().training)
        if when == "before inject":
            evaluate()
        li.inject(net, config("0", "2"))
        if when == "before train_only":
            li.train_only(net, None)
            evaluate()
            li.train_only(net, "default")
        fill(net, std=0.1)
        if when == "in training":
            evaluate()
        net(torch.randn(3, N)).square().sum().backward()
        grads = [p.grad for p in li.adapter_parameters(net).values()]
        fresh, packs = build(form)[0][0].__dict__, "support_avx512bf16_for_cpu"
        assert li.eject(net)[0].__dict__.get(packs) == fresh.get(packs)
        return grads

    for grad, due in zip(gradients(when), gradients("never"), strict=True):
        assert (grad - due).norm() < 0.01 * due.norm()


def test_the_share_that_a_large_weight_keeps_is_right_to_five_figures() -> None:
    """One sum in float32 over these 4 million values is off by 1e-4; sums of blocks by 2e-6."""
    plain = nn.Sequential(nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 32))
    net: Any = bitsandbytes("Linear4bit", plain)
    fill(li.inject(net, config("0")), std=0.1)
    with li.disabled(net):
        W = measured(net[0])
    D = delta(net)
    row = li.merge(net, requantize=True).tensors["0.weight"]
    change = measured(net[0]) - W
    assert row.kept == pytest.approx(float((change * D).sum() / D.square().sum()), rel=1e-5)
    assert row.relative == pytest.approx(float(D.norm() / W.norm()), rel=1e-5)


@pytest.mark.parametrize("form", DENSE)
def test_dora_is_that_over_the_dequantized_layer(form: str, tmp_path: Path) -> None:
    net, x = build(form)
    W, base, b = measured(net[0]), net[0](x), net[0].bias.detach().double()
    li.inject(net, config("0", variant="dora"))
    assert same_bits(net[0](x), base)
    own = {key[-1]: p for key, p in li.adapter_parameters(net).items()}
    for role, p in own.items():
        with torch.no_grad():
            p.mul_(0.5 + torch.rand_like(p)) if role == "m" else p.normal_(0, 0.2)
    A, B, m = (own[role].detach().double().requires_grad_() for role in "ABm")
    gain = (m / (W + SCALE * B @ A).norm(dim=1).detach())[:, None]
    y, up = net[0](x), torch.randn(3, N, dtype=torch.double)
    wanted = (base.detach().double() - b + SCALE * x.double() @ A.T @ B.T) * gain.T + b
    (y.double() * up).sum().backward()
    (wanted * up).sum().backward()
    assert error(y, wanted) < 1e-5
    for mine, theirs in zip((own[role] for role in "ABm"), (A, B, m), strict=True):
        assert error(mine.grad, theirs.grad) < 1e-5
    with li.routed(net, ["default", None, "default"]):
        rows = net[0](x)
    assert error(rows, torch.stack([y[0], base[1], y[2]])) < 1e-5
    again = li.load_adapter(build(form)[0], li.save_adapter(net, tmp_path / "peft"))
    assert same_bits(again[0](x), y)
    li.merge(net, dequantize="float32")
    assert error(net[0].weight, (W + SCALE * B @ A) * gain) < 1e-5


@every
def test_merging_is_refused_and_the_way_out_named(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    before, kept = net(x), held(net)
    ways: list[tuple[dict[str, Any], str]] = [
        ({}, 'dequantize="bfloat16"' if form in DENSE else "in 16 bits"),
        *(() if form in DENSE else [({"dequantize": "float32"}, "in 16 bits")]),
        *(() if form in BITSANDBYTES else [({"requantize": True}, "in 16 bits")]),
    ]
    for options, way_out in ways:
        with refused(li.LayerError, "'0.", way_out):
            li.merge(net, **options)
        assert same_bits(net(x), before)
        assert held(net) == kept
        li.activate(net, "default")  # it is not half merged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", DENSE)
def test_merged_into_plain_floats_on_request_and_restored(form: str, dtype: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0"))).train()
    with li.disabled(net):
        W = [measured(net[0]), measured(net[2])]
    before, kept = net(x), held(net)
    W[0] += delta(net)
    report = li.merge(net, dequantize=dtype)
    actions = {name: (row.action, row.dtype, row.shape) for name, row in report.tensors.items()}
    dequantized = ("dequantized", dtype, (32, N))
    assert actions == {"0.weight": ("folded", dtype, (N, N)), "2.weight": dequantized}
    for layer, values in zip((net[0], net[2]), W, strict=True):
        assert type(layer.weight) is nn.Parameter
        assert error(layer.weight, values) < (1e-6 if dtype == "float32" else 4e-3)
    assert (report.min_kept > 0.9) if dtype == "bfloat16" else not report.counted
    rounded = x.to(getattr(torch, dtype))
    merged = net(rounded)
    li.unmerge(net)
    assert held(net) == kept, "the very layers, with their very weights"
    assert same_bits(net(x), before)

    li.merge(net, dequantize=dtype, eject=True)
    assert [(type(m), sorted(vars(m))) for m in net] == [
        (type(m), sorted(vars(m))) for m in plain_net()
    ]
    assert list(net.state_dict()) == list(plain_net().state_dict())
    assert same_bits(net(rounded), merged)


@pytest.mark.parametrize("form", BITSANDBYTES)
def test_requantized_on_request_and_restored(form: str) -> None:
    net, _ = build(form)
    fill(li.inject(net, config("0")), std=0.1).train()
    with li.disabled(net):
        W = measured(net[0])
    kept, D = held(net), delta(net)
    row = li.merge(net, requantize=True).tensors["0.weight"]
    change = measured(net[0]) - W
    share = float((change * D).sum() / D.square().sum())
    assert row.kept == pytest.approx(share, abs=1e-3)
    assert row.error == pytest.approx(float((change - D).norm() / D.norm()), rel=1e-3)
    assert 0.5 < share < 1.2
    li.unmerge(net)
    with torch.no_grad():
        li.adapter_parameters(net)["0.lora_B"] *= 1e-4  # less than a step of the format
    with refused(li.LayerError, "min_kept"):
        li.merge(net, requantize=True, min_kept=0.5)
    assert held(net) == kept


@pytest.mark.parametrize("form", DENSE)
def test_weights_for_a_server_are_those_that_a_merge_would_leave(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0")))
    net.eval()(x)  # which has bitsandbytes rearrange its codes
    sent = dict(li.merged_weights(net, dequantize="bfloat16"))
    wanted = net(x.to(net[0].bias.dtype)).double()
    li.merge(net, dequantize="bfloat16", eject=True)
    assert all(same_bits(sent[f"{i}.weight"], net[i].weight) for i in (0, 2))
    plain = plain_net(torch.bfloat16)
    plain.load_state_dict(sent)
    assert error(plain(x.to(torch.bfloat16)), wanted) < 0.03


@packed
def test_another_base_is_refused_in_values_in_format_and_plain_until_it_is_named(
    form: str, tmp_path: Path
) -> None:
    """The way out of the refused merge: load it onto the floating point base, and merge there."""
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    path, _ = saved(net, tmp_path, "peft")
    other = "bitsandbytes nf4" if form != "bitsandbytes nf4" else "bitsandbytes 8-bit"
    bases = {
        "'0.": FORMATS[form](plain_net(seed=1)),
        "0.": FORMATS[other](plain_net()),
        'base="quantized"': plain_net(),
    }
    for name, base in bases.items():
        before, kept = base(x), held(base)
        with refused(li.FormatError, name):
            li.load_adapter(base, path)
        assert same_bits(base(x), before)
        assert held(base) == kept
    base, wide, x = plain_net(), plain_net().double(), torch.randn(3, N)
    for name in "02":
        wide.get_submodule(name).weight.data += delta(net, name)
    li.load_adapter(base, path, base="quantized")
    li.merge(base)
    assert error(base(x), wide(x.double())) < 1e-5


@packed
@pytest.mark.parametrize("wish", ["read as a whole", "trained in full", "a start from its values"])
def test_what_needs_the_values_of_a_quantized_weight_is_refused(form: str, wish: str) -> None:
    net, _ = build(form)
    kept, weight = held(net), li.plan(net, config("0")).sites[0].weight
    options = {
        "read as a whole": config(re.escape(weight)),
        "trained in full": {"rank": 2, "targets": ["2"], "train": ["0"]},
        "a start from its values": config("0", init="olora", variant="dora"),
    }[wish]
    with refused(li.LoraInjectError, "'0"):
        li.inject(net, options)
    assert held(net) == kept


def test_a_graph_of_a_packed_layer_is_whole() -> None:
    """What is known of a library is imported by inject, and not while a forward is traced."""
    net, x = build("torchao int8")
    fill(li.inject(net, config("0", variant="dora")))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert error(compiled(x), net(x).double()) < 1e-6


def test_hooks_follow_a_layer_that_becomes_a_plain_one() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    net, x = build("bitsandbytes nf4")
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    fill(li.inject(net, config("0"))).train()
    hooks.add_hook_to_module(net[2], hooks.ModelHook())
    before = net(x)
    li.merge(net, dequantize="float32")
    merged = net(x)
    assert error(merged, before) < 1e-5
    li.eject(net)
    for layer in (net[0], net[2]):
        hooks.remove_hook_from_module(layer)
    assert same_bits(net(x), merged)


@pytest.mark.parametrize("block", [None, (32, 16)])
def test_float8_layers_of_transformers_merge_into_plain_floats(block: Any) -> None:
    """Their kernels are for GPUs; the values are known."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    net = nn.Sequential(*[fp8.FP8Linear(N, N, block_size=block, has_bias=True) for _ in range(2)])
    wanted = []
    for layer in net:
        scales = torch.rand(()) if block is None else torch.rand(N // 32, N // 16)
        layer.weight.data = torch.randn(N, N).to(torch.float8_e4m3fn)
        layer.weight_scale_inv.data = scales
        layer.bias.data = torch.randn(N)
        each = scales if block is None else scales.kron(torch.ones(block))
        wanted.append(layer.weight.double() * each.double())
    net.requires_grad_(False)
    fill(li.inject(net, config("0")))
    kept = held(net)
    wanted[0] += delta(net)
    with refused(li.LayerError, '="bfloat16"'):
        li.merge(net)
    li.merge(net, dequantize="float32")
    li.unmerge(net)
    assert held(net) == kept
    li.merge(net, dequantize="float32", eject=True)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for layer, W in zip(net, wanted, strict=True):
        assert type(layer) is nn.Linear
        assert error(layer.weight, W) < 1e-6


def test_a_kernel_for_inference_lets_no_adapter_train_and_gives_no_norms() -> None:
    """As gptqmodel states it of Marlin and others, which hand no gradient to their input."""
    kernel = type("MarlinLinear", (TorchLinear,), {"SUPPORTS_TRAINING": False})
    net, trained = replaced(kernel, plain_net()), replaced(TorchLinear, plain_net())
    with refused(li.LayerError, "MarlinLinear", "auto_trainable"):
        li.inject(net, config("0"))
    with refused(li.LayerError, "'0"):
        li.inject(trained, config("0", variant="dora"))
    fill(li.inject(trained, config("0")))
    li.install(net, li.adapter_state(trained), base="any")  # to serve


def test_layers_of_quanto_take_no_adapter_and_stay_beside_some() -> None:
    """Python lets none of them change its class: an update is refused, and a merge into them."""
    net: Any = plain_net()
    net[0] = QLinear(net[0])
    values = net[0].weight.dequantize()
    for rule in (config("0"), config(r"0\.weight")):
        with refused(li.LayerError, "'0", "bitsandbytes or torchao", model=net):
            li.inject(net, rule)
        with refused(li.LayerError, "'0", "bitsandbytes or torchao", model=net):
            li.plan(net, rule)
    with refused(li.LayerError, "'0.bias'", "change its class", model=net):
        li.inject(net, config("2", train=[r"0\.bias"]))
    fill(li.inject(net, config("2")))
    with refused(li.LayerError, "'0.weight'", "merged_weights(model, dequantize=", model=net):
        li.merge(net, dequantize="float32")
    sent = dict(li.merged_weights(net, dequantize="float32"))
    assert same_bits(sent["0.weight"], values)


class TwoProducts(nn.Module):
    """Two weights of its own, packed by torchao, and a tensor that is not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "down"):
            setattr(self, name, torchao("Int8WeightOnlyConfig", plain_net())[0].weight)
        self.scale = nn.Parameter(torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.up) * self.scale, self.down)


def embedding() -> nn.Module:
    layer = imported("bitsandbytes").nn.Embedding4bit(10, N)
    layer.load_state_dict(nn.Embedding(10, N).state_dict())
    return layer.to("cpu")


# A module that is no quantizer's layer becomes no nn.Linear: each of its weights is replaced alone.
# A quantizer's class becomes the class of torch that it derives from.
OTHERS: dict[str, tuple[Callable[[], nn.Module], type, Tensor]] = {
    "weights of a module's own": (TwoProducts, TwoProducts, torch.randn(3, N)),
    "an embedding": (embedding, nn.Embedding, torch.arange(10)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_packed_beside_linear_layers_is_unpacked_under_its_own_names(other: str) -> None:
    make, cls, x = OTHERS[other]
    net = nn.Sequential(make(), nn.Linear(N, N))
    names = [*dict(net.named_parameters())]
    fill(li.inject(net, config("1")))
    adapted, kept = net(x), held(net)
    sent = dict(li.merged_weights(net, dequantize="float32"))
    assert list(sent) == names
    li.merge(net, dequantize="float32")
    assert type(net[0]) is cls
    assert {type(p) for p in net[0].parameters()} == {nn.Parameter}
    assert all(same_bits(sent[key], net.state_dict()[key]) for key in names)
    assert error(net(x), adapted.double()) < 1e-5
    li.unmerge(net)
    assert held(net) == kept
    li.merge(net, dequantize="float32", eject=True)
    assert list(net.state_dict()) == names


class Halves(torch.Tensor):
    """A tensor that says its values, of whatever library."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(torch.Tensor) / 2


@pytest.mark.parametrize("says", [True, False])
def test_codes_of_a_library_that_nobody_knows_are_merged_if_they_say_their_values(says) -> None:
    net, codes = plain_net(), torch.randint(-9, 9, (N, N), dtype=torch.int8)
    state = li.adapter_state(fill(li.inject(plain_net(), config("0"))))
    held_as = codes.as_subclass(Halves) if says else codes
    net[0].weight = nn.Parameter(held_as, requires_grad=False)
    with refused(li.LayerError, "'0.weight'", "trains = True"):
        li.inject(net, config("0"))
    li.install(net, state, base="any")
    if not says:
        with refused(li.LayerError, "'0"):
            li.merge(net, dequantize="float32")
        return
    wanted = codes.double() / 2 + delta(net)
    li.merge(net, dequantize="float32")
    assert error(net[0].weight, wanted) < 1e-6


# ------------------------------------------------- layers that hand no gradient to what lies before

DYNAMIC = ["Int8WeightConfig", "IntxWeightConfig"]


def quantize(net: Any, how: str, *names: str) -> Any:
    quantization = imported("torchao.quantization")
    made = getattr(quantization, f"Int8DynamicActivation{how}")()
    quantization.quantize_(net, made, filter_fn=lambda module, name: name in names)
    return net


class Residual(nn.Module):
    """Layers beside which a gradient finds another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).relu()
        x = x + self.between(x).relu()
        return x + self.last(x)


def by_torchao(how: str) -> Any:
    return quantize(Residual(), how, "between")


def by_mxfp4() -> Any:
    """Only attention would be adapted; its gradient would pass by the experts in silence."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    net, sizes = (
        Residual(),
        SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=32),
    )
    net.between = mxfp4.Mxfp4GptOssExperts(sizes)
    return net


def by_compressed_tensors() -> Any:
    net = Residual()
    net.between.quantization_scheme = SimpleNamespace(input_activations=object())
    return net


def by_transformers(module: str, cls: str, **options: Any) -> Any:
    """Its kernels, none of which has a backward, are for GPUs."""
    net = Residual()
    made = getattr(imported(f"transformers.integrations.{module}"), cls)
    net.between = made(32, 32, **options)
    return net


def by_a_forward_of_hqq() -> Any:
    """`HQQBackend.ATEN_FORWARD`: as fast as it can be, and for inference."""
    net = Residual()
    net.between = HQQLinear(net.between)
    net.between.backend = SimpleNamespace(value="forward_aten")
    return net


class Unknown(nn.Linear):
    """A packed layer of nobody's, which computes without autograd."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        codes = coded(self.weight, 127)[0].to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.detach(), self.weight.float() / 127, self.bias)


def by_nobody() -> Any:
    net = Residual()
    net.between = Unknown(32, 32)
    return net


def by_torch() -> Any:
    """They compute without autograd: a gradient would pass by them in silence."""
    return torch.ao.quantization.quantize_dynamic(Residual(), {"between"})


NO_GRADIENT: dict[str, Callable[[], Any]] = {
    **{f"torchao's {how}": functools.partial(by_torchao, how) for how in DYNAMIC},
    "experts in MXFP4": by_mxfp4,
    "activations of compressed-tensors": by_compressed_tensors,
    "torch's own": by_torch,
    "MetalLinear": functools.partial(
        by_transformers, "metal_quantization", "MetalLinear", group_size=32
    ),
    "FbgemmFp8Linear": functools.partial(
        by_transformers, "fbgemm_fp8", "FbgemmFp8Linear", bias=True
    ),
    "float8 of compressed-tensors": functools.partial(
        by_transformers, "compressed_tensors", "CompressedTensorsFP8Linear"
    ),
    "codes in a buffer": functools.partial(
        by_transformers, "bitnet", "BitLinear", bias=False, dtype=torch.float32
    ),
    "a forward of HQQ": by_a_forward_of_hqq,
    "a library that nobody knows": by_nobody,
}
ON_CPU = ("torchao", "activations of", "torch's", "a library")  # the others' kernels are for GPUs


def in_float8() -> Any:
    """FP8Linear of transformers, whose kernel is for GPUs."""
    fp8 = imported("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(N, N, block_size=(16, 16), has_bias=True)
    layer.weight.data, layer.weight_scale_inv.data = quantized(torch.randn(N, N), (16, 16))
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False), dequantized(layer.weight, layer.weight_scale_inv, (16, 16))


def in_nf4_of_torchao() -> Any:
    nf4 = imported("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(N, N).requires_grad_(False)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight, 32, 2), requires_grad=False)
    return layer, layer.weight.get_original_weight()


def in_a_format(form: str) -> Any:
    layer: Any = FORMATS.get(form, INTX)(plain_net())[0]
    return layer, measured(layer)


INTX = functools.partial(torchao, "IntxWeightOnlyConfig")
CLAIMS: dict[str, Callable[[], Any]] = {
    **{form: functools.partial(in_a_format, form) for form in FORMATS},
    "float8 of transformers": in_float8,
    "torchao nf4": in_nf4_of_torchao,
    "torchao intx": lambda: in_a_format("torchao intx"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_layer_above_adapters_that_train_hands_on_the_gradient_of_its_values(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, W = CLAIMS[what]()
    if what == "float8 of transformers":
        kernel = torch.no_grad()(lambda x, *_: x @ W.T + layer.bias)
        monkeypatch.setattr("transformers.integrations.finegrained_fp8.fp8_linear", kernel)
    net = nn.Sequential(nn.Linear(N, N), layer)
    x, up = torch.randn(3, N), torch.randn(3, N)
    fill(li.inject(net, config("0")))
    (net(x) * up).sum().backward()
    site, through = li.adapter_state(net).sites["0"], up.double() @ W.double()
    A, B = (li.adapter_parameters(net)[f"0.lora_{role}"] for role in "AB")
    assert error(B.grad, SCALE * through.T @ (x.double() @ site.A.double().T)) < 5e-3
    assert error(A.grad, SCALE * (through @ site.B.double()).T @ x.double()) < 5e-3


@pytest.mark.parametrize("how", NO_GRADIENT)
def test_over_a_layer_without_a_gradient_an_adapter_serves_and_does_not_train(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(monkeypatch, "compressed_tensors.quantization")
    net, plain, rule = NO_GRADIENT[how](), Residual(), {"rank": 2, "targets": ["first"]}
    with refused(li.LayerError, "'between"):
        li.inject(net, rule)
    assert type(net.first) is nn.Linear
    li.save_adapter(fill(li.inject(plain, rule)), tmp_path / "a")
    li.load_adapter(net, tmp_path / "a", base="any")
    with refused(li.LayerError, "'between"):
        li.train_only(net, "default")
    li.train_only(net, None)
    if how.startswith(ON_CPU):
        plain.between, x = net.between, torch.randn(3, 32)
        with torch.no_grad():
            assert same_bits(net(x), plain(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x)).tanh()


class Towers(nn.Module):
    """An image encoder whose layers torch has quantized, before a language model or after it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.text = order, Tower()
        self.vision = torch.ao.quantization.quantize_dynamic(Tower(), {"layers.0", "layers.2"})

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order.split():
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("order", ["vision text", "text vision"])
def test_a_tower_without_a_gradient_is_no_reason_until_one_is_lost(order: str) -> None:
    """Its input has none where it comes first. Where it comes last, a forward says it."""
    model, x, text = Towers(order), torch.randn(3, 32), {"rank": 2, "targets": [r"text\..*"]}
    held, base = snapshot(model), model(x)
    with refused(li.LayerError, "'vision.layers.0'", model=model):
        li.inject(model, {"rank": 2, "targets": ["all-linear"]})
    injected = fill(li.inject(model, text))
    model = copy.deepcopy(injected)
    li.parameter_groups(model, 1e-3)
    if order == "text vision":
        with refused(li.LayerError, "gradients", "no_grad"):
            model(x)
    else:
        model(x).sum().backward()
        wanted = copy.deepcopy(model.text)
        wanted.zero_grad()
        wanted(model.vision(x).detach()).sum().backward()
        for name, parameter in li.adapter_parameters(model).items():
            due = wanted.get_parameter(name.removeprefix("text.") + "__default")
            assert error(parameter.grad, due.grad.double()) < 1e-6
    with torch.no_grad():
        assert not same_bits(model(x), base)
    assert same_bits(li.eject(model)(x), base)
    assert snapshot(li.eject(injected)) == held


@pytest.mark.parametrize("how", DYNAMIC)
def test_a_layer_is_not_quantized_over_its_adapter_and_one_between_is_seen(how: str) -> None:
    """What would be quantized is W + delta, and the update would be added again."""
    net = fill(li.inject(Residual(), {"rank": 2, "targets": ["first", "last"]}))
    with refused(li.LayerError, "'weight'", "merge(model", model=net):
        quantize(net, how, "first")
    quantize(net, how, "between")
    with refused(li.LayerError, "'between.weight'"):
        li.parameter_groups(net, 1e-3)


@pytest.mark.parametrize("by", ["name", "class", "static"])
def test_a_layer_with_an_adapter_is_not_quantized_by_torch(by: str) -> None:
    quantization = torch.ao.quantization
    model = fill(li.inject(Residual(), {"rank": 2, "targets": ["first", "between", "last"]}))
    x = torch.randn(3, 32)
    before, wanted = snapshot(model), model(x)
    if by == "static":
        made = copy.deepcopy(model).eval()
        made.qconfig = quantization.get_default_qconfig("x86")
        made = quantization.convert(quantization.prepare(made))
    else:
        made = quantization.quantize_dynamic(model, {"first"} if by == "name" else {nn.Linear})
    assert same_bits(made(x), wanted)
    assert snapshot(model) == before


def test_a_layer_that_rounds_its_weight_in_place_is_read_by_others_with_its_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers of compressed-tensors do so: whoever else read the weight got plain W in silence."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(32, 32), True

        def forward(self, x: Tensor) -> Tensor:
            read = nn.functional.linear(x, self.fc.weight)
            return read + self.fc(x) if self.calls else read

    loaded(monkeypatch, "compressed_tensors.quantization")
    net, x = Both(), torch.randn(2, 32)
    compressed(net.fc)
    W, bias = net.fc.weight.detach().clone(), net.fc.bias.detach().clone()
    li.inject(net, config("fc"), probe=lambda: net(x))
    A, B = li.adapter_parameters(fill(net)).values()
    change = SCALE * B @ A
    torch.testing.assert_close(net(x), x @ (W.round(decimals=1) + W + 2 * change).T + bias)
    net(x).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in li.adapter_parameters(net).values())
    assert torch.equal(net.fc.get_parameter("weight"), W)
    net.calls = False
    torch.testing.assert_close(net(x), x @ (W + change).T)
    assert li.unreached(net, lambda: net(x)) == []
    path = li.save_adapter(net, tmp_path / "a.safetensors", format="native")
    torch.testing.assert_close(li.load_adapter(li.eject(net), path)(x), x @ (W + change).T)

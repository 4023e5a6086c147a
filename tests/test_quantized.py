"""Quantized bases: their layers carry adapters and are merged into on request only.

The quantized layer is called untouched, so that an adapter whose B is zero changes no bit
of its output, and the update is the dense `scale * B @ A` beside it. What the packed weight stands
for is the quantizer's business: merging is refused, and a load asks to be told.

Both packages are optional: what is absent, or does not run on this machine, is skipped with the
reason. int4 weights of torchao need its kernel package `mslk`, which has no build for CPUs.
"""

from __future__ import annotations

import copy
import functools
import re
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.packages import imported, installed, loaded
from helpers.reference import SCALE, config, saved
from torch import Tensor, nn

import lora_inject as li

N = 64  # the smallest block of the 4-bit formats


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes below stand for those of these modules where they are not installed."""
    gptqmodel, hqq = "gptqmodel.nn_modules.qlinear", "hqq.core.quantize"
    quanto, compressed = "optimum.quanto.nn.qlinear", "compressed_tensors.quantization"
    loaded(monkeypatch, gptqmodel, hqq, quanto, compressed)


def plain_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 32)).to(dtype)


def torchao(config_name: str, seed: int, **options: Any) -> nn.Module:
    quantization = imported("torchao.quantization")
    net = plain_net(torch.bfloat16 if "Int4" in config_name else torch.float32, seed)
    try:
        quantization.quantize_(net, getattr(quantization, config_name)(**options))
    except (ImportError, NotImplementedError) as missing:
        pytest.skip(f"torchao {config_name}: {missing}")
    return net


def bitsandbytes(cls: str, seed: int, **options: Any) -> nn.Module:
    make = getattr(imported("bitsandbytes").nn, cls)
    options |= {"compute_dtype": torch.float32} if cls == "Linear4bit" else {}
    net = nn.Sequential(make(N, N, **options), nn.Tanh(), make(N, 32, **options))
    net.load_state_dict(plain_net(seed=seed).state_dict())
    return net.to("cpu")  # this is what quantizes


class BaseQuantLinear(nn.Module):
    """As gptqmodel builds it for GPTQ and AWQ: packed integers, scales and bias are buffers."""

    __module__ = "gptqmodel.nn_modules.qlinear"

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        W = plain.weight.detach().t()  # (in, out), eight codes of 4 bits along the input
        scales = W.abs().amax(0) / 7
        codes = (W / scales).round().to(torch.int32) + 8
        shifts = torch.arange(0, 32, 4)
        packed = (codes.view(-1, 8, W.shape[1]) << shifts[None, :, None]).sum(1)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", plain.bias.detach().clone())


class TorchLinear(BaseQuantLinear):
    """A kernel of the family; its forward is its own."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def forward(self, x: Tensor) -> Tensor:
        codes = self.qweight[:, None, :] >> torch.arange(0, 32, 4)[None, :, None] & 15
        return x @ ((codes.reshape(self.in_features, -1) - 8) * self.scales) + self.bias


class HQQLinear(nn.Module):
    """As hqq builds it, where hqq itself is not installed: codes are a parameter, bias is not."""

    __module__ = "hqq.core.quantize"

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        W = plain.weight.detach()
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
        self.meta = {"scale": (high - low) / 255, "zero": low}
        codes = ((W - low) / self.meta["scale"]).round().to(torch.uint8)
        self.W_q = nn.Parameter(codes, requires_grad=False)
        self.bias = plain.bias.detach().clone()

    def dequantize(self) -> Tensor:
        return self.W_q * self.meta["scale"] + self.meta["zero"]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().t() + self.bias


class QModuleMixin(ABC):  # noqa: B024 - as optimum-quanto has it
    """Stands before nn.Linear, with a memory layout of its own."""


class QBytes(nn.Parameter):
    """Its tensor: codes that know their scale."""

    __module__ = "optimum.quanto.tensor.weights.qbytes"

    def dequantize(self) -> Tensor:
        return self.data * self.scale


class QLinear(QModuleMixin, nn.Linear):
    """As optimum-quanto builds it, where that is not installed."""

    __module__ = "optimum.quanto.nn.qlinear"

    @classmethod
    def of(cls, plain: nn.Linear) -> QLinear:
        made = cls(plain.in_features, plain.out_features)
        made.bias = plain.bias
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (plain.weight.detach() / scale).round().to(torch.int8)
        made.weight = QBytes(codes, requires_grad=False)
        made.weight.scale = scale
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dequantize(), self.bias)


def gptq(plain: nn.Linear) -> nn.Module:
    """A layer of gptqmodel with symmetric codes, where that is installed."""
    if (kernels := installed("gptqmodel.nn_modules.qlinear.torch")) is None:
        return TorchLinear(plain)
    layer: Any = kernels.TorchLinear(
        bits=4, group_size=plain.in_features, sym=True, desc_act=False, bias=True,
        in_features=plain.in_features, out_features=plain.out_features,
    )  # fmt: skip
    like = TorchLinear(plain)
    layer.qweight, layer.bias = like.qweight, like.bias
    layer.scales = like.scales[None].to(torch.float16)
    layer.qzeros.fill_(-0x77777778)  # eight times 8
    layer.optimized = True  # nothing is compiled
    layer.post_init()
    return layer


def replaced(make: Callable[[Any], nn.Module], seed: int) -> nn.Module:
    net = plain_net(seed=seed)
    net[0], net[2] = make(net[0]), make(net[2])
    return net


def hqq(plain: nn.Linear) -> nn.Module:
    if (quantize := installed("hqq.core.quantize")) is None:
        return HQQLinear(plain)
    how = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return quantize.HQQLinear(plain, how, compute_dtype=torch.float32, device="cpu")


def quanto(bits: str, seed: int) -> nn.Module:
    if (quanto := installed("optimum.quanto")) is None:
        return replaced(QLinear.of, seed)
    net = plain_net(seed=seed)
    quanto.quantize(net, weights=getattr(quanto, bits))
    quanto.freeze(net)
    return net


FORWARD = """
def quantized_forward(self, input):
    weight = self.weight
    held, weight.data = weight.data, weight.data
    output = self.__class__.forward(self, input)
    weight.data = held
    return output
"""


def compressed_tensors(seed: int) -> nn.Module:
    """As its first forward leaves a model: weights unpacked, a forward on each instance."""
    net: Any = plain_net(seed=seed).requires_grad_(False)
    quantization = installed("compressed_tensors.quantization")
    if quantization is None:
        made: dict[str, Any] = {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
        exec(FORWARD, made)
        for layer in (net[0], net[2]):
            step = layer.weight.abs().amax() / 7
            layer.weight.data = (layer.weight / step).round() * step
            layer.quantization_scheme = object()
            layer.forward = functools.wraps(nn.Linear.forward)(made["quantized_forward"]).__get__(
                layer
            )
        return net
    compressors = installed("compressed_tensors.compressors")
    weights = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    how = {"format": "pack-quantized", "quantization_status": "frozen"}
    made = quantization.QuantizationConfig(config_groups={"all": scheme}, **how)
    quantization.apply_quantization_config(net, made)
    for layer in (net[0], net[2]):
        rows = layer.weight.view(len(layer.weight), -1, 32)
        layer.weight_scale.data.copy_(rows.abs().amax(-1) / 7)
    compressors.ModelCompressor(made).compress_model(model=net)
    net(torch.zeros(1, N))
    return net


FORMATS: dict[str, Callable[..., nn.Module]] = {
    "compressed-tensors": lambda seed=0: compressed_tensors(seed),
    "gptq": lambda seed=0: replaced(gptq, seed),
    "hqq": lambda seed=0: replaced(hqq, seed),
    "quanto int8": lambda seed=0: quanto("qint8", seed),
    "torchao int8": lambda seed=0: torchao("Int8WeightOnlyConfig", seed),
    "torchao int4": lambda seed=0: torchao("Int4WeightOnlyConfig", seed, group_size=32),
    "torchao float8": lambda seed=0: torchao("Float8WeightOnlyConfig", seed),
    "bitsandbytes 8-bit": lambda seed=0: bitsandbytes("Linear8bitLt", seed, has_fp16_weights=False),
    "bitsandbytes 4-bit": lambda seed=0: bitsandbytes("Linear4bit", seed, quant_type="fp4"),
    "bitsandbytes nf4": lambda seed=0: bitsandbytes("Linear4bit", seed, quant_type="nf4"),
}

every = pytest.mark.parametrize("form", FORMATS)
PACKED = [form for form in FORMATS if form != "compressed-tensors"]  # which unpacks its weights
packed = pytest.mark.parametrize("form", PACKED)
DENSE = [form for form in FORMATS if form.startswith(("torchao", "bitsandbytes", "hqq", "gptq"))]
some = pytest.mark.parametrize("form", DENSE)
SENT = ["quanto int8", *DENSE]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the quantizers' own, about casts
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def build(form: str) -> tuple[Any, Tensor]:
    net = FORMATS[form]()
    dtype = next((p.dtype for n, p in net.named_parameters() if n.endswith("bias")), torch.float32)
    return net, torch.randn(3, N).to(dtype)


@every
def test_the_start_is_the_quantized_model_bit_for_bit(form: str) -> None:
    net, x = build(form)
    before = net(x)
    held = {k: (id(p), type(p)) for k, p in net.named_parameters()}
    forwards = [layer.__dict__.get("forward") for layer in net]
    li.inject(net, config("0", "2"))
    assert same_bits(net(x), before)
    assert {k: v for k, v in objects(net).items() if "lora_" not in k} == held
    sites = li.adapters(net)["default"].sites.values()
    assert [(s.in_features, s.out_features, s.update) for s in sites] == [
        (N, N, "forward"),
        (N, 32, "forward"),
    ], "widths are what the layers state, not those of packed weights"
    li.eject(fill(net))
    assert same_bits(net(x), before)
    assert objects(net) == held
    assert [layer.__dict__.get("forward") for layer in net] == forwards


def objects(net: nn.Module) -> dict[str, tuple[int, type]]:
    return {k: (id(p), type(p)) for k, p in net.named_parameters()}


@every
def test_the_update_is_the_dense_one_beside_the_layer(form: str) -> None:
    net, x = build(form)
    bare = net[0](x)
    fill(li.inject(net, config("0")))
    site = li.adapter_state(net).sites["0"]
    wanted = bare.double() + x.double() @ (SCALE * site.B.double() @ site.A.double()).t()
    tolerance = 3 * torch.finfo(x.dtype).eps if x.dtype == torch.bfloat16 else 1e-5
    assert error(net[0](x), wanted) < tolerance


@every
def test_adapters_train_and_the_base_does_not(form: str) -> None:
    net, x = build(form)
    li.inject(net, config("0", "2"))
    with li.disabled(net):
        base = net(x)
    optimizer = torch.optim.Adam(li.adapter_parameters(net).values(), lr=0.02)
    target = torch.randn(3, 32)
    losses = []
    for _ in range(25):
        loss = (net(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.any() for p in li.adapter_parameters(net).values())
    assert losses[-1] < 0.5 * losses[0]
    with li.disabled(net):
        assert same_bits(net(x), base)


@pytest.mark.parametrize("when", ["before inject", "in training", "before train_only"])
@every
def test_an_evaluation_changes_no_gradient_of_later_training(form: str, when: str) -> None:
    """On some CPUs bitsandbytes rearranges 4-bit codes for a kernel without a backward pass."""

    def gradients(when: str) -> list[Tensor]:
        net, x = build(form)
        if isinstance(net[0], nn.Linear):
            net[0].bias = net[2].bias = None  # without it bitsandbytes does not even raise
        evaluate = torch.no_grad()(lambda: net.eval()(x) * net.train().training)
        if when == "before inject":
            evaluate()
        torch.manual_seed(1)
        li.inject(net, config("0", "2"))
        if when == "before train_only":
            li.train_only(net, None)
            evaluate()
            li.train_only(net, "default")
        torch.manual_seed(2)
        fill(net, std=0.1)
        if when == "in training":
            evaluate()
        torch.manual_seed(3)
        net(torch.randn(3, N).to(x.dtype)).float().square().sum().backward()
        found = [p.grad for p in li.adapter_parameters(net).values()]
        assert all(grad is not None for grad in found)
        li.eject(net)
        assert net[0].__dict__.keys() == build(form)[0][0].__dict__.keys()
        packs = "support_avx512bf16_for_cpu"
        assert net[0].__dict__.get(packs) == build(form)[0][0].__dict__.get(packs)
        return found

    for found, due in zip(gradients(when), gradients("never"), strict=True):
        assert (found - due).norm() < 0.01 * due.norm()


@every
def test_gradients_are_those_of_the_update(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("2")))
    hidden = net[1](net[0](x)).detach()
    weights = torch.randn(3, 32)
    (net(x).float() * weights).sum().backward()
    site = li.adapter_state(net).sites["2"]
    G = weights.double().t() @ hidden.double()
    parameters = li.adapter_parameters(net)
    tolerance = 0.03 if x.dtype == torch.bfloat16 else 1e-5
    wanted = SCALE * site.B.double().t() @ G
    assert error(parameters["2.lora_A"].grad, wanted) < tolerance
    assert error(parameters["2.lora_B"].grad, SCALE * G @ site.A.double().t()) < tolerance


@pytest.mark.parametrize("form", [form for form in SENT if form != "gptq"])
def test_dora_is_that_over_the_dequantized_layer(form: str, tmp_path: Path) -> None:
    net, x = build(form)
    W, base, b = measured(net[0]), net[0](x), net[0].bias.detach().double()
    li.inject(net, config("0", variant="dora"))
    assert same_bits(net[0](x), base)
    for key, p in li.adapter_parameters(net).items():
        with torch.no_grad():
            p.mul_(0.5 + torch.rand_like(p)) if key.endswith("_m") else p.normal_(0, 0.2)
    found = {key[-1]: p for key, p in li.adapter_parameters(net).items()}
    A, B, m = (found[role].detach().double().requires_grad_() for role in "ABm")
    gain = (m / (W + SCALE * B @ A).norm(dim=1).detach())[:, None]
    y, up = net[0](x), torch.randn(3, N, dtype=torch.double)
    wanted = (base.detach().double() - b + SCALE * x.double() @ A.T @ B.T) * gain.T + b
    (y.double() * up).sum().backward()
    (wanted * up).sum().backward()
    tolerance = 0.03 if x.dtype == torch.bfloat16 else 1e-5
    assert error(y, wanted) < tolerance
    for mine, theirs in zip((found[role] for role in "ABm"), (A, B, m), strict=True):
        assert error(mine.grad, theirs.grad) < tolerance
    with li.routed(net, ["default", None, "default"]):
        rows = net[0](x)
    assert error(rows, torch.stack([y[0], base[1], y[2]])) < tolerance
    again = li.load_adapter(build(form)[0], li.save_adapter(net, tmp_path / "peft"))
    assert same_bits(again[0](x), y)
    if form in DENSE:
        li.merge(net, dequantize="float32")
        assert error(net[0].weight, (W + SCALE * B @ A) * gain) < tolerance


@every
def test_merging_is_refused_and_the_way_out_named(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    before, held = net(x), objects(net)
    way_out = r"dequantize=\"bfloat16\"" if form in SENT else "in 16 bits"
    refusals: list[tuple[dict[str, Any], str]] = [({}, way_out), ({"undo": False}, way_out)]
    if form not in DENSE:
        refusals.append(({"dequantize": "float32"}, "in 16 bits"))
    if not form.startswith("bitsandbytes"):
        refusals.append(({"requantize": True}, "in 16 bits"))
    for options, words in refusals:
        with pytest.raises(li.LayerError, match=rf"merge into '0\.\w+'.*quantized.*{words}"):
            li.merge(net, **options)
        assert same_bits(net(x), before)
        assert objects(net) == held
        li.activate(net, "default")  # it is not half merged


def measured(layer: Any) -> Tensor:
    """What the weight of a layer is, by what it makes of unit vectors."""
    eye = torch.eye(layer.in_features, dtype=layer.bias.dtype)
    with torch.no_grad():
        return (layer(eye).double() - layer.bias.double()).t()


def layer_state(net: Any) -> list[Any]:
    return [(type(m), sorted(m.__dict__), dict(m._parameters)) for m in net.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@some
def test_merged_into_plain_floats_on_request_and_restored(form: str, dtype: torch.dtype) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0"))).train()
    with li.disabled(net):
        W = [measured(net[0]), measured(net[2])]
    before, held = net(x), layer_state(net)
    site = li.adapter_state(net).sites["0"]
    wanted = W[0] + SCALE * site.B.double() @ site.A.double()
    report = li.merge(net, dequantize=str(dtype).removeprefix("torch."))
    actions = {name: (row.action, row.dtype, row.shape) for name, row in report.tensors.items()}
    kind = str(dtype).removeprefix("torch.")
    assert actions == {
        "0.weight": ("folded", kind, (N, N)),
        "2.weight": ("dequantized", kind, (32, N)),
    }
    for layer, values in ((net[0], wanted), (net[2], W[1])):
        assert type(layer.weight) is nn.Parameter
        assert error(layer.weight, values) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert (report.min_kept > 0.9) if dtype == torch.bfloat16 else not report.counted
    merged = net(x.to(dtype))
    li.unmerge(net)
    assert layer_state(net) == held, "the very layers, with their very weights"
    assert same_bits(net(x), before)

    li.merge(net, dequantize=dtype, eject=True)
    assert [type(m) for m in net] == [nn.Linear, nn.Tanh, nn.Linear]
    assert [sorted(m.__dict__) for m in net] == [sorted(m.__dict__) for m in plain_net()]
    assert list(net.state_dict()) == list(plain_net().state_dict())
    assert same_bits(net(x.to(dtype)), merged)


@pytest.mark.parametrize("form", [form for form in DENSE if "bitsandbytes" in form])
def test_requantized_on_request_and_restored(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0")), std=0.1).train()
    with li.disabled(net):
        W = measured(net[0])
    before, held = net(x), layer_state(net)
    site = li.adapter_state(net).sites["0"]
    D = SCALE * site.B.double() @ site.A.double()
    row = li.merge(net, requantize=True).tensors["0.weight"]
    assert type(net[0].weight) is type(held[1][2]["weight"])
    change = measured(net[0]) - W
    kept = float((change * D).sum() / D.square().sum())
    assert row.kept == pytest.approx(kept, abs=1e-3)
    assert row.error == pytest.approx(float((change - D).norm() / D.norm()), rel=1e-3)
    assert 0.5 < kept < 1.2
    li.unmerge(net)
    assert layer_state(net) == held
    assert same_bits(net(x), before)
    with torch.no_grad():
        li.adapter_parameters(net)["0.lora_B"] *= 1e-4  # less than a step of the format
    with pytest.raises(li.LayerError, match="min_kept"):
        li.merge(net, requantize=True, min_kept=0.5)
    assert layer_state(net) == held


@pytest.mark.parametrize("form", SENT)
def test_weights_for_a_server_are_those_that_a_merge_would_leave(form: str) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0")))
    net.eval()(x)  # which has bitsandbytes rearrange its codes
    sent = dict(li.merged_weights(net, dequantize="bfloat16"))
    if form in DENSE:
        li.merge(net, dequantize="bfloat16", eject=True)
        assert all(same_bits(sent[f"{i}.weight"], net[i].weight) for i in (0, 2))
    plain = plain_net(torch.bfloat16)
    plain.load_state_dict(sent)
    assert error(plain(x.to(torch.bfloat16)), net(x.to(net[0].bias.dtype)).double()) < 0.03


@pytest.mark.parametrize("layout", ["native", "peft"])
@every
def test_a_load_onto_the_same_quantized_base_needs_no_word(form, layout, tmp_path) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    adapted, state = net(x), li.adapter_state(net)
    path, _ = saved(net, tmp_path, layout)
    li.eject(net)
    li.load_adapter(net, path)
    assert same_bits(net(x), adapted)
    again = li.adapter_state(net)
    assert all(same_bits(again.sites[k].B, site.B) for k, site in state.sites.items())


@packed
def test_another_quantized_base_is_refused_in_values_in_format_and_plain(form, tmp_path) -> None:
    net, x = build(form)
    fill(li.inject(net, config("0", "2")))
    path, _ = saved(net, tmp_path, "peft")
    other = {"bitsandbytes 4-bit": "bitsandbytes nf4", "bitsandbytes nf4": "bitsandbytes 4-bit"}
    bases = {
        r"another base: '0\.\w+' is .* in the file and .* here": FORMATS[form](seed=1),
        "another base": FORMATS[other.get(form, "bitsandbytes nf4")](),
        'quantized here or where.*base="quantized"': plain_net(),
    }
    for message, base in bases.items():
        before, held = base(x), objects(base)
        with pytest.raises(li.FormatError, match=message):
            li.load_adapter(base, path)
        assert same_bits(base(x), before)
        assert objects(base) == held


@packed
def test_an_adapter_made_on_a_quantized_base_serves_the_plain_one(form, tmp_path) -> None:
    """The way out of the refused merge: load it onto the floating point base, and merge there."""
    net, _ = build(form)
    fill(li.inject(net, config("0", "2")))
    path, _ = saved(net, tmp_path, "native")
    base = plain_net()
    x = torch.randn(3, N)
    wide = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, site in li.adapter_state(net).sites.items():
            wide.get_submodule(name).weight += SCALE * site.B.double() @ site.A.double()  # type: ignore[operator]
    li.load_adapter(base, path, base="quantized")
    li.merge(base)
    assert error(base(x), wide(x.double())) < 1e-5


BEYOND: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "read as a whole": (lambda weight: config(re.escape(weight)), "quantized|is a buffer"),
    "trained in full": (
        lambda _: {"rank": 2, "targets": ["2"], "train": ["0"]},
        "quantized.*Adapt the layer|no parameters|is a buffer",
    ),
    "a start from its values": (lambda _: config("0", init="pissa"), "pissa"),
    "a start and norms": (lambda _: config("0", init="olora", variant="dora"), "olora"),
}


@packed
@pytest.mark.parametrize("wish", BEYOND)
def test_what_needs_the_values_of_a_quantized_weight_is_refused(form: str, wish: str) -> None:
    net, _ = build(form)
    held = objects(net)
    make, words = BEYOND[wish]
    weight = li.plan(net, config("0")).sites[0].weight
    with pytest.raises(li.LoraInjectError, match=rf"'0.*({words})"):
        li.inject(net, make(weight))
    assert objects(net) == held


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_graph_of_a_packed_layer_is_whole(variant: str) -> None:
    """What is known of a library is imported by inject, and not while a forward is traced."""
    net, x = build("torchao int8")
    fill(li.inject(net, config("0", variant=variant)))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert error(compiled(x), net(x).double()) < 1e-6


def test_norms_of_kernels_that_only_multiply_are_refused() -> None:
    net, _ = build("gptq")
    with pytest.raises(li.LayerError, match="each forward would have to measure the values"):
        li.inject(net, config("0", variant="dora"))


@pytest.mark.parametrize("form", ["bitsandbytes 8-bit", "bitsandbytes nf4"])
def test_copies_and_hooks_follow_a_layer_that_becomes_a_plain_one(form: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    net, x = build(form)
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    fill(li.inject(net, config("0"))).train()
    hooks.add_hook_to_module(net[2], hooks.ModelHook())
    before = net(x)
    li.merge(net, dequantize="float32")
    merged = net(x)
    assert error(merged, before) < 1e-5
    copied = copy.deepcopy(net)
    assert same_bits(li.unmerge(copied)(x), before)
    assert type(copied[0].weight) is not nn.Parameter
    assert same_bits(net(x), merged), "the copy's undo is its own"
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
        spread = scales if block is None else scales.repeat_interleave(32, 0)
        spread = spread if block is None else spread.repeat_interleave(16, 1)
        wanted.append(layer.weight.double() * spread.double())
    net.requires_grad_(False)
    fill(li.inject(net, config("0")))
    held, keys = layer_state(net), list(net.state_dict())
    site = li.adapter_state(net).sites["0"]
    wanted[0] += SCALE * site.B.double() @ site.A.double()
    with pytest.raises(li.LayerError, match="its format cannot be quantized again"):
        li.merge(net, requantize=True)
    with pytest.raises(li.LayerError, match=r'Write plain floats, merge\(.*="bfloat16"\)\.$'):
        li.merge(net)
    li.merge(net, dequantize="float32")
    for layer, W in zip(net, wanted, strict=True):
        assert error(layer.weight, W) < 1e-6
    li.unmerge(net)
    assert layer_state(net) == held
    assert list(net.state_dict()) == keys
    li.merge(net, dequantize="float32", eject=True)
    assert [sorted(m.__dict__) for m in net] == [sorted(nn.Linear(1, 1).__dict__)] * 2
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(3, N)
    y = (x.double() @ wanted[0].t() + net[0].bias) @ wanted[1].t() + net[1].bias
    assert error(net(x), y) < 1e-5


def test_a_kernel_for_inference_lets_no_adapter_train() -> None:
    """As gptqmodel states it of Marlin and others, which hand no gradient to their input."""
    kernel = type("MarlinLinear", (TorchLinear,), {"SUPPORTS_TRAINING": False})
    net = replaced(kernel, 0)
    with pytest.raises(li.LayerError, match=r"MarlinLinear is a kernel for inf.*auto_trainable"):
        li.inject(net, config("0"))
    trained = fill(li.inject(replaced(TorchLinear, 0), config("0")))
    li.install(net, li.adapter_state(trained), base="any")  # to serve


def test_a_packed_layer_that_is_not_linear_is_not_dequantized() -> None:
    class Prepacked(TorchLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1  # a bias of its own

    net = fill(li.inject(replaced(Prepacked, 0), config("0")))
    held = layer_state(net)
    with pytest.raises(li.LayerError, match="it makes no zero of zero"):
        li.merge(net, dequantize="float32")
    assert layer_state(net) == held


class TwoProducts(nn.Module):
    """Two weights of its own, packed by torchao, and a tensor that is not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "down"):
            setattr(self, name, torchao("Int8WeightOnlyConfig", 0)[0].weight)
        self.scale = nn.Parameter(torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.up) * self.scale, self.down)


def test_packed_weights_of_a_module_are_unpacked_under_their_own_names() -> None:
    """Each is replaced alone: a module that is no quantizer's layer becomes no nn.Linear."""
    net = nn.Sequential(nn.Linear(N, N), TwoProducts())
    x = torch.randn(3, N)
    fill(li.inject(net, config("0")))
    keys = [key for key in net.state_dict() if "lora_" not in key]
    adapted, held = net(x), layer_state(net)
    sent = dict(li.merged_weights(net, dequantize="float32"))
    assert list(sent) == keys
    li.merge(net, dequantize="float32")
    assert {type(p) for p in net[1].parameters()} == {nn.Parameter}
    assert all(same_bits(sent[key], net.state_dict()[key]) for key in keys)
    assert error(net(x), adapted.double()) < 1e-5
    li.unmerge(net)
    assert layer_state(net) == held


def test_a_packed_embedding_becomes_a_plain_embedding() -> None:
    """A quantizer's class becomes the class of torch that it derives from, not always nn.Linear."""
    bnb = imported("bitsandbytes").nn
    plain = nn.Sequential(nn.Embedding(10, N), nn.Linear(N, N))
    net = nn.Sequential(bnb.Embedding4bit(10, N), nn.Linear(N, N))
    net.load_state_dict(plain.state_dict())
    net.to("cpu")
    ids = torch.arange(10)
    fill(li.inject(net, config("1")))
    adapted, held = net(ids), layer_state(net)
    sent = dict(li.merged_weights(net, dequantize="float32"))
    assert list(sent) == list(plain.state_dict())
    li.merge(net, dequantize="float32")
    assert type(net[0]) is nn.Embedding
    assert error(net(ids), adapted.double()) < 1e-5
    li.unmerge(net)
    assert layer_state(net) == held
    li.merge(net, dequantize="float32", eject=True)
    assert sorted(net[0].__dict__) == sorted(plain[0].__dict__)
    assert list(net.state_dict()) == list(plain.state_dict())

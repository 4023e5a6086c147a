"""What each verb leaves behind: the State section of the design, sentence by sentence."""

import copy
import gc
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import (
    KINDS,
    SCALE,
    TOLERANCE,
    Host,
    dense_output,
    error,
    fill,
    host,
    injected,
    same_bits,
    snapshot,
)
from helpers.calls import python_calls
from helpers.models import IDS, Net, Packed, PackedKind
from helpers.packages import loaded
from helpers.reference import gpt2_of_two_layers
from helpers.versions import TRANSFORMERS_5
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_inject as li
from lora_inject.core.layers import packed_weights

RANK2 = {"rank": 2, "alpha": 3}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}


def assert_base_is(model: nn.Module, bits: dict[str, Tensor]) -> None:
    for name, wanted in bits.items():
        path, _, key = name.rpartition(".")
        found = model.get_submodule(path)._parameters[key]
        assert same_bits(found, wanted), name


def train(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Three steps of SGD."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).float().square().sum().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------- inject and load


def test_inject_makes_the_new_adapter_the_only_active_and_trainable_one() -> None:
    model = Net()
    fill(li.inject(model, {**RANK2, "targets": ["fc"], "train": ["head"]}, "old"), "old")
    values = {n: p.detach().clone() for n, p in li.adapter_parameters(model, "old").items()}
    li.inject(model, {**RANK2, "targets": ["embed"], "bias": "all"}, "new")
    info = li.adapters(model)
    assert {n: (i.active, i.trainable) for n, i in info.items()} == {
        "old": (False, False),
        "new": (True, True),
    }
    assert info["new"].weight == 1.0
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in li.adapter_parameters(model, "new").values()}
    for name, parameter in li.adapter_parameters(model, "old").items():
        assert same_bits(parameter, values[name])


def test_load_activates_only_where_none_is_active(tmp_path: Any) -> None:
    model = injected(KINDS["linear"])
    li.save_adapter(model, tmp_path / "a")
    li.load_adapter(model, tmp_path / "a", "second")
    info = li.adapters(model)
    assert {n: (i.active, i.trainable) for n, i in info.items()} == {
        "default": (True, True),
        "second": (False, False),
    }
    li.activate(model, None)
    li.load_adapter(model, tmp_path / "a", "third")
    assert {n for n, i in li.adapters(model).items() if i.active} == {"third"}
    li.eject(model)
    li.load_adapter(model, tmp_path / "a", "alone")
    alone = li.adapters(model)["alone"]
    assert (alone.active, alone.trainable) == (True, False)
    assert not any(flags(model).values())


def test_train_only_chooses_who_requires_grad_and_nothing_else() -> None:
    model = Net()
    for name in "abc":
        li.inject(model, {**RANK2, "targets": ["fc"], "train": ["head"], "init": "pissa"}, name)
    for wanted in ({"a"}, {"a", "c"}, set(), {"b"}):
        li.train_only(model, wanted or None)
        assert {n for n, i in li.adapters(model).items() if i.trainable} == wanted
        required = {id(p) for p in model.parameters() if p.requires_grad}
        expected = {id(p) for n in wanted for p in li.adapter_parameters(model, n).values()}
        assert required == expected, "frozen starts and base tensors never require a gradient"
        assert {n for n, i in li.adapters(model).items() if i.active} == {"c"}
    with pytest.raises(li.StateError, match="train_only 'x': the model's adapters are"):
        li.train_only(model, ["a", "x"])
    assert {n for n, i in li.adapters(model).items() if i.trainable} == {"b"}


def test_the_fortieth_adapter_costs_what_the_fourth_does() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(20)])
    config = {"rank": 1, "targets": [r"\d+"]}
    names = [f"a{i}" for i in range(40)]
    on = [python_calls(partial(li.inject, net, config, name)) for name in names]
    off = [python_calls(partial(li.eject, net, name)) for name in names]
    assert abs(on[39] - on[3]) < 10  # for 20 sites: nothing for each
    assert abs(off[3] - off[36]) < 40  # per site, nothing


# ---------------------------------------------------------------------------- freezing and its undo


def test_eject_forgets_the_adapter_entirely() -> None:
    model = injected(KINDS["linear"])
    dead = weakref.ref(li.adapter_parameters(model)["layer.lora_A"])
    li.eject(model)
    gc.collect()
    assert dead() is None
    assert li.adapters(model) == {}
    assert li.summary(model).count("\n") == 1
    with pytest.raises(li.StateError, match="eject 'default': the model's adapters are: none"):
        li.eject(model, "default")


def test_hooks_stay_and_their_outputs_are_not_written() -> None:
    """A hook that keeps what it saw must not see it change."""
    model = Host(nn.Linear(5, 6))
    kept: list[Tensor] = []
    handle = model.layer.register_forward_hook(lambda m, args, y: kept.append(y))
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    x = torch.randn(2, 5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x)
        assert same_bits(kept.pop(), y)
    li.eject(model)
    handle.remove()
    assert not model.layer._forward_hooks


def test_an_instance_forward_does_not_hide_the_adapter() -> None:
    """What accelerate's hooks do to a module."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    plain = Host(nn.Linear(5, 6))
    model = copy.deepcopy(plain)
    add_hook_to_module(model.layer, ModelHook())
    before = snapshot(model)
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    A, B = (p.detach().double() for p in li.adapter_parameters(model).values())
    x = torch.randn(2, 5)
    wanted = dense_output(KINDS["linear"], plain, A, B, [x])
    assert error(model(x), wanted) < TOLERANCE[torch.float32]
    li.eject(model)
    assert snapshot(model) == before
    assert same_bits(model(x), plain(x))
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    remove_hook_from_module(model.layer)
    assert not same_bits(model(x), plain(x)), "the adapter went with the hook"
    li.eject(model)
    assert same_bits(model(x), plain(x))


def test_a_forward_that_is_an_object_which_calls_another_is_right() -> None:
    """What accelerate makes of the forward of a model in mixed precision."""
    from accelerate.utils.operations import ConvertOutputsToFp32

    plain = Host(nn.Linear(5, 6))
    model = copy.deepcopy(plain)
    model.layer.forward = MethodType(ConvertOutputsToFp32(nn.Linear.forward), model.layer)
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    A, B = (p.detach().double() for p in li.adapter_parameters(model).values())
    x = torch.randn(2, 5)
    wanted = dense_output(KINDS["linear"], plain, A, B, [x])
    assert error(model(x), wanted) < TOLERANCE[torch.float32]


def test_backward_hooks_see_the_whole_layer() -> None:
    model = injected(KINDS["linear"], torch.float64)
    seen: list[Any] = []
    model.layer.register_full_backward_hook(lambda _, inputs, outputs: seen.append(inputs[0]))
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    assert torch.equal(seen[0], x.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_subclass_is_called_untouched(dtype, monkeypatch) -> None:
    monkeypatch.setattr(packed_weights, "REGISTERED", [PackedKind()])
    model = Host(Packed(nn.Linear(5, 6))).to(dtype)
    codes = model.layer.weight
    before = snapshot(model)
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    plain = model(x).detach()
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    A, B = li.adapter_parameters(model).values()
    assert (A.dtype, B.dtype) == (torch.float32, torch.float32)
    wanted = plain.double() + SCALE * x.double() @ A.double().t() @ B.double().t()
    assert error(model(x), wanted) < TOLERANCE[dtype]
    model(x).sum().backward()
    assert A.grad is not None
    assert model.layer.weight is codes
    with pytest.raises(li.LayerError, match="quantized"):
        li.merge(model)
    li.eject(model)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------- weights that read


class ReadsThrice(nn.Module):
    """Reads its weight with and without gradients, and again with the adapter off."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            first = x @ self.w.exp()
        second = x @ self.w.exp()
        third = x @ self.w.exp()
        if self.fail:
            raise ZeroDivisionError
        with li.disabled(self):
            off = x @ self.w.exp()
        return torch.stack([first, second, third, off])


def test_one_delta_a_forward_and_none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_inject.core.functional.weight import LowRank

    model = fill(li.inject(ReadsThrice(), {**RANK2, "targets": ["w"]}))
    raw = model._parameters["w"]
    formed: list[int] = []
    real = LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda *a, **k: formed.append(1) or real(*a, **k))
    x = torch.randn(3, 4)
    first, second, third, off = model(x)
    assert len(formed) == 2, "one without gradients, one with"
    assert same_bits(first, second)
    assert same_bits(second, third)
    assert same_bits(off, x @ raw.exp())
    assert second.requires_grad, "a value formed under no_grad cuts no gradient"
    second.sum().backward()
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())
    model.fail = True
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert model._lora.running == {}
    assert model.get_parameter("w") is raw


def test_the_getter_never_hands_out_the_raw_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_inject.core.functional import lazy

    model = injected(KINDS["parameter"])
    (x,) = KINDS["parameter"].inputs(torch.float32)

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise AttributeError("inside")

    monkeypatch.setattr(lazy, "lazy_weight", broken)
    with pytest.raises(li.LayerError, match="inside"):
        model(x)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 ties by attributes: a TypeError")
def test_whoever_registers_a_read_weight_gets_the_raw_one_or_is_refused() -> None:
    model = fill(li.inject(gpt2_of_two_layers(), {**RANK2, "targets": [r"wte\.weight"]}))
    ids = torch.arange(10).view(2, 5)
    wanted, before = model(ids).logits, snapshot(model)
    model.tie_weights()
    assert snapshot(model) == before
    assert same_bits(model(ids).logits, wanted)
    raw = model.transformer.wte._parameters["weight"]
    assert model.get_parameter("transformer.wte.weight") is raw
    assert model.get_parameter("lm_head.weight") is raw
    new = nn.Parameter(torch.zeros(13, 8), requires_grad=False)
    with pytest.raises(li.LayerError, match="replacing parameter 'weight'"):
        model.transformer.wte.weight = new
    assert snapshot(model) == before


def test_plan_says_that_reads_are_rounded_over_16_bits() -> None:
    model = Host(nn.Conv1d(4, 4, 1)).bfloat16()
    planned = li.plan(model, {**RANK2, "targets": ["layer"]})
    assert "rounded on every" in str(planned)
    assert "rounded on every" not in str(li.plan(model.float(), {**RANK2, "targets": ["layer"]}))


def test_a_class_built_from_a_carrier_is_plain() -> None:
    model = injected(KINDS["linear"])
    other = type(model.layer)(3, 4)
    assert type(other) is nn.Linear
    assert repr(other) == "Linear(in_features=3, out_features=4, bias=True)"
    assert "default: r=2" in repr(model.layer)
    assert type(injected(KINDS["linear"]).layer) is type(model.layer), "one class per base class"


def test_a_base_that_registers_its_subclasses_does_not_hear_of_the_swapped_class() -> None:
    known = {}

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, kind: str) -> None:
            known[kind] = cls

    class Mine(Registered, kind="mine"):
        pass

    model = li.inject(nn.Sequential(Mine(3, 3)), {**RANK2, "targets": ["0"]})
    assert known == {"mine": Mine}
    assert isinstance(model[0], Mine)


@pytest.mark.parametrize(
    "replace",
    [
        prune.identity,
        lambda m, name: nn.utils.parametrize.register_parametrization(m, name, nn.Tanh()),
    ],
    ids=["prune", "parametrize"],
)
def test_the_tensors_of_an_adapter_are_not_replaced(replace: Any) -> None:
    layer = injected(KINDS["linear"]).layer
    held, hooks = dict(layer._parameters), len(layer._forward_pre_hooks)
    with pytest.raises(li.LayerError, match=r"replacing parameter 'lora_A__default'"):
        replace(layer, "lora_A__default")
    assert layer._parameters == held
    assert len(layer._forward_pre_hooks) == hooks


# ---------------------------------------------------------------------- trained copies: train, bias


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_copies_start_as_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    plain = copy.deepcopy(model)
    li.inject(model, {**RANK2, "targets": ["fc"], "train": ["head", "norm"], "bias": "all"})
    assert same_bits(model(IDS), plain(IDS))
    copies = {n: p for n, p in li.adapter_parameters(model).items() if "lora" not in n}
    assert set(copies) == {"norm.weight", "norm.bias", "head.weight", "head.bias", "fc.bias"}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in copies.values()} == {wide}
    assert li.adapters(model)["default"].n_parameters == 2 * 5 + 6 * 2 + 6 + 6 + 18 + 3 + 6


def test_bitfit_is_bias_without_targets() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    li.inject(model, {"bias": "all", "expect": {"sites": 0, "lora": 0, "trainable": 15}})
    assert set(li.adapter_parameters(model)) == {"fc.bias", "norm.bias", "head.bias"}
    train(model, li.adapter_parameters(model).values())
    train(plain, [p for n, p in plain.named_parameters() if "bias" in n])
    assert same_bits(model(IDS), plain(IDS))
    before = base_bits(model)
    li.merge(model)
    assert same_bits(model(IDS), plain(IDS))
    li.unmerge(model)
    assert_base_is(model, before)


# ------------------------------------------------------------------------------------- pissa, olora

DERIVED = ["linear", "conv1d", "embedding", "equal slices", "unequal slices of conv1d", "conv 2d",
           "parameter", "own linear forward", "turned experts"]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", DERIVED)
def test_weight_derived_inits_leave_the_base_and_start_exact(kind, init, dtype) -> None:
    row = KINDS[kind]
    model = host(row, dtype)
    plain, before = copy.deepcopy(model), snapshot(model)
    bits = base_bits(model)
    li.inject(model, {**row.config, "init": init})
    assert_base_is(model, bits)
    inputs = row.inputs(dtype)
    assert error(model(*inputs), plain(*inputs).double()) <= TOLERANCE[dtype]
    names = list(li.adapter_parameters(model))
    assert names == [f"{row.site}.lora_A", f"{row.site}.lora_B"], "the start is frozen"
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    site = li.adapter_state(model).sites[row.site]
    moved, start = ((a.double(), b.double()) for a, b in ((site.A, site.B), (site.A0, site.B0)))
    wanted = (
        dense_output(row, plain, *moved, inputs)
        - dense_output(row, plain, *start, inputs)
        + dense_output(row, plain, start[0], torch.zeros_like(start[1]), inputs)
    )
    assert error(model(*inputs), wanted) <= 2 * TOLERANCE[dtype]
    li.merge(model)
    assert error(model(*inputs), wanted) <= 2 * TOLERANCE[dtype]
    li.unmerge(model)
    li.eject(model)
    assert snapshot(model) == before


def test_pissa_starts_at_the_best_approximation_and_olora_at_qr() -> None:
    model = Host(nn.Linear(5, 6)).double()
    W = model.layer.weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    li.inject(model, {**RANK2, "targets": ["layer"], "init": "pissa"}, "pissa")
    site = li.adapter_state(model, "pissa").sites["layer"]
    assert error(SCALE * site.B @ site.A, (U[:, :2] * S[:2]) @ Vh[:2]) < 1e-12
    li.inject(model, {**RANK2, "targets": ["layer"], "init": "olora"}, "olora")
    site = li.adapter_state(model, "olora").sites["layer"]
    Q, R = torch.linalg.qr(W)
    assert error(site.B @ site.A, Q[:, :2] @ R[:2]) < 1e-12


# ------------------------------------------------------------------------------ scaling, init, rank


@pytest.mark.parametrize(
    ("init", "std"),
    [("kaiming", 3**-0.5 / 20), ("gaussian", 1 / 4), ({"normal": 0.02}, 0.02)],
    ids=str,
)
def test_inits_have_their_spread(init: Any, std: float) -> None:
    """kaiming_uniform_(a=sqrt(5)) over 400 inputs is uniform within 1/20."""
    model = Host(nn.Linear(400, 40))
    li.inject(model, {"rank": 4, "init": init, "targets": ["layer"]})
    A, B = (p.detach() for p in li.adapter_parameters(model).values())
    assert not B.any()
    assert abs(float(A.std()) / std - 1) < 5 / (2 * A.numel()) ** 0.5
    assert abs(float(A.mean())) < 5 * std / A.numel() ** 0.5
    if init == "kaiming":
        assert 0.049 < float(A.abs().max()) <= 0.05


def test_inject_is_reproducible_by_the_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        model = Host(nn.Linear(5, 6))
        torch.manual_seed(seed)
        li.inject(model, {**RANK2, "targets": ["layer", "before"]})
        found.append(torch.cat([p.flatten() for p in li.adapter_parameters(model).values()]))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


# ---------------------------------------------------------------------------------- float32 masters


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "to module dtype"])
def test_float32_masters_stay_under_narrowing_casts(cast: str) -> None:
    model = Net()
    li.inject(model, {**RANK2, "targets": ["fc", "embed"], "train": ["head"], "init": "olora"})
    model(IDS).sum().backward()
    adapters = li.adapter_parameters(model)
    bits = {n: p.detach().clone() for n, p in adapters.items()}
    grads = {n: p.grad.clone() for n, p in adapters.items() if p.grad is not None}
    narrow = torch.float16 if cast == "half" else torch.bfloat16
    if cast.startswith("to"):
        model.to(dtype=narrow)
    else:
        getattr(model, cast)()
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {narrow}
    for name, parameter in li.adapter_parameters(model).items():
        assert same_bits(parameter, bits[name])
        assert parameter.requires_grad
        assert same_bits(parameter.grad, grads[name])
    assert model(IDS).dtype == narrow
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


@pytest.mark.parametrize("target", ["fc", r"fc\.weight"])
def test_a_base_kept_in_float8_between_forwards(target: str) -> None:
    """As diffusers' layerwise casting does: each forward casts a layer, and casts it back."""
    model, plain = Net(), Net()
    li.inject(model, {**RANK2, "targets": [target]})
    bits = {n: p.detach().clone() for n, p in li.adapter_parameters(model).items()}
    for layer in (model.fc, plain.fc):
        layer.to(torch.float8_e4m3fn)
    assert model.fc.state_dict()["weight"].dtype == torch.float8_e4m3fn
    model.fc.to(torch.float32)
    assert all(same_bits(p, bits[n]) for n, p in li.adapter_parameters(model).items())
    plain.fc.forward = lambda x: x
    with pytest.raises(li.LayerError, match=r"kept in float8_e4m3fn\. Inject first"):
        li.inject(plain, {**RANK2, "targets": ["fc"]})


def test_a_frozen_part_on_the_meta_device_moves_with_to_empty() -> None:
    model = Host(nn.Linear(5, 6)).to("meta")
    li.inject(model, {**RANK2, "targets": ["layer"]})
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    trainable = [name for name, flag in flags(model).items() if flag]
    assert trainable == ["layer.lora_A__default", "layer.lora_B__default"]


# ---------------------------------------------------------------------- gradients of what is frozen


@pytest.mark.parametrize("verb", ["inject", "load", "inject another", "train_only"])
def test_a_gradient_of_before_moves_nothing_that_a_verb_froze(verb: str, tmp_path: Path) -> None:
    """An optimizer steps whatever has a gradient, whether or not it requires one."""
    model = Net()
    if verb == "load":
        path = li.save_adapter(li.inject(Net(), {**RANK2, "targets": ["fc"]}), tmp_path / "a")
    elif verb != "inject":
        fill(li.inject(model, {**RANK2, "targets": ["fc"]}, "one"), "one")
        fill(li.inject(model, {**RANK2, "targets": ["fc"]}, "two"), "two")
        li.train_only(model, ["one", "two"])
        li.activate(model, {"one": 1.0, "two": 1.0})
    model(IDS).sum().backward()
    kept = set()
    if verb == "load":
        li.load_adapter(model, path, base="any")
    elif verb == "train_only":
        li.train_only(model, "two")
        kept = {"fc.lora_A__two", "fc.lora_B__two"}
    else:
        li.inject(model, {**RANK2, "targets": ["fc"]}, "three")
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=1.0).step()
    assert {n for n, p in parameters.items() if not torch.equal(p, before[n])} == kept


@pytest.mark.parametrize("verb", ["inject", "train_only"])
def test_a_verb_that_raises_keeps_the_gradients(verb: str) -> None:
    model = Net()
    if verb == "train_only":
        li.inject(model, {**RANK2, "targets": ["fc"]})
    model(IDS).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    with pytest.raises(li.LoraInjectError):
        _ = (
            li.inject(model, {**RANK2, "targets": ["fc"]}, probe=lambda: None)
            if verb == "inject"
            else li.train_only(model, ["default", "other"])
        )
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------- strict loads


def _without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not all(part in k for part in parts)}


@pytest.mark.parametrize(
    "parts",
    [("lora_A__one", "fc"), ("lora_B__one",), ("fc", "__one"), ("head", "__one"), ("A__two",)],
    ids=str,
)
def test_half_an_adapter_does_not_load_strictly(parts: tuple[str, ...]) -> None:
    model = Net()
    li.inject(model, {**RANK2, "targets": ["fc", "embed"], "train": ["head"]}, "one")
    li.inject(model, {**RANK2, "targets": ["fc"]}, "two")
    state = model.state_dict()
    model.load_state_dict(state, strict=True)
    half = _without(state, *parts)
    assert len(half) < len(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(half, strict=True)
    missing = model.load_state_dict(half, strict=False).missing_keys
    assert set(missing) == set(state) - set(half)
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("into", ["a part of the injected root", "the parent of it"])
def test_half_an_adapter_does_not_load_strictly_above_or_below_its_root(into: str) -> None:
    part = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parent = nn.Sequential(part)
    loaded, root = (part, parent) if into.startswith("a part") else (parent, part)
    plain = loaded.state_dict()
    li.inject(root, {"rank": 1, "targets": [r"\d"]})
    loaded.load_state_dict(plain, strict=True)
    loaded.load_state_dict(loaded.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_state_dict(_without(loaded.state_dict(), "0.lora"), strict=True)


def test_one_whole_adapter_of_two_loads_strictly() -> None:
    model = Net()
    li.inject(model, {**RANK2, "targets": ["fc", "embed"]}, "one")
    li.inject(model, {**RANK2, "targets": ["fc"]}, "two")
    state = model.state_dict()
    model.load_state_dict(_without(state, "__two"), strict=True)
    model.load_state_dict(_without(state, "__one"), strict=True)
    model.load_state_dict(_without(state, "lora"), strict=True)


@pytest.mark.parametrize("key", ["fc.weight", "head.bias", "norm.weight"])
def test_half_a_base_does_not_load_strictly(key: str) -> None:
    model = Net()
    state = model.state_dict()
    del state[key]
    li.inject(model, {**RANK2, "targets": ["fc"]})
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        model.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "fc.lora_A__other": torch.ones(2)})


def test_a_live_state_dict_holds_base_and_adapters() -> None:
    model = Net()
    plain = set(model.state_dict())
    fill(li.inject(model, {**RANK2, "targets": ["fc"], "train": ["head"]}))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(state) > plain
    assert set(state) - plain == {
        "fc.lora_A__default",
        "fc.lora_B__default",
        "head.weight__lora_T__default",
        "head.bias__lora_T__default",
        "fc._lora_forms",
        "head._lora_forms",
    }
    wanted = model(IDS)
    fill(model)
    model.load_state_dict(state)
    assert same_bits(model(IDS), wanted)


# ----------------------------------------------------------------------------------------- the root


# ----------------------------------------------------------------------------------- what is listed


def test_adapter_parameters_and_groups() -> None:
    model = Net()
    li.inject(model, {**RANK2, "targets": ["fc", "embed"], "train": ["head"]}, "sql")
    low_rank = ["embed.lora_A", "embed.lora_B", "fc.lora_A", "fc.lora_B"]
    assert list(li.adapter_parameters(model)) == [*low_rank, "head.weight", "head.bias"]
    li.inject(model, {**RANK2, "targets": ["fc"]}, "style")
    assert {"sql:fc.lora_A", "style:fc.lora_A"} <= set(li.adapter_parameters(model))
    li.train_only(model, "sql")
    groups = li.parameter_groups(model, lr=0.1, b_lr_ratio=16)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("lora_A", 0.1, 2),
        ("lora_B", 1.6, 2),
        ("lora_T", 0.1, 2),
    ]
    grouped = {id(p) for g in groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW(groups)
    li.train_only(model, ["sql", "style"])
    by_adapter = li.parameter_groups(model, {"sql": 0.1, "style": 0.2}, b_lr_ratio=4)
    assert [(g["name"], g["lr"], len(g["params"])) for g in by_adapter] == [
        ("sql:lora_A", 0.1, 2),
        ("sql:lora_B", 0.4, 2),
        ("sql:lora_T", 0.1, 2),
        ("style:lora_A", 0.2, 1),
        ("style:lora_B", 0.8, 1),
    ]
    for rates in ({"sql": 0.1}, {"sql": 0.1, "style": 0.2, "stile": 0.3}):
        with pytest.raises(li.StateError, match=r"the trainable adapters are \['sql', 'style'\]"):
            li.parameter_groups(model, rates)
    li.train_only(model, None)
    with pytest.raises(li.StateError, match="no adapter of the model is trainable"):
        li.parameter_groups(model, lr=0.1)


def test_summary_lists_the_adapters() -> None:
    model = Net()
    li.inject(model, {**RANK2, "targets": ["fc", {"match": "embed", "rank": 1}]}, "sql")
    li.inject(model, {"bias": "all"}, "bitfit")
    li.activate(model, {"sql": 0.25})
    lines = [line.split() for line in li.summary(model).splitlines()]
    assert lines[1][:2] == ["sql", "2"]
    assert lines[1][-3:] == ["x", "0.25", "no"]
    assert lines[2] == ["bitfit", "0", "-", "3", "15", "no", "yes"]
    n_all = sum(p.numel() for p in model.parameters())
    assert lines[3] == f"trainable: 15 of {n_all} parameters ({1500 / n_all:.4f} %)".split()


UNKNOWN = {
    "eject": lambda m: li.eject(m, "sqll"),
    "train_only": lambda m: li.train_only(m, "sqll"),
    "activate": lambda m: li.activate(m, "sqll"),
    "adapter_parameters of": lambda m: li.adapter_parameters(m, "sqll"),
    "adapter_state of": lambda m: li.adapter_state(m, "sqll"),
    "merge": lambda m: li.merge(m, name="sqll"),
}


@pytest.mark.parametrize("verb", UNKNOWN)
def test_unknown_adapters_are_named_with_the_nearest(verb: str) -> None:
    model = li.inject(Net(), {**RANK2, "targets": ["fc"]}, "sql")
    before = snapshot(model)
    with pytest.raises(li.StateError) as caught:
        UNKNOWN[verb](model)
    words = f"{verb} 'sqll': the model's adapters are: 'sql'. Did you mean 'sql'?"
    assert str(caught.value) == words
    assert snapshot(model) == before


MERGED = {
    "adding adapter 'x'": lambda m: li.inject(m, {**RANK2, "targets": ["fc"]}, "x"),
    "activate": lambda m: li.activate(m, "sql"),
    "disabled": lambda m: li.disabled(m).__enter__(),
    "routed": lambda m: li.routed(m, ["sql"]).__enter__(),
    "train_only": lambda m: li.train_only(m, "sql"),
    "ejecting 'sql'": lambda m: li.eject(m, "sql"),
    "merge": lambda m: li.merge(m),
    "unreached": lambda m: li.unreached(m, lambda: None),
}


@pytest.mark.parametrize("asked", MERGED)
def test_a_merged_model_refuses_what_would_double_or_hide_the_delta(asked: str) -> None:
    model = li.inject(Net(), {**RANK2, "targets": ["fc"]}, "sql")
    fill(model, "sql")
    li.merge(model)
    before, wanted = snapshot(model), model(IDS)
    with pytest.raises(li.StateError) as caught:
        MERGED[asked](model)
    words = f"{asked}: 'sql' is merged into the weights. Call unmerge(model) first."
    assert str(caught.value) == words
    assert snapshot(model) == before
    assert same_bits(model(IDS), wanted)


def test_unmerge_refuses_what_is_not_merged() -> None:
    model = li.inject(Net(), {**RANK2, "targets": ["fc"]})
    with pytest.raises(li.StateError, match="unmerge: nothing is merged"):
        li.unmerge(model)
    for verb in (li.merge, li.unmerge):
        with pytest.raises(li.StateError, match="this module has no adapters"):
            verb(model.norm)
    parts = nn.ModuleList([copy.deepcopy(model), model])
    with pytest.raises(li.StateError, match="parts of this module were injected"):
        li.merge(parts)


def test_a_weight_that_is_unpacked_by_the_first_forward_is_refused_until_then(monkeypatch) -> None:
    """As compressed-tensors leaves a linear layer that it has compressed."""
    loaded(monkeypatch, "compressed_tensors.quantization")
    layer = nn.Linear(8, 8)
    layer.quantization_scheme = object()
    layer.weight_packed = nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)
    weight = layer.weight
    del layer.weight
    net = nn.Sequential(layer)
    with pytest.raises(li.LayerError, match=r"'0'.*unpacks its weight.*Run the model once"):
        li.inject(net, {"rank": 2, "targets": ["0"]})
    layer.weight = weight
    li.inject(net, {"rank": 2, "targets": ["0"]})


def test_packed_expert_stacks_are_refused() -> None:
    """As transformers holds GPT-OSS in MXFP4: two values to a byte, for kernels on GPUs."""
    net = nn.Module()
    net.experts = nn.Parameter(torch.zeros(2, 6, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(li.LayerError, match=r"'experts'.*quantized"):
        li.inject(net, {"rank": 2, "targets": [{"match": "experts", "layout": "out_in"}]})

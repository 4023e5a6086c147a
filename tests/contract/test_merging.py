"""Merging: what is written, what the report says, what is refused, what comes back."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits, snapshot
from helpers.models import Tied
from helpers.refusals import refused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_inject as li
from contract.kinds import KINDS, Host, conv1d, dense_weight, host, injected

RANK2 = {"rank": 2, "alpha": 3}
SIXTEEN = [torch.bfloat16, torch.float16]


def delta_of(relative: float, dtype: torch.dtype) -> tuple[Host, Tensor]:
    """A host whose layer has a delta of the given size relative to W, and that delta."""
    model = Host(nn.Linear(64, 64, bias=False)).to(dtype)
    fill(li.inject(model, {"rank": 4, "alpha": 4, "targets": ["layer"]}))
    A, B = li.adapter_parameters(model).values()
    with torch.no_grad():
        size = (B.double() @ A.double()).norm() / model.layer._parameters["weight"].double().norm()
        B.mul_(relative / float(size))
    return model, (B.double() @ A.double()).detach()


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 0.5])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_the_report_says_what_rounding_left(dtype: torch.dtype, relative: float) -> None:
    model, D = delta_of(relative, dtype)
    W = model.layer._parameters["weight"].detach().double()
    report = li.merge(model)
    moved = model.layer._parameters["weight"].detach().double() - W
    site = report.tensors["layer.weight"]
    # W + D is formed in float32, which costs D a few 1e-8 of W.
    limit = 1e-8 / relative
    assert site.kept == pytest.approx(float((moved * D).sum() / (D * D).sum()), rel=1e-4, abs=limit)
    assert site.error == pytest.approx(float((moved - D).norm() / D.norm()), rel=1e-3, abs=1e-6)
    assert site.relative == pytest.approx(relative, rel=1e-4)
    assert (report.adapters, report.n_tensors) == ((("default", 1.0),), 1)
    assert report.min_kept == site.kept
    assert "layer.weight" in str(report)


class Products(TorchDispatchMode):
    """Counts products of matrices, and what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.n = self.n_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        self.n += name in {"mm", "addmm", "bmm", "baddbmm"}
        self.n_waits += name in {"_local_scalar_dense", "nonzero"}
        return func(*args, **(kwargs or {}))


def test_a_merge_forms_each_update_once_in_every_dtype() -> None:
    """Also where the dtype could overflow, of which the merged weight itself tells."""
    waits = {}
    for dtype in (torch.float32, *SIXTEEN):
        model, _ = delta_of(0.5, dtype)
        with Products() as products:
            li.merge(model)
        assert products.n == 1, dtype
        waits[dtype] = products.n_waits
    assert waits[torch.float16] == waits[torch.bfloat16]


def test_what_has_no_effect_is_named_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    li.inject(model, {"rank": 2, "alpha": 2, "targets": [r"\d"]})
    before = snapshot(model)
    report = li.merge(model, min_kept=1.0)
    assert "every delta at 2 of 2 tensors, such as '0.weight' is 0" in report.warning
    assert report.tensors["0.weight"].error == 0.0
    assert snapshot(li.unmerge(model)) == before
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.fill_(1e-8)
    report = li.merge(model)
    assert report.inert == ("0.weight", "1.weight")
    assert "0.0000 of every delta at 2 of 2 tensors, such as '0.weight'" in report.warning


@pytest.mark.parametrize("undo", [True, False])
def test_min_kept_is_checked_before_any_change(undo: bool) -> None:
    model, _ = delta_of(1e-3, torch.bfloat16)
    before = snapshot(model)
    with refused(li.LayerError, "min_kept=0.999", "layer.weight"):
        li.merge(model, undo=undo, min_kept=0.999)
    assert snapshot(model) == before
    assert li.merge(model, undo=undo, min_kept=0.2).min_kept > 0.2


# ----------------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_each_row_of_a_large_weight_is_rounded_once(dtype: torch.dtype, turned: bool) -> None:
    """However many rows are taken at a time."""
    model: Any = nn.Sequential(conv1d(700, 900) if turned else nn.Linear(900, 700)).to(dtype)
    fill(li.inject(model, {**RANK2, "targets": ["0"]}))
    W = model[0].get_parameter("weight").detach().double()
    A, B = (p.detach().double() for p in li.adapter_parameters(model).values())
    delta = 1.5 * B @ A
    exact = W + (delta.t() if turned else delta)
    report = li.merge(model)
    merged = model[0].get_parameter("weight").detach().double()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
    assert ((merged - exact).abs() <= bound).all()
    left = merged - W
    kept = float((left * (exact - W)).sum() / (exact - W).square().sum())
    assert report.tensors["0.weight"].kept == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_mix_is_rounded_once(dtype: torch.dtype) -> None:
    kind, mix = KINDS["linear"], {"a": 0.7, "b": -1.3, "c": 0.1}
    model = host(kind, dtype)
    exact = model.layer.weight.detach().double()
    for name, weight in mix.items():
        fill(li.inject(model, kind.config, name), name)
        A, B = (p.detach().double() for p in li.adapter_parameters(model, name).values())
        exact = dense_weight(kind, exact, {"A": A, "B": B}, 1.5 * weight)
    report = li.merge(model, name=mix)
    assert dict(report.adapters) == mix
    off = (model.layer.weight.detach().double() - exact).abs()
    half = torch.finfo(dtype).eps / 2 if torch.finfo(dtype).bits == 16 else 0.0
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (off <= half * exact.abs() + 8 * wide * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_trained_copies_are_rounded_and_reported(dtype: torch.dtype) -> None:
    model = fill(li.inject(Host(nn.Linear(5, 6)).to(dtype), {"train": ["layer"]}))
    copies = {n: t.detach().clone() for n, t in li.adapter_parameters(model).items()}
    assert set(li.merge(model).tensors) == {"layer.weight", "layer.bias"}
    for name, copied in copies.items():
        assert same_bits(dict(model.named_parameters())[name], copied.to(dtype))


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    return fill(li.inject(model, {**RANK2, "targets": [r"\d"]}))


def test_unmerge_follows_layers_and_not_their_names() -> None:
    model = two_layers()
    before = snapshot(model)
    li.merge(model)
    model[0], model[1] = model[1], model[0]
    li.unmerge(model)
    model[0], model[1] = model[1], model[0]
    assert snapshot(model) == before


GONE: dict[str, Callable[[Any], Any]] = {
    "another weight": lambda m: m[1]._parameters.update(weight=nn.Parameter(torch.ones(5, 5))),
    "no layer": lambda m: setattr(m, "1", nn.Identity()),
    "another shape": lambda m: setattr(m[1].weight, "data", torch.ones(3, 5)),
}


@pytest.mark.parametrize("gone", GONE)
def test_unmerge_refuses_what_was_replaced_before_any_change(gone: str) -> None:
    model = two_layers()
    li.merge(model)
    GONE[gone](model)
    with refused(li.StateError, "'1", model=model):
        li.unmerge(model)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("key", ["embed.weight", "head.weight", "fc.bias", "fc.weight"])
def test_unmerge_does_not_drop_a_change_of_a_merged_weight_without_a_word(key, dtype) -> None:
    """Whether it was folded into, untied first, or replaced by a trained copy."""
    model = Tied()
    model.fc = nn.Linear(5, 7)
    config = {**RANK2, "targets": ["head", "embed", "fc"], "bias": "adapted"}
    fill(li.inject(model.to(dtype), config))
    unmerged = snapshot(model)
    li.merge(model)
    with torch.no_grad():
        dict(model.named_parameters(remove_duplicate=False))[key].view(-1)[-1:] += 1
    with refused(li.StateError, f"'{key}'", "eject", model=model):
        li.unmerge(model)
    li.unmerge(model, discard=True)
    assert snapshot(model) == unmerged


def test_weights_of_inference_mode_are_merged_within_it_and_refused_outside() -> None:
    with torch.inference_mode():
        model = Host(nn.Linear(5, 6))
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    with refused(li.LayerError, "layer.weight", "torch.inference_mode()"):
        li.merge(model)
    x = torch.randn(2, 5)
    with torch.inference_mode():
        wanted, W = model(x), model.layer.weight.clone()
        li.merge(model)
        assert error(model(x), wanted) < 1e-5
        li.unmerge(model)
        assert same_bits(model.layer.weight, W)


def test_what_is_merged_within_inference_mode_is_a_weight_as_any_other_outside() -> None:
    model = fill(li.inject(Host(nn.Linear(5, 6)), {**RANK2, "targets": ["layer"]}))
    x = torch.randn(2, 5, requires_grad=True)
    wanted = model(x)
    with torch.inference_mode():
        li.merge(model)
    assert error(model(x), wanted) < 1e-5
    model(x).sum().backward()
    assert same_bits(li.unmerge(model)(x), wanted)


def test_memory_that_others_read_keeps_what_it_holds_through_merge_and_unmerge() -> None:
    """Another process, a view or a captured graph, which would add its adapter to merged values."""
    model = injected(KINDS["linear"])
    x = torch.ones(1, 5)
    wanted = model(x)
    model.share_memory()
    shared = model.layer._parameters["weight"].detach()
    before = shared.clone()
    li.merge(model)
    torch.testing.assert_close(model(x), wanted)
    assert same_bits(shared, before)
    merged = model.layer._parameters["weight"].detach()
    after = merged.clone()
    li.unmerge(model)
    assert same_bits(merged, after)
    assert same_bits(model(x), wanted)


def test_a_weight_of_other_strides_is_merged_and_restored() -> None:
    model = Host(nn.Linear(5, 6))
    model.layer.weight = nn.Parameter(torch.randn(5, 6).t())
    fill(li.inject(model, {**RANK2, "targets": ["layer"]}))
    x = torch.randn(2, 5)
    wanted, before = model(x), snapshot(model)
    li.merge(model)
    assert error(model(x), wanted) < TOLERANCE[torch.float32]
    assert snapshot(li.unmerge(model)) == before


@pytest.mark.parametrize("through", ["the root", "a part of it", "a parent", "another's", "a copy"])
def test_a_checkpoint_is_refused_where_a_layer_is_merged(through: str) -> None:
    """Also where no merge has seen what holds it; modules before it are written, as by torch."""
    inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))  # of which the first carries nothing
    root = nn.Sequential(nn.Linear(5, 5), inner)
    parent = nn.Sequential(nn.Linear(5, 5), root)
    fill(li.inject(root, {**RANK2, "targets": [r"1\.1"]}))
    li.merge(root)
    loading = {
        "the root": root,
        "a part of it": inner,
        "a parent": parent,
        "another's": nn.Sequential(nn.Linear(5, 5), inner[1]),
        "a copy": pickle.loads(pickle.dumps(parent)),
    }[through]
    merged = {key: t.detach().clone() for key, t in inner[1].named_parameters()}
    other = {key: torch.randn_like(t) for key, t in loading.named_parameters()}
    with refused(li.StateError, "unmerge(model"):
        loading.load_state_dict(other)
    assert all(same_bits(t, merged[key]) for key, t in inner[1].named_parameters())
    li.unmerge(loading[1] if through == "a copy" else root)
    other = loading.state_dict() | other  # and what it means
    loading.load_state_dict(other)
    assert all(same_bits(t, other[key]) for key, t in loading.state_dict().items())


def test_unmerge_follows_a_cast_and_a_change_of_strides() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3))
    W = model[0].weight.detach().clone()
    li.merge(fill(li.inject(model, {**RANK2, "targets": ["0"]})))
    li.unmerge(model.to(torch.bfloat16, memory_format=torch.channels_last))
    assert same_bits(model[0]._parameters["weight"], W.bfloat16())


def test_without_undo_the_errors_name_the_way_back() -> None:
    model = injected(KINDS["linear"])
    x = torch.randn(2, 5)
    wanted, base = model(x), copy.deepcopy(li.eject(copy.deepcopy(model)).state_dict())
    adapter = copy.deepcopy(li.adapter_state(model))
    li.merge(model, undo=False)
    before = snapshot(model)
    with refused(li.StateError, "undo=False)"):
        li.unmerge(model)
    with refused(li.StateError, "load_state_dict", "eject(model"):
        model.load_state_dict(base)
    assert snapshot(model) == before
    assert error(model(x), wanted) < TOLERANCE[torch.float32]
    li.eject(model).load_state_dict(base)
    assert same_bits(li.install(model, adapter)(x), wanted)


# ---------------------------------------------------------------------------------- what is refused


class Code(nn.Parameter):
    """A quantized weight of a class that nobody knows."""


def with_weight(weight: Tensor, cls: Any = nn.Parameter) -> Callable[[Host], Any]:
    """Merging where the layer has got another weight since inject."""

    def run(model: Host) -> Any:
        model.layer._parameters["weight"] = cls(weight, requires_grad=False)
        return li.merge(model)

    return run


REFUSED: dict[str, tuple[Callable[[Host], Any], type[li.LoraInjectError], str]] = {
    "none active": (lambda m: li.merge(li.activate(m, None)), li.StateError, "active"),
    "meta": (lambda m: li.merge(m.to("meta")), li.LayerError, "meta"),
    "int8": (with_weight(torch.ones(6, 5, dtype=torch.int8)), li.LayerError, "torch.int8"),
    "an unknown class": (with_weight(torch.randn(6, 5), Code), li.LayerError, "Code"),
    "a weight of nan": (
        lambda m: li.merge(m, name={"default": math.nan}), li.StateError, "nan",
    ),
    "nan kept": (lambda m: li.merge(m, min_kept=math.nan), li.LayerError, "nan"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_merge_refuses(what: str) -> None:
    run, error_class, named = REFUSED[what]
    with refused(error_class, named):
        run(injected(KINDS["linear"]))


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_a_base_that_is_not_finite_is_refused_and_left_alone(dtype, bad, undo) -> None:
    """With `undo` it comes to light only while weights are written, and they are put back."""
    model = two_layers().to(dtype)
    model[1].get_parameter("weight").data[3, 2] = bad
    with refused(li.LayerError, "1.weight", model=model):
        li.merge(model, undo=undo)


class FailsAt(TorchDispatchMode):
    """Counts operations, and raises at one of them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.count, self.at = 0, at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise ZeroDivisionError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_of_which_any_operation_fails_puts_everything_back(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    before = snapshot(model)
    with FailsAt() as counting:
        li.merge(copy.deepcopy(model))
    for at in range(1, counting.count + 1):
        try:
            with FailsAt(at):
                li.merge(model)
        except ZeroDivisionError:
            assert snapshot(model) == before, at
        else:  # what failed was not needed, or came after all was done
            assert snapshot(li.unmerge(model)) == before, at
    li.merge(model)
    assert snapshot(li.unmerge(model)) == before

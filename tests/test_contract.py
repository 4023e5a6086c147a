"""The invariants of the design, for every kind of layer and every dtype.

Everything is compared with a dense float64 layer that the test builds itself, or bit for
bit with what was there before.
"""

import copy
from typing import Any

import pytest
import torch
from conftest import (
    ALPHA,
    DTYPES,
    KINDS,
    RANK,
    TOLERANCE,
    Host,
    Kind,
    dense_output,
    dense_weight,
    error,
    fill,
    host,
    injected,
    same_bits,
    snapshot,
)
from helpers.models import Several
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers import kinds as table

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def factors(model: nn.Module, kind: Kind) -> tuple[nn.Parameter, nn.Parameter]:
    parameters = li.adapter_parameters(model)
    return parameters[f"{kind.site}.lora_A"], parameters[f"{kind.site}.lora_B"]


def test_every_row_of_the_table_is_held_to_the_contract() -> None:
    covered = {li.plan(host(kind), kind.config).sites[0].kind for kind in KINDS.values()}
    assert covered == {row.kind for row in table.KINDS} | {"parameter"}


@every_kind
def test_a_site_is_as_stated_and_its_parameters_are_a_and_b(kind: Kind) -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert {t.dtype for t in factors(injected(kind, dtype), kind)} == {wide}
    model = injected(kind)
    A, B = factors(model, kind)
    (spec,) = li.adapters(model)["default"].sites.values()
    assert (spec.name, spec.update, spec.rank, spec.scale) == (kind.site, kind.update, RANK, 1.5)
    assert (spec.in_features, spec.out_features) == kind.sizes
    assert list(li.adapter_parameters(model)) == [f"{kind.site}.lora_A", f"{kind.site}.lora_B"]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(A), id(B)}
    assert li.adapters(model)["default"].n_parameters == A.numel() + B.numel()
    parts, experts = max(len(kind.spans), 1), kind.experts or 1
    width = sum(b - a for a, b in kind.spans) or kind.sizes[1]
    assert A.numel() == experts * parts * RANK * kind.sizes[0]
    assert B.numel() == experts * width * RANK
    assert li.adapter_state(model).sites[kind.site].scale == ALPHA / RANK


# 1. one truth


@every_dtype
@every_kind
def test_outputs_and_gradients_equal_the_dense_layers(kind: Kind, dtype: torch.dtype) -> None:
    plain = host(kind, dtype)
    model = fill(li.inject(copy.deepcopy(plain), kind.config))
    A, B = factors(model, kind)
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in kind.inputs(dtype)]
    wide = [t.detach().double().requires_grad_() for t in (A, B)]
    wide_inputs = [x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs]
    wanted = dense_output(kind, plain, *wide, wide_inputs)
    without = dense_output(kind, plain, wide[0], torch.zeros_like(wide[1]), wide_inputs)
    assert error(without, wanted) > 0.05, "the delta is too small to be seen"
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(*(x.detach() for x in inputs))
        assert y.dtype == dtype
        assert error(y, wanted) <= TOLERANCE[dtype]
    y = model(*inputs)
    assert error(y, wanted) <= TOLERANCE[dtype]
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g.double())
    for actual, due in zip((A, B, *inputs), (*wide, *wide_inputs), strict=True):
        if due.requires_grad:
            assert actual.grad.dtype == actual.dtype
            assert error(actual.grad, due.grad) <= TOLERANCE[dtype]
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)


# 2. zero start


@pytest.mark.parametrize("init", ["kaiming", "gaussian", {"normal": 0.3}], ids=str)
@every_dtype
@every_kind
def test_zero_start_is_the_plain_model_bit_for_bit(kind, dtype, init) -> None:
    plain = host(kind, dtype)
    model = li.inject(copy.deepcopy(plain), {**kind.config, "init": init})
    inputs = kind.inputs(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert same_bits(model(*inputs), copy.deepcopy(plain)(*inputs))
    A, B = factors(model, kind)
    zero, random = (A, B) if isinstance(model.layer, nn.Embedding) else (B, A)
    assert not zero.any()
    assert random.all()


# 3. base names do not move


@every_kind
def test_base_names_objects_and_order_stay(kind: Kind) -> None:
    model = host(kind)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    assert li.inject(model, kind.config) is model
    assert list(model.named_modules()) == list(modules.items())
    after = dict(model.named_parameters())
    assert [n for n in after if n in parameters] == list(parameters)
    assert all(after[n] is p for n, p in parameters.items())
    assert all(dict(model.named_buffers())[n] is b for n, b in buffers.items())
    assert [k for k in model.state_dict() if k in keys] == keys
    for name, module in modules.items():
        assert isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__
    assert len(after) == len(parameters) + 2
    # Whoever fetches a Parameter gets the raw one.
    assert model.get_parameter(kind.key) is parameters[kind.key]


@every_kind
def test_a_plain_base_checkpoint_loads_strictly_and_acts(kind: Kind) -> None:
    model, other = injected(kind), host(kind)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    A, B = factors(model, kind)
    model.load_state_dict(other.state_dict(), strict=True)
    inputs = kind.inputs(torch.float32)
    wanted = dense_output(kind, other, A.double(), B.double(), inputs)
    assert error(model(*inputs), wanted) <= TOLERANCE[torch.float32]


# 4. all or nothing


@pytest.mark.parametrize(
    ("config", "error_class"),
    [
        ({"rank": 2, "targets": ["fc", "nothing_like_it"]}, li.MatchError),
        ({"rank": 2, "targets": ["fc"], "expect": {"sites": 2}}, li.MatchError),
        ({"rank": 2, "targets": ["fc"], "train": ["hedd"]}, li.MatchError),
        ({"rank": 2, "targets": ["fc"], "train": ["fc"]}, li.MatchError),
        ({"rank": 2, "targets": ["conv"], "dropout": 0.1}, li.MatchError),
        ({"rank": 0, "targets": ["fc"]}, li.ConfigError),
    ],
    ids=lambda value: None,
)
def test_a_refused_inject_changes_nothing(config: Any, error_class: type[Exception]) -> None:
    model = Several()
    before = snapshot(model)
    with pytest.raises(error_class):
        li.inject(model, config)
    assert snapshot(model) == before
    assert li.adapters(model) == {}


# 5. exact undo


@every_dtype
@every_kind
def test_eject_is_exact(kind: Kind, dtype: torch.dtype) -> None:
    model = host(kind, dtype)
    model.layer.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    fill(li.inject(model, kind.config))
    model(*kind.inputs(dtype)).sum().backward()
    li.inject(model, kind.config, "second")
    if kind.formula is None:  # with max_norm the plain layer itself writes W
        with li.disabled(model):
            model(*kind.inputs(dtype))
    assert snapshot(model) != before
    li.eject(model, "default")
    assert li.eject(model) is model
    assert snapshot(model) == before


@pytest.mark.parametrize("undo", [True, False])
@every_dtype
@every_kind
def test_merged_equals_adapted(kind: Kind, dtype: torch.dtype, undo: bool) -> None:
    plain = host(kind, dtype)
    model = fill(li.inject(copy.deepcopy(plain), kind.config))
    A, B = (t.detach().double() for t in factors(model, kind))
    inputs = kind.inputs(dtype)
    wanted = dense_output(kind, plain, A, B, inputs)
    li.merge(model, undo=undo)
    W, Wm = (dict(m.named_parameters())[kind.key].detach() for m in (plain, model))
    exact = dense_weight(kind, W.double(), A, B)
    # Rounded once: half an eps, plus the rounding of sums of 2 terms in the wider dtype.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slack = 4 * wide * (W.double().abs() + (exact - W).abs())
    half = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    assert ((Wm.double() - exact).abs() <= half * exact.abs() + slack).all()
    untouched = exact == W
    assert same_bits(Wm[untouched], W[untouched])
    assert error(copy.deepcopy(model)(*inputs), wanted) <= TOLERANCE[dtype]
    li.eject(model)
    assert error(copy.deepcopy(model)(*inputs), wanted) <= TOLERANCE[dtype]
    assert same_bits(dict(model.named_parameters())[kind.key], Wm)


@every_dtype
@every_kind
def test_unmerge_restores_every_bit(kind: Kind, dtype: torch.dtype) -> None:
    model = injected(kind, dtype)
    before, listed = snapshot(model), li.summary(model)
    li.merge(model)
    assert snapshot(model) != before
    assert li.unmerge(model) is model
    assert snapshot(model) == before
    assert li.summary(model) == listed


# 7. names from structure


class Odd(nn.Linear):
    """A base whose own names look like an adapter's."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.lora_A = nn.Parameter(torch.randn(2, 5))
        self.lora_A__default = nn.Parameter(torch.randn(2))
        self.lora_in = nn.Linear(2, 2)
        self.register_buffer("lora_B", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_A.sum() + self.lora_in(self.lora_A__default).sum()


def test_names_come_from_structure() -> None:
    model = Host(Odd())
    before, own = snapshot(model), {id(p) for p in model.parameters()}
    li.inject(model, {"rank": 2, "alpha": 3, "targets": ["layer"]}, "mine")
    ours = li.adapter_parameters(fill(model, "mine"), "mine")
    assert list(ours) == ["layer.lora_A", "layer.lora_B"]
    assert {id(p) for p in model.parameters()} - own == {id(p) for p in ours.values()}
    assert [id(p) for p in model.parameters() if p.requires_grad] == [*map(id, ours.values())]
    assert set(li.adapter_state(model, "mine").sites) == {"layer"}
    li.merge(model)
    li.unmerge(model)
    li.eject(model)
    assert snapshot(model) == before

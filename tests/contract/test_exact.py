"""What is exact for each kind: the start, the names, the undo, what a merge rounds, a refusal."""

import copy
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits, snapshot
from helpers.models import Several
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li
from contract.conditions import CONDITIONS
from contract.kinds import ALPHA, KINDS, RANK, Host, Kind, dense_weight, host, injected

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).split(".")[1])


def factors(model: nn.Module, kind: Kind) -> tuple[nn.Parameter, nn.Parameter]:
    parameters = li.adapter_parameters(model)
    return parameters[f"{kind.site}.lora_A"], parameters[f"{kind.site}.lora_B"]


def weight(model: nn.Module, kind: Kind) -> nn.Parameter:
    """The raw one, as an optimizer gets it."""
    return dict(model.named_parameters())[kind.key]


def test_the_table_holds_each_kind_that_a_plan_can_name() -> None:
    named = {li.plan(host(kind), kind.config).sites[0].kind for kind in KINDS.values()}
    stock = {"linear", "conv1d", "embedding", "conv", "conv_transpose", "parameter"}
    assert named == stock


@every_kind
def test_a_site_is_as_stated_and_its_parameters_are_a_and_b(kind: Kind) -> None:
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
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert {t.dtype for t in factors(injected(kind, dtype), kind)} == {wide}
    cast = factors(injected(kind).to(torch.bfloat16), kind)
    assert {t.dtype for t in cast} == {torch.float32}


# Which dtype goes with which init proves nothing: all of both are met.
STARTS = dict(zip(TOLERANCE, ["kaiming", "gaussian", {"normal": 0.3}, "kaiming"], strict=True))


STARTED = [(name, "lora") for name in KINDS]
STARTED += [(name, "dora") for name in KINDS if name not in CONDITIONS["DoRA"].refused]


@pytest.mark.parametrize(("name", "variant"), STARTED)
def test_it_starts_as_the_plain_model_bit_for_bit(name: str, variant: str) -> None:
    kind = KINDS[name]
    for dtype, init in STARTS.items():
        plain, inputs = host(kind, dtype), kind.inputs(dtype)
        model = li.inject(copy.deepcopy(plain), {**kind.config, "init": init, "variant": variant})
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert same_bits(model(*inputs), plain(*inputs))
        A, B = factors(model, kind)
        zero, random = (A, B) if isinstance(model.layer, nn.Embedding) else (B, A)
        assert not zero.any()
        assert random.all()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@every_kind
def test_a_start_that_is_made_of_w_is_the_plain_model_but_for_rounding(
    kind: Kind, init: str
) -> None:
    plain, inputs = host(kind, torch.float64), kind.inputs(torch.float64)
    model = li.inject(copy.deepcopy(plain), {**kind.config, "init": init})
    assert all(factor.any() for factor in factors(model, kind))
    assert error(model(*inputs), plain(*inputs)) < TOLERANCE[torch.float64]


SLICED = [name for name, kind in KINDS.items() if kind.spans and kind.update == "forward"]


@pytest.mark.parametrize("name", SLICED)
def test_outputs_of_slices_that_are_not_adapted_keep_their_bits(name: str) -> None:
    kind = KINDS[name]
    for dtype in TOLERANCE:
        plain, (x,) = host(kind, dtype), kind.inputs(dtype)
        model = fill(li.inject(copy.deepcopy(plain), kind.config))
        others = torch.ones(kind.sizes[1], dtype=torch.bool)
        for start, stop in kind.spans:
            others[start:stop] = False
        assert same_bits(model(x)[..., others], plain(x)[..., others])


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
    # Whoever fetches a Parameter gets the raw one, and those of the adapter too.
    assert all(model.get_parameter(name) is p for name, p in after.items())


@every_kind
def test_a_plain_base_checkpoint_loads_strictly_and_acts(kind: Kind) -> None:
    model, other = injected(kind), host(kind)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    state = li.install(copy.deepcopy(other), li.adapter_state(model), base="any")
    model.load_state_dict(other.state_dict(), strict=True)
    inputs = kind.inputs(torch.float32)
    assert same_bits(model(*inputs), state(*inputs))
    assert same_bits(weight(model, kind), weight(other, kind))


@every_kind
def test_eject_is_exact(kind: Kind) -> None:
    dtype = torch.bfloat16
    model = host(kind, dtype)
    model.layer.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    fill(li.inject(model, kind.config))
    model(*kind.inputs(dtype)).sum().backward()
    li.inject(model, kind.config, "second")
    with li.disabled(model):
        model(*kind.inputs(dtype))
    assert snapshot(model) != before
    li.eject(model, "default")
    assert li.eject(model) is model
    assert snapshot(model) == before


@every_dtype
@every_kind
def test_a_read_and_a_merge_round_once_and_unmerge_restores_every_bit(
    kind: Kind, dtype: torch.dtype
) -> None:
    model = injected(kind, dtype)
    before, listed = snapshot(model), li.summary(model)
    W, tensors = weight(model, kind).detach().clone(), li.adapter_state(model).sites[kind.site]
    exact = dense_weight(kind, W.double(), {r: t.double() for r, t in tensors.tensors.items()})
    # Half an eps of the weight's dtype, plus the rounding of sums of 2 terms in the wider one.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slack = 4 * wide * (W.double().abs() + (exact - W).abs())
    half = torch.finfo(dtype).eps / 2 if torch.finfo(dtype).bits == 16 else 0.0
    owner, _, key = kind.key.rpartition(".")
    read = getattr(model.get_submodule(owner), key).detach().clone()
    assert (read.shape, read.dtype) == (W.shape, dtype)
    assert ((read.double() - exact).abs() <= half * exact.abs() + slack).all()
    for undo in (True, False):
        li.merge(model, undo=undo)
        merged = weight(model, kind).detach()
        assert ((merged.double() - exact).abs() <= half * exact.abs() + slack).all()
        assert same_bits(merged[exact == W], W[exact == W])
        if undo:
            assert snapshot(model) != before
            assert li.unmerge(model) is model
            assert snapshot(model) == before
            assert li.summary(model) == listed
    li.eject(model)
    assert same_bits(weight(model, kind), merged)


REFUSED: list[tuple[Any, type[li.LoraInjectError], tuple[str, ...]]] = [
    ({"targets": ["fc", "nothing_like_it"]}, li.MatchError, ("nothing_like_it",)),
    ({"targets": ["fc"], "expect": {"sites": 2}}, li.MatchError, ("expect", "2")),
    ({"targets": ["fc"], "train": ["hedd"]}, li.MatchError, ("hedd", "head")),
    ({"targets": ["fc"], "train": ["fc"]}, li.MatchError, ("fc",)),
    ({"targets": ["conv"], "dropout": 0.1}, li.MatchError, ("conv", "dropout")),
    ({"targets": ["fc"], "rank": 0}, li.ConfigError, ("rank",)),
]


@pytest.mark.parametrize(("config", "kind", "names"), REFUSED, ids=lambda value: None)
def test_a_refused_inject_changes_nothing(config: Any, kind: Any, names: tuple[str, ...]) -> None:
    model = Several()
    with refused(kind, *names, model=model):
        li.inject(model, {"rank": 2, **config})
    assert li.adapters(model) == {}


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

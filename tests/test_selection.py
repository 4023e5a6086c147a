"""Choosing adapters: activate, disabled, routed, and all of them under activation checkpointing.

A run with checkpoints must give the gradients of the same run without. The scenarios
change the selection in every way between a forward and its backward.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import KINDS, TOLERANCE, conv1d, error, fill, injected, same_bits, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from lora_inject.core.layers import survey

Grads = dict[str, Tensor | None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.qkv = conv1d(6, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.qkv(torch.tanh(self.fc(x)))))


class Net(nn.Module):
    """Blocks that may be checkpointed; `mode` is None, or the value of `use_reentrant`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.mode: bool | None = None
        self.inside: Callable[[Net], Any] | None = None
        self.nested: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = self.call(self.run, block, x, mode=self.mode)
        return x

    def run(self, block: Block, x: Tensor) -> Tensor:
        """What is checkpointed: the block, and where asked a context or a checkpoint inside."""
        x = self.call(block, x, mode=self.nested)
        if self.inside is not None:
            with self.inside(self):
                x = block(x)
            x = block(x)
        return x

    def call(self, function: Callable[..., Tensor], *args: Any, mode: bool | None) -> Tensor:
        if self.mode is None or mode is None or not self.training:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=mode)


SLICED = {"match": "qkv", "slices": ["q", "k", "v"], "adapt": ["q", "v"], "rank": 1}


def net(dropout: float = 0.0) -> Net:
    """Three adapters, a and b of equal ranks, c of another."""
    model = Net().double()
    for name, rank in (("a", 2), ("b", 2), ("c", 3)):
        config = {"rank": rank, "alpha": 2, "dropout": dropout, "targets": ["fc", SLICED, "out"]}
        fill(li.inject(model, config, name), name)
    li.train_only(model, ["a", "b", "c"])
    return li.activate(model, "a")


def gradients(model: nn.Module, *inputs: Tensor) -> Grads:
    found: Grads = {key: p.grad for key, p in li.adapter_parameters(model).items()}
    return found | {f"x{i}": x.grad for i, x in enumerate(inputs)}


def assert_same(found: Grads, wanted: Grads) -> None:
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        other = found[key]
        if gradient is None:
            assert other is None, f"{key} got a gradient"
        else:
            assert other is not None, f"{key} got no gradient"
            assert error(other, gradient) < 1e-12, key


# ------------------------------------------------------------------------------------ the scenarios
# Each runs forwards and backwards of a model and may change the selection in between.


def backward(y: Tensor) -> None:
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()


Scenario = Callable[[Net, Tensor], None]


def selecting(before: Any, *after: Any) -> Scenario:
    """A forward under one selection, and a backward after others."""

    def scenario(model: Net, x: Tensor) -> None:
        li.activate(model, before)
        y = model(x)
        for which in after:
            li.activate(model, which)
        backward(y)

    return scenario


def routed(*rows: str | None) -> Callable[[Net], Any]:
    return lambda model: li.routed(model, rows)


def within(outer: Callable[[Net], Any], inner: Callable[[Net], Any] = nullcontext) -> Scenario:
    """A forward in one context and its backward in another, or after it."""

    def scenario(model: Net, x: Tensor) -> None:
        with outer(model):
            y = model(x)
        with inner(model):
            backward(y)

    return scenario


def routed_in_disabled(model: Net, x: Tensor) -> None:
    with li.disabled(model), li.routed(model, ["b", "b", None, "c"]):
        y = model(x)
    li.activate(model, "b")
    backward(y)


def two_forwards_one_backward(model: Net, x: Tensor) -> None:
    y = model(x)
    li.activate(model, "b")
    z = model(x)
    li.activate(model, "c")
    backward(y + 2 * z)


def late_backward_of_the_first(model: Net, x: Tensor) -> None:
    y = model(x)
    li.activate(model, "b")
    z = model(x)
    backward(z)
    backward(y)


def evaluation_in_between(model: Net, x: Tensor) -> None:
    y = model(x)
    model.eval()
    with torch.no_grad(), li.disabled(model):
        model(x)
    with torch.no_grad(), li.routed(model, ["b"] * 4):
        model(x)
    model.train()
    backward(y)


def an_exception_in_between(model: Net, x: Tensor) -> None:
    y = model(x)

    def fail() -> None:
        with li.routed(model, ["b"] * 4):
            model(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    backward(y)


def backward_twice(model: Net, x: Tensor) -> None:
    y = model(x)
    y.sum().backward(retain_graph=True)
    li.activate(model, "b")
    y.sum().backward()


def forward_after_backward(model: Net, x: Tensor) -> None:
    y = model(x)
    li.activate(model, "b")
    backward(y)
    z = model(x)
    li.activate(model, "a")
    backward(z)


def an_adapter_more_in_between(model: Net, x: Tensor) -> None:
    y = model(x)
    li.inject(model, {"rank": 1, "targets": ["fc"], "bias": "adapted"}, "d")
    backward(y)


def another_ejected_in_between(model: Net, x: Tensor) -> None:
    y = model(x)
    li.eject(model, "c")
    li.activate(model, "b")
    backward(y)


SCENARIOS: dict[str, Scenario] = {
    "nothing changes": selecting("a"),
    "activate another": selecting("a", "b"),
    "activate from none": selecting(None, "a"),
    "change the mix": selecting({"a": 0.7, "b": -0.2}, {"b": 0.7, "a": -0.2}),
    "there and back": selecting("a", "b", None, "a"),
    "backward in disabled": within(nullcontext, li.disabled),
    "forward in disabled": within(li.disabled),
    "two forwards, one backward": two_forwards_one_backward,
    "late backward of the first": late_backward_of_the_first,
    "backward twice": backward_twice,
    "forward after backward": forward_after_backward,
    "another ejected in between": another_ejected_in_between,
}
ROUTES: dict[str, Scenario] = {
    "forward in routed": within(routed("a", None, "b", "c")),
    "backward in other routes": within(routed("a", "b", "b", "a"), routed("b", "a", "a", "b")),
    "routed in disabled": routed_in_disabled,
    "evaluation in between": evaluation_in_between,
    "an exception in between": an_exception_in_between,
}
# It freezes the others before their backward, and torch refuses that recomputation by itself.
FREEZES: dict[str, Scenario] = {"an adapter more in between": an_adapter_more_in_between}


def run(scenario: Scenario, model: Net) -> Grads:
    x = torch.linspace(-1, 1, 4 * 3 * 4, dtype=torch.float64).view(4, 3, 4).requires_grad_()
    torch.manual_seed(1)
    scenario(model, x)
    return gradients(model, x)


def assert_recomputed(
    scenario: Scenario, plain: Net, mode: bool, nested: bool | None = None
) -> None:
    """Checkpoints must give the gradients of the same run without."""
    model = copy.deepcopy(plain)
    model.mode, model.nested = mode, nested
    assert_same(run(scenario, model), run(scenario, plain))


modes = pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])
inner_modes = pytest.mark.parametrize("nested", [True, False], ids=["reentrant", "non-reentrant"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@modes
@pytest.mark.parametrize("name", SCENARIOS | ROUTES | FREEZES)
def test_recomputation_runs_under_the_selection_of_its_forward(name, mode, dropout) -> None:
    assert_recomputed((SCENARIOS | ROUTES | FREEZES)[name], net(dropout), mode)


READ = {
    "weights": {"targets": [r"fc\.weight", r"out\.weight"]},
    "copies": {"targets": ["qkv"], "train": ["out"], "bias": "all"},
}


@modes
@pytest.mark.parametrize("update", READ)
@pytest.mark.parametrize("name", SCENARIOS)
def test_reads_are_recomputed_under_the_selection_of_their_forward(name, update, mode) -> None:
    """Weight updates and trained copies, which read where others add to the output."""
    plain = Net().double()
    for adapter in "abc":
        config = {"rank": 2, "alpha": 2, **READ[update]}
        fill(li.inject(plain, config, adapter), adapter)
    li.train_only(plain, ["a", "b", "c"])
    assert_recomputed(SCENARIOS[name], li.activate(plain, "a"), mode)


# ------------------------------------------------------------- contexts inside what is checkpointed


NESTED = ["activate another", "two forwards, one backward", "backward twice", "forward in routed"]
INSIDE = {"disabled": li.disabled, "routed": routed("b", "a", None, "c")}


@modes
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("change", [None, "b"])
def test_contexts_inside_the_checkpointed_function(inside, mode, change) -> None:
    plain = net()
    plain.inside = INSIDE[inside]
    assert_recomputed(selecting("a", change), plain, mode)


@inner_modes
@modes
@pytest.mark.parametrize("name", NESTED)
def test_nested_checkpoints(name: str, mode: bool, nested: bool) -> None:
    assert_recomputed((SCENARIOS | ROUTES)[name], net(), mode, nested)


@inner_modes
@modes
def test_a_checkpoint_inside_a_context_inside_a_checkpoint(mode: bool, nested: bool) -> None:
    def scenario(model: Net, x: Tensor) -> None:
        def inner(x: Tensor) -> Tensor:
            with li.routed(model, ["b", "a", None, "c"]):
                return model.call(model.first, x, mode=nested) + x

        y = model.call(inner, x, mode=mode)
        li.activate(model, "c")
        backward(y)

    assert_recomputed(scenario, net(), mode=True)


def test_a_checkpoint_under_hooks_on_saved_tensors() -> None:
    def scenario(model: Net, x: Tensor) -> None:
        def inner(x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model.first(x)

        y = model.call(inner, x, mode=False)
        li.activate(model, "b")
        backward(y)

    assert_recomputed(scenario, net(), mode=False)


class _Foreign(torch.autograd.Function):
    """A checkpoint of somebody else's, as DeepSpeed and Megatron have them."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(x), g)
        return None, x.grad


@pytest.mark.parametrize("change", [False, True])
def test_a_foreign_checkpoint_is_right_or_refused(change: bool) -> None:
    def scenario(model: Net, x: Tensor) -> None:
        y = _Foreign.apply(model, x) if model.mode else model(x)
        if change:
            li.activate(model, "b")
        backward(y)

    plain = net()
    model = copy.deepcopy(plain)
    model.mode = model.training = True
    model.call = lambda f, *args, mode: f(*args)  # type: ignore[method-assign]
    if change:
        with pytest.raises(li.StateError, match="changed since the forward"):
            run(scenario, model)
    else:
        assert_same(run(scenario, model), run(scenario, plain))


VERBS: dict[str, Callable[[Net], Any]] = {
    "activate": lambda model: li.activate(model, "b"),
    "inject": lambda model: li.inject(model, {"rank": 1, "targets": ["fc"]}, "new"),
    "merge": li.merge,
    "eject": lambda model: li.eject(model, "a"),
}


@modes
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_inside_a_checkpointed_function_are_refused(verb: str, mode: bool) -> None:
    """What they change would not be undone for the recomputation."""
    model = net()
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    before, listed = snapshot(model), li.summary(model)

    def inside(x: Tensor) -> Tensor:
        VERBS[verb](model)
        return model.first(x)

    with pytest.raises(li.StateError, match="inside a checkpointed function"):
        backward(checkpoint(inside, x, use_reentrant=mode))
    assert snapshot(model) == before
    assert li.summary(model) == listed


def test_verbs_in_a_backward_are_refused() -> None:
    model = net()
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.register_hook(lambda _: li.activate(model, "b") and None)
    with pytest.raises(li.StateError, match="a backward pass"):
        y.sum().backward()
    assert li.adapters(model)["a"].active


@modes
@pytest.mark.parametrize("verb", [li.merge, lambda m: li.eject(m, "b")], ids=["merge", "eject"])
def test_a_merge_or_eject_between_forward_and_backward_is_refused(verb: Any, mode: bool) -> None:
    """Never silently doubled or lost."""
    model = net()
    model.mode = mode
    li.activate(model, {"a": 0.5, "b": 0.5})
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    y = model(x)
    verb(model)
    with pytest.raises((li.StateError, RuntimeError)):
        backward(y)
    assert all(g is None for g in gradients(model).values())


@modes
def test_values_that_were_swapped_since_the_forward_are_not_recomputed_with(mode: bool) -> None:
    model = net()
    model.mode = mode
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    other = li.adapter_state(model, "b")
    y = model(x)
    li.swap_adapter(model, other, "a")
    with pytest.raises(li.StateError, match="'a' got other values since its forward"):
        backward(y)
    y = model(x)
    li.swap_adapter(model, other, "b")
    backward(y)


# ----------------------------------------------------------------------------------------- activate


def test_activate_does_not_walk_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    li.activate(model, "a")
    walks: list[Any] = []
    real = survey._walk
    monkeypatch.setattr(survey, "_walk", lambda model: walks.append(model) or real(model))
    li.activate(model, "b")
    li.activate(model, {"a": 0.1, "b": 0.2})
    with li.disabled(model):
        pass
    assert walks == []
    li.eject(model, "c")
    assert walks


def test_no_adapter_is_the_base_bit_for_bit() -> None:
    model = net()
    plain = copy.deepcopy(model)
    li.eject(plain)
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    wanted = plain(x)
    adapted = model(x)
    with li.disabled(model):
        assert same_bits(model(x), wanted)
    assert same_bits(model(x), adapted)
    li.activate(model, None)
    assert same_bits(model(x), wanted)
    assert not same_bits(adapted, wanted)


def test_activate_on_a_parent_reaches_every_part_once() -> None:
    parts = nn.ModuleList([net(), net()])
    li.activate(parts, "b")
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    outputs = [part(x) for part in parts]
    for part, output in zip(parts, outputs, strict=True):
        li.activate(part, "a")
        assert not same_bits(part(x), output)
        li.activate(part, "b")
        assert same_bits(part(x), output)
    with li.disabled(parts):
        assert li.adapters(parts)["b"].active is False
        assert not same_bits(parts[1](x), outputs[1])
    assert same_bits(parts[1](x), outputs[1])
    li.activate(parts, None)
    assert not any(info.active for info in li.adapters(parts[0]).values())


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("aa", "activate 'aa': the model's adapters are: 'a', 'b', 'c'. Did you mean 'a'?"),
        ({"a": float("nan")}, "activate 'a': its weight is nan. Give a finite number."),
        ({"a": "1"}, "activate 'a': its weight is '1'. Give a finite number."),
        (["a"], "activate: it is a list. Give a name, a mapping of names to weights, or None."),
    ],
)
def test_activate_refuses(which: Any, words: str) -> None:
    model = net()
    with pytest.raises(li.StateError) as caught:
        li.activate(model, which)
    assert str(caught.value) == words
    assert li.adapters(model)["a"].active


@pytest.mark.parametrize(
    ("verb", "asked"),
    [
        (lambda m: li.activate(m, None), "activate"),
        (lambda m: li.disabled(m).__enter__(), "disabled"),
        (lambda m: li.routed(m, [None]).__enter__(), "routed"),
    ],
    ids=["activate", "disabled", "routed"],
)
def test_a_model_without_adapters_has_nothing_to_choose(verb: Any, asked: str) -> None:
    with pytest.raises(li.StateError, match=f"{asked}: the model has no adapter"):
        verb(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- routed

ROUTABLE = [name for name, kind in KINDS.items() if kind.update == "forward"]
ROWS = ["wide", None, "default", "wide"]


def several_ranks(kind: str, dtype: torch.dtype) -> nn.Module:
    """Adapters of unequal ranks on one layer, one of them with a frozen start."""
    model = injected(KINDS[kind], dtype)
    for name, rank, init in (("wide", 2, "kaiming"), ("thin", 1, "pissa")):
        config = {**KINDS[kind].config, "rank": rank, "init": init}
        fill(li.inject(model, config, name), name)
    li.train_only(model, ["default", "wide", "thin"])
    return model


def alone(model: Any, name: str | None, inputs: Sequence[Tensor], row: int) -> Tensor:
    li.activate(model, name)
    if name is None:  # with max_norm the plain layer writes W
        model = copy.deepcopy(model)
    return model(*(x[row : row + 1] for x in inputs))


def unrouted(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Run the plain base on the whole batch: matrix products of another size round otherwise."""
    plain = copy.deepcopy(model)  # with max_norm the plain layer writes W
    with li.disabled(plain):
        found: Tensor = plain(*inputs)
    return found


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((ROWS, dtype) for dtype in TOLERANCE),
        (["thin", "wide", None, "default"], torch.float64),
        ([None] * 4, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ROUTABLE)
def test_each_row_gets_its_own_adapter(kind, dtype, rows) -> None:
    model = several_ranks(kind, dtype)
    inputs = KINDS[kind].inputs(dtype)
    plain = unrouted(model, inputs)
    with li.routed(model, rows):
        found = model(*inputs)
    assert found.dtype == dtype
    for i, name in enumerate(rows):
        wanted = alone(model, name, inputs, i)
        assert error(found[i : i + 1], wanted) <= TOLERANCE[dtype]
        if name is None and "max_norm" not in kind:
            assert same_bits(found[i : i + 1], plain[i : i + 1])


@pytest.mark.parametrize("rows", [ROWS, ["thin", "wide", "thin", None]], ids=str)
@pytest.mark.parametrize("kind", ROUTABLE)
def test_gradients_reach_exactly_the_adapters_of_the_rows(kind, rows) -> None:
    model = several_ranks(kind, torch.float64)
    inputs = KINDS[kind].inputs(torch.float64)
    with li.routed(model, rows):
        y = model(*inputs)
    g = torch.randn_like(y)
    y.backward(g)
    found = gradients(model)
    model.zero_grad()
    for i, name in enumerate(rows):
        if name is not None:
            alone(model, name, inputs, i).backward(g[i : i + 1])
    assert_same(found, gradients(model))
    reached = {key.split(":")[0] for key, grad in found.items() if grad is not None}
    assert reached == {name for name in rows if name is not None}


def test_rows_of_an_adapter_that_is_not_on_a_site_get_the_base_there() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    for name, site in (("first", "0"), ("last", "2")):
        fill(li.inject(model, {"rank": 2, "targets": [site]}, name), name)
    x = torch.randn(3, 4, dtype=torch.float64)
    with li.routed(model, ["first", "last", None]):
        found = model(x)
    for i, name in enumerate(["first", "last", None]):
        assert error(found[i : i + 1], alone(model, name, [x], i)) < 1e-12


@pytest.mark.parametrize("repeat", [1, 3])
def test_beams_repeat_each_row(repeat: int) -> None:
    model = net()
    rows = ["a", None, "b"]
    x = torch.randn(3 * repeat, 2, 4, dtype=torch.float64)
    with li.routed(model, rows, repeat=repeat):
        found = model(x)
        model(x[:3])
    for i in range(3 * repeat):
        assert error(found[i : i + 1], alone(model, rows[i // repeat], [x], i)) < 1e-12


@pytest.mark.parametrize(("n", "repeat"), [(1, 1), (2, 1), (6, 1), (9, 2), (12, 1), (2, 2), (0, 1)])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_another_batch_is_refused(kind: str, n: int, repeat: int) -> None:
    model = injected(KINDS[kind])
    (x,) = KINDS[kind].inputs(torch.float32)
    x = x[torch.arange(n) % 4]
    before = snapshot(model)
    with (
        pytest.raises(li.LayerError, match=r"routed\(\) with 3 rows"),
        li.routed(model, ["default", None, "default"], repeat=repeat),
    ):
        model(x)
    assert snapshot(model) == before
    assert li.adapters(model)["default"].active
    model(x)


@pytest.mark.parametrize(
    ("rows", "repeat", "words"),
    [
        ([], 1, "got 0 rows"),
        (["a"], 0, "repeat=0"),
        (["a", "x"], 1, "routed to 'x': the model's adapters are: 'a', 'b', 'c'"),
    ],
)
def test_routed_refuses_at_entry(rows: list[str], repeat: int, words: str) -> None:
    model = net()
    with pytest.raises(li.StateError, match=words), li.routed(model, rows, repeat=repeat):
        pytest.fail("it was entered")


@pytest.mark.parametrize(
    "config",
    [{"targets": ["up"]}, {"targets": [r"fc\.weight"]}, {"targets": ["fc"], "train": ["conv"]}],
    ids=str,
)
def test_routed_refuses_whole_weights(config: dict[str, Any]) -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    model.add_module("up", nn.ConvTranspose1d(4, 4, 1))
    li.inject(model, {"rank": 2, "targets": ["fc"]}, "fine")
    li.inject(model, {"rank": 2, **config}, "whole")
    with pytest.raises(li.StateError, match="all rows of a batch share"):
        li.routed(model, ["fine", "whole"]).__enter__()
    with li.routed(model, ["fine", None]):
        model.fc(torch.randn(2, 4))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("context", ["disabled", "routed"])
def test_verbs_inside_a_context_are_refused(context: str, verb: str) -> None:
    """What they change would be lost, or counted twice, when the context puts its state back."""
    model = net()
    before, listed = snapshot(model), li.summary(model)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    wanted = model(x)
    with li.disabled(model) if context == "disabled" else li.routed(model, ["a", "c"]):
        inside = model(x)
        with pytest.raises(li.StateError, match=context):
            VERBS[verb](model) if verb != "merge" else li.merge(model, name="a")
        assert same_bits(model(x), inside)
    assert snapshot(model) == before
    assert li.summary(model) == listed
    assert same_bits(model(x), wanted)


def test_contexts_nest_and_leave_nothing_behind() -> None:
    model = net()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    adapted = model(x)
    with li.disabled(model):
        base = model(x)
        with li.routed(model, ["a", "a"]):
            assert error(model(x), adapted) < 1e-12
            with li.disabled(model):
                assert same_bits(model(x), base)
        assert same_bits(model(x), base)
    assert same_bits(model(x), adapted)


@pytest.mark.parametrize(
    "context", [li.disabled, lambda m: li.routed(m, ["b"] * 4)], ids=["disabled", "routed"]
)
@pytest.mark.parametrize("raised", [ZeroDivisionError, GeneratorExit])
def test_leaky_context(context: Any, raised: type[BaseException]) -> None:
    model = net()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    adapted = model(x)
    with pytest.raises(raised), context(model):
        raise raised
    assert same_bits(model(x), adapted)


def test_two_adapters_train_at_once_as_each_alone() -> None:
    """Ten steps of Adam on a mixed batch, and on each adapter's own rows."""
    rows = ["a", "b", "b", None, "a", "c"]
    together = net()
    apart = copy.deepcopy(together)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    target = torch.randn(6, 3, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(li.adapter_parameters(together).values(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        with li.routed(together, rows):
            (together(x) - target).square().sum().backward()
        optimizer.step()
    for name in "abc":
        li.activate(apart, name)
        mine = [i for i, row in enumerate(rows) if row == name]
        optimizer = torch.optim.Adam(li.adapter_parameters(apart, name).values(), lr=0.02)
        for _ in range(10):
            optimizer.zero_grad()
            (apart(x[mine]) - target[mine]).square().sum().backward()
            optimizer.step()
    start = li.adapter_parameters(net())
    wanted = li.adapter_parameters(apart)
    for key, parameter in li.adapter_parameters(together).items():
        assert error(parameter, wanted[key]) < 1e-10
        assert not torch.equal(parameter, start[key])


@pytest.mark.parametrize("kind", ["linear", "conv1d", "equal slices"])
def test_routed_dropout_is_each_adapters_own(kind: str) -> None:
    """Rows of an adapter without dropout, and of the base, are exact; others right on average."""
    model = injected(KINDS[kind], torch.float64)
    config = {**KINDS[kind].config, "dropout": 0.4}
    fill(li.inject(model, config, "dropped"), "dropped")
    (x,) = KINDS[kind].inputs(torch.float64)
    x = x[:3, 0]
    rows = ["default", None, "dropped"]
    with li.routed(model, rows), torch.no_grad():
        model.eval()
        exact = model(x)
        model.train()
        runs = torch.stack([model(x) for _ in range(1000)])
    assert torch.equal(runs[:, :2], runs[:1, :2].expand_as(runs[:, :2]))
    assert torch.equal(runs[0, 1], exact[1])
    assert error(runs[0, 0], exact[0]) < TOLERANCE[torch.float64]
    spread = runs[:, 2].std(dim=0)
    moved = exact[2] != alone(model.eval(), None, [x], 2)[0]
    assert (spread[moved] > 0).all()
    assert ((runs[:, 2].mean(dim=0) - exact[2]).abs() <= 5 * spread / 1000**0.5 + 1e-12).all()

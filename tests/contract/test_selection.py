"""Choosing adapters: activate, disabled, routed, and all of them under activation checkpointing.

A run with checkpoints must give the gradients of the same run without. The scenarios
change the selection in every way between a forward and its backward.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits, snapshot
from helpers.refusals import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from contract.kinds import KINDS, SCALE, Mix, conv1d, injected

Grads = dict[str, Tensor | None]
SLICED = {"match": "qkv", "slices": ["q", "k", "v"], "adapt": ["q", "v"], "rank": 1}
X = torch.linspace(-1, 1, 4 * 3 * 4, dtype=torch.float64).view(4, 3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.qkv, self.out = nn.Linear(4, 6), conv1d(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.qkv(torch.tanh(self.fc(x)))))


class Net(nn.Module):
    """Blocks that may be checkpointed; `mode` is None, or the value of `use_reentrant`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.mode: bool | None = None
        self.inside: Callable[[Net], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = self.call(self.run, block, x, mode=self.mode)
        return x

    def run(self, block: Block, x: Tensor) -> Tensor:
        """What is checkpointed: the block, and where asked a context inside."""
        x = block(x)
        if self.inside is not None:
            with self.inside(self):
                x = block(x)
            x = block(x)
        return x

    def call(self, function: Callable[..., Tensor], *args: Any, mode: bool | None) -> Tensor:
        if self.mode is None or mode is None or not self.training:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=mode)


def net(**config: Any) -> Net:
    """Three adapters, a and b of equal ranks, c of another; a is active."""
    model = Net().double()
    for name, rank in (("a", 2), ("b", 2), ("c", 3)):
        settings = {"rank": rank, "alpha": 2, "targets": ["fc", SLICED, "out"], **config}
        fill(li.inject(model, settings, name), name)
    li.train_only(model, ["a", "b", "c"])
    return li.activate(model, "a")


def gradients(model: nn.Module) -> Grads:
    return {key: p.grad for key, p in li.adapter_parameters(model).items()}


def assert_same(grads: Grads, wanted: Grads) -> None:
    assert {k for k, g in grads.items() if g is not None} == {
        k for k, g in wanted.items() if g is not None
    }
    for key, gradient in wanted.items():
        assert gradient is None or error(grads[key], gradient) < 1e-12, key


# Runs forwards and backwards of a model and may change the selection in between.
Scenario = Callable[[Net, Tensor], None]


def backward(y: Tensor) -> None:
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()


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


def two_forwards_one_backward(model: Net, x: Tensor) -> None:
    y = model(x)
    li.activate(model, "b")
    z = model(x)
    li.activate(model, "c")
    backward(y + 2 * z)


def backward_twice(model: Net, x: Tensor) -> None:
    y = model(x)
    y.sum().backward(retain_graph=True)
    li.activate(model, "b")
    y.sum().backward()


def another_ejected_in_between(model: Net, x: Tensor) -> None:
    y = model(x)
    li.eject(model, "c")
    li.activate(model, "b")
    backward(y)


def other_models_changed_in_between(model: Net, x: Tensor) -> None:
    merged, ejected = net(), net()
    y = model(x)
    li.merge(merged)
    li.eject(ejected)
    backward(y)


SCENARIOS: dict[str, Scenario] = {
    "activate another": selecting("a", "b"),
    "change the mix": selecting({"a": 0.7, "b": -0.2}, {"b": 0.7, "a": -0.2}),
    "backward in disabled": within(nullcontext, li.disabled),
    "forward in disabled": within(li.disabled),
    "two forwards, one backward": two_forwards_one_backward,
    "backward twice": backward_twice,
    "another ejected in between": another_ejected_in_between,
    "other models changed in between": other_models_changed_in_between,
}
ROUTES: dict[str, Scenario] = {
    "forward in routed": within(routed("a", None, "b", "c")),
    "backward in other routes": within(routed("a", "b", "b", "a"), routed("b", "a", "a", "b")),
}


def run(scenario: Scenario, model: Net) -> Grads:
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    scenario(model, x)
    return {**gradients(model), "x": x.grad}


def assert_recomputed(scenario: Scenario, plain: Net, mode: bool) -> None:
    """Checkpoints must give the gradients of the same run without."""
    model = copy.deepcopy(plain)
    model.mode = mode
    assert_same(run(scenario, model), run(scenario, plain))


modes = pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@modes
@pytest.mark.parametrize("name", SCENARIOS | ROUTES)
def test_recomputation_runs_under_the_selection_of_its_forward(name, mode, dropout) -> None:
    assert_recomputed((SCENARIOS | ROUTES)[name], net(dropout=dropout), mode)


READ = {
    "weights": {"targets": [r"fc\.weight", r"out\.weight"]},
    "copies": {"targets": ["qkv"], "train": ["out"], "bias": "all"},
}


@modes
@pytest.mark.parametrize("update", READ)
@pytest.mark.parametrize("name", SCENARIOS)
def test_reads_are_recomputed_under_the_selection_of_their_forward(name, update, mode) -> None:
    """Weight updates and trained copies, which read where others add to the output."""
    assert_recomputed(SCENARIOS[name], net(**READ[update]), mode)


@modes
@pytest.mark.parametrize("inside", [li.disabled, routed("b", "a", None, "c")])
@pytest.mark.parametrize("change", [None, "b"])
def test_contexts_inside_the_checkpointed_function(inside, mode, change) -> None:
    plain = net()
    plain.inside = inside
    assert_recomputed(selecting("a", change), plain, mode)


def saving_on_cpu(model: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model.first(x)


INNER: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "reentrant": lambda model, x: model.call(model.first, x, mode=True),
    "non-reentrant": lambda model, x: model.call(model.first, x, mode=False),
    "hooks on saved tensors": saving_on_cpu,
}


@modes
@pytest.mark.parametrize("inner", INNER)
def test_checkpoints_and_hooks_inside_a_checkpoint(mode: bool, inner: str) -> None:
    def scenario(model: Net, x: Tensor) -> None:
        y = model.call(lambda x: INNER[inner](model, x) + x, x, mode=mode)
        li.activate(model, "b")
        backward(y)

    assert_recomputed(scenario, net(), mode=True)


class Foreign(torch.autograd.Function):
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


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_foreign_checkpoint_is_right_though_a_reference_ran_meanwhile(in_a_thread: bool) -> None:
    """As in a step of DPO, whose reference is the model without its adapter."""

    def reference(model: Net, x: Tensor) -> None:
        with li.disabled(model), torch.no_grad():
            model(x)

    def scenario(model: Net, x: Tensor) -> None:
        y = Foreign.apply(model, x)
        if in_a_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(reference, model, x).result()
        else:
            reference(model, x)
        backward(y)

    plain = net()
    assert_same(run(scenario, copy.deepcopy(plain)), run(selecting("a"), copy.deepcopy(plain)))


VERBS: dict[str, Callable[[Net], Any]] = {
    "activate": lambda model: li.activate(model, "b"),
    "inject": lambda model: li.inject(model, {"rank": 1, "targets": ["fc"]}, "new"),
    "merge": lambda model: li.merge(model, name="a"),
    "eject": lambda model: li.eject(model, "a"),
}
every_verb = pytest.mark.parametrize("verb", VERBS)


@modes
@every_verb
def test_verbs_inside_a_checkpointed_function_are_refused_in_its_backward(verb, mode) -> None:
    """What they change would not be undone for the recomputation."""
    model = net()

    def inside(x: Tensor) -> Tensor:
        VERBS[verb](model)
        return model.first(x)

    y = checkpoint(inside, X.clone().requires_grad_(), use_reentrant=mode)
    with refused(li.StateError):
        backward(y)


@every_verb
def test_verbs_inside_a_context_are_refused(verb: str) -> None:
    """What they change would be lost, or counted twice, when the context puts its state back."""
    model = net()
    before, wanted = snapshot(model), model(X)
    with li.routed(model, ["a", "c"] * 2), refused(li.StateError, "context"):
        VERBS[verb](model)
    assert snapshot(model) == before
    assert same_bits(model(X), wanted)


def test_verbs_in_a_backward_are_refused() -> None:
    model = net()
    y = model(X.clone().requires_grad_())
    y.register_hook(lambda _: li.activate(model, "b") and None)
    with refused(li.StateError, "activate", "backward"):
        y.sum().backward()
    assert li.adapters(model)["a"].active


@modes
@pytest.mark.parametrize("verb", [li.merge, lambda m: li.eject(m, "b")], ids=["merge", "eject"])
def test_a_merge_or_eject_between_forward_and_backward_is_refused(verb: Any, mode: bool) -> None:
    """Never silently doubled or lost."""
    model = net()
    model.mode = mode
    li.activate(model, {"a": 0.5, "b": 0.5})
    y = model(X.clone().requires_grad_())
    verb(model)
    with pytest.raises((li.StateError, RuntimeError)):
        backward(y)
    assert all(g is None for g in gradients(model).values())


@modes
def test_values_that_were_swapped_since_the_forward_are_not_recomputed_with(mode: bool) -> None:
    model = net()
    model.mode = mode
    x, other = X.clone().requires_grad_(), copy.deepcopy(li.adapter_state(model, "b"))
    y = model(x)
    li.swap_adapter(model, other, "a")
    with refused(li.StateError, "'a'"):
        backward(y)
    y = model(x)
    li.swap_adapter(model, other, "b")
    backward(y)


NO_WEIGHTS: list[tuple[Any, str]] = [
    (["a"], "list"),
    ({"a": float("nan")}, "nan"),
    ({"a": np.float64("nan")}, "nan"),
    ({"a": -float("inf")}, "-inf"),
    ({"a": 1e300}, "1e+300"),  # a forward in float32 overflows
]


@pytest.mark.parametrize(("which", "named"), NO_WEIGHTS)
def test_activate_refuses(which: Any, named: str) -> None:
    model = net()
    with refused(li.StateError, "activate", named, model=model):
        li.activate(model, which)
    assert li.adapters(model)["a"].active


def test_a_weight_of_numpy_is_a_number_as_any_other() -> None:
    model = net()
    half = li.activate(model, {"a": 0.5})(X)
    assert not same_bits(li.activate(model, "a")(X), half)
    assert same_bits(li.activate(model, {"a": np.float32(0.5)})(X), half)


class ReadsTwice(Mix):
    """Multiplies with its matrix once as it is and once after something else was switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        first = super().forward(x)
        self.between()
        return torch.cat([first, super().forward(x)])


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("verb", ["activate", "inject"])
def test_a_second_read_in_one_forward_sees_who_takes_part_by_then(
    verb: str, with_gradients: bool
) -> None:
    model, x = ReadsTwice().double(), torch.randn(3, 5, dtype=torch.float64)

    def put_on(name: str) -> None:
        fill(li.inject(model, KINDS["parameter"].config | {"targets": ["matrix"]}, name), name)

    put_on("first")
    model.between = lambda: put_on("second")
    if verb == "activate":
        put_on("second")
        li.activate(model, "first")
        model.between = lambda: li.activate(model, "second")
    with torch.set_grad_enabled(with_gradients):
        y = model(x)
    sites = [li.adapter_state(model, name).sites["matrix"] for name in ("first", "second")]
    W = model.get_parameter("matrix")
    assert error(y, torch.cat([x @ (W + SCALE * site.B @ site.A).t() for site in sites])) < 1e-12


ROUTABLE = [name for name, kind in KINDS.items() if kind.update == "forward"]


def alone(model: Any, name: str | None, inputs: Sequence[Tensor], row: int) -> Tensor:
    li.activate(model, name)
    return model(*(x[row : row + 1] for x in inputs))


@pytest.mark.parametrize(
    "rows", [["wide", None, "default", "wide"], ["thin", "wide", "thin", None]]
)
@pytest.mark.parametrize("kind", ROUTABLE)
def test_each_row_gets_its_own_adapter_which_alone_gets_its_gradient(kind, rows) -> None:
    """Of adapters of unequal ranks, one of them with a frozen start."""
    model, inputs = injected(KINDS[kind], torch.float64), KINDS[kind].inputs(torch.float64)
    for name, rank, init in (("wide", 2, "kaiming"), ("thin", 1, "pissa")):
        config = {**KINDS[kind].config, "rank": rank, "init": init}
        fill(li.inject(model, config, name), name)
    li.train_only(model, ["default", "wide", "thin"])
    with li.routed(model, rows):
        y = model(*inputs)
    g = torch.randn_like(y)
    y.backward(g)
    grads = gradients(model)
    model.zero_grad()
    wanted = torch.cat([alone(model, name, inputs, i) for i, name in enumerate(rows)])
    assert error(y, wanted) <= TOLERANCE[torch.float64]
    wanted.backward(g)
    assert_same(grads, gradients(model))
    reached = {key.split(":")[0] for key, grad in grads.items() if grad is not None}
    assert reached == {name for name in rows if name is not None}


@pytest.mark.parametrize(("n", "repeat"), [(2, 1), (6, 1), (9, 2), (0, 1)])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_another_batch_is_refused(kind: str, n: int, repeat: int) -> None:
    model = injected(KINDS[kind])
    x = KINDS[kind].inputs(torch.float32)[0][torch.arange(n) % 4]
    with (
        refused(li.LayerError, "routed("),
        li.routed(model, ["default", None, "default"], repeat=repeat),
    ):
        model(x)


@pytest.mark.parametrize(("rows", "named"), [([], "0 rows"), (["a", "x"], "'x'")])
def test_routed_refuses_at_entry(rows: list[str], named: str) -> None:
    with refused(li.StateError, "routed", named), li.routed(net(), rows):
        pytest.fail("it was entered")


@pytest.mark.parametrize("raised", [ZeroDivisionError, GeneratorExit])
def test_contexts_nest_and_an_exception_inside_leaves_nothing_behind(raised: Any) -> None:
    model = net()
    adapted = model(X)

    def inside() -> None:
        with li.routed(model, ["a"] * 4):
            assert error(model(X), adapted) < 1e-12
            with li.disabled(model):
                assert same_bits(model(X), base)
            raise raised

    with li.disabled(model):
        base = model(X)
        with pytest.raises(raised):
            inside()
        assert same_bits(model(X), base)
    assert same_bits(model(X), adapted)
    assert not same_bits(base, adapted)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "equal slices"])
def test_routed_dropout_is_each_adapters_own(kind: str) -> None:
    """Rows of an adapter without dropout, and of the base, are exact; others right on average."""
    model, x = injected(KINDS[kind], torch.float64), KINDS[kind].inputs(torch.float64)[0][:3, 0]
    fill(li.inject(model, {**KINDS[kind].config, "dropout": 0.4}, "dropped"), "dropped")
    with li.routed(model, ["default", None, "dropped"]), torch.no_grad():
        exact = model.eval()(x)
        model.train()
        runs = torch.stack([model(x) for _ in range(1000)])
    assert all(error(run[:2], exact[:2]) < TOLERANCE[torch.float64] for run in runs)
    spread = runs[:, 2].std(dim=0)
    assert (spread[exact[2] != alone(model.eval(), None, [x], 2)[0]] > 0).all()
    assert ((runs[:, 2].mean(dim=0) - exact[2]).abs() <= 5 * spread / 1000**0.5 + 1e-12).all()

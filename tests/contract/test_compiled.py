"""Compiled models: another adapter, another mix or other rows are other data for the same graph."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.forks import Forks
from helpers.reference import EXACT, Block, config, dense, random
from helpers.refusals import refused
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from contract.kinds import conv1d

N_ADAPTERS = 9  # torch gives up at eight recompilations
IDS = torch.tensor([[1, 2, 3], [4, 0, 2], [3, 3, 3], [0, 1, 4]])

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(n: int = N_ADAPTERS, **config: Any) -> nn.Sequential:
    """An embedding, a fused and a plain layer; adapters of unequal rank, not all on every layer."""
    model = nn.Sequential(
        nn.Embedding(5, 6), nn.Tanh(), conv1d(8, 6), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()
    )
    fused = {"match": "2", "slices": {"k": 3, "v": 5}, "adapt": ["v"]}
    for i in range(n):
        targets = [["0", fused, "4"], ["4"], [fused]][i % 3]
        init = "pissa" if i % 3 == 1 else "kaiming"
        settings = {"rank": 1 + i % 2, "alpha": 2 + i, "init": init, "targets": targets}
        fill(li.inject(model, {**settings, **config}, f"a{i}"), f"a{i}")
    return model.double().eval()


@torch.no_grad()
def ruin(model: nn.Module, name: str) -> None:
    """An adapter that is not chosen spoils nothing."""
    for parameter in li.adapter_parameters(model, name).values():
        parameter.fill_(torch.nan)


def compiled(model: nn.Module) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


def layers() -> tuple[nn.Sequential, Tensor]:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), x


@pytest.mark.parametrize("how", ["the method", "the function"])
def test_a_layer_that_is_compiled_alone_follows_contexts(how: str) -> None:
    """dynamo guards on no default of a class: the first graph ran on under `disabled`."""
    model, x = layers()
    plain = copy.deepcopy(model)
    fill(li.inject(model, {"rank": 2, "targets": ["0", "2"]}))
    wanted = model(x)
    if how == "the method":
        model[0].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    for _ in range(2):
        assert error(model(x), wanted) < EXACT
        with li.disabled(model):
            assert error(model(x), plain(x)) < EXACT


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_trains_later_gets_its_gradients_from_a_compiled_model(variant: str) -> None:
    """Before torch 2.13 a graph does not look whether a parameter requires a gradient."""
    model, x = layers()
    fill(li.inject(model, {"rank": 2, "variant": variant, "targets": ["0"]}))
    whole = variant == "lora" or TORCH >= (2, 9)  # before, a graph breaks at DoRA
    call = torch.compile(model, backend="aot_eager", fullgraph=whole)

    def assert_same_gradients(parameters: list[nn.Parameter]) -> None:
        runs = [torch.autograd.grad(run(x).square().sum(), parameters) for run in (call, model)]
        assert all(error(one, other) < EXACT for one, other in zip(*runs, strict=True))

    for training in (None, "default"):
        li.train_only(model, training)
        assert error(call(x), model(x)) < EXACT
    assert_same_gradients(list(li.adapter_parameters(model).values()))
    li.eject(model)
    assert_same_gradients([model[2].weight])


@pytest.mark.skipif(TORCH < (2, 8), reason="this torch compiles more often, see docs/install.md")
@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_switching_compiles_nothing_again(grad: bool) -> None:
    model = net()
    call, counter = compiled(model)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            for i in range(N_ADAPTERS):
                li.activate(model, f"a{i}")
                assert error(call(IDS), model(IDS)) < EXACT
        for weight in (0.5, -2.0):
            li.activate(model, {"a3": weight})
            assert error(call(IDS), model(IDS)) < EXACT
        fill(model, "a3")
        assert error(call(IDS), model(IDS)) < EXACT
        ruin(model, "a0")
        li.activate(model, "a1")  # which has fewer layers
        assert error(call(IDS), model(IDS)) < EXACT
    assert counter.frame_count == 1 + grad  # with the one that trains, and without it


@pytest.mark.skipif(
    TORCH < (2, 8) or TORCH == (2, 11), reason="this torch compiles more often, see docs/install.md"
)
@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_other_rows_compile_nothing_again(grad: bool) -> None:
    model = net(4)
    call, counter = compiled(model)
    with torch.set_grad_enabled(grad):
        for rows in (["a0", "a1", None, "a2"], ["a3", "a3", "a1", None], [None] * 4):
            with li.routed(model, rows):
                assert error(call(IDS), model(IDS)) < EXACT
        ruin(model, "a0")
        with li.routed(model, ["a1", "a2", None, "a1"]):
            assert error(call(IDS), model(IDS)) < EXACT
    assert counter.frame_count == 1 + grad


WITHOUT_A_GRAPH: dict[str, tuple[nn.Module, dict[str, Any], list[Any]]] = {
    "mixes": (nn.Linear(4, 4), {}, [{"one": 0.5, "two": 2.0}, None, "two"]),
    "a convolution": (nn.Conv1d(3, 3, 1), {}, ["one", None, "two"]),
    "a gain": (nn.Linear(4, 4), {"variant": "dora"}, ["one", None, "two"]),
}


@pytest.mark.parametrize("what", WITHOUT_A_GRAPH)
def test_rows_that_no_graph_can_choose_run_without_one(what: str) -> None:
    layer, options, rows = WITHOUT_A_GRAPH[what]
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(layer), nn.Tanh()).double()
    x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 3, 4)
    for name in ("one", "two"):
        fill(li.inject(model, config("1", **options), name), name)
    call, whole = torch.compile(model, backend="eager"), torch.compile(model, fullgraph=True)
    with li.routed(model, rows):
        assert error(call(x), model(x)) < EXACT
        with pytest.raises(Exception, match="cannot_route"):
            whole(x)


@pytest.mark.slow
def test_gradients_are_those_of_the_eager_model_and_none_for_idle_adapters() -> None:
    """A gradient of zeros would let AdamW's weight decay move it."""
    model = net(3)
    li.train_only(model, ["a0", "a1"])
    call, _ = compiled(model)
    for which in ("a0", "a1", {"a0": 0.5, "a1": 2.0}):
        li.activate(model, which)
        runs = []
        for run in (call, model):
            model.zero_grad(set_to_none=True)
            run(IDS).square().sum().backward()
            runs.append([p.grad for p in model.parameters()])
        for one, other in zip(*runs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or error(one, other) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["another active", "another routed"])
def test_an_idle_adapter_beside_a_frozen_one_gets_no_gradient(idle: str) -> None:
    model, x = layers()
    for name in ("frozen", "trained"):
        fill(li.inject(model, {"rank": 2, "targets": ["0", "2"]}, name), name)
    call, _ = compiled(model)
    x.requires_grad_()
    li.activate(model, "trained")
    call(x)
    li.activate(model, "frozen")
    with li.routed(model, ["frozen", None, "frozen"]) if "routed" in idle else nullcontext():
        call(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in li.adapter_parameters(model, "trained").values())


@pytest.mark.slow
def test_adapters_with_their_own_dropout_keep_it() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.ones(256, 64)
    for name, p in (("none", 0.0), ("half", 0.5)):
        fill(li.inject(model, {"rank": 2, "dropout": p, "targets": ["0"]}, name), name)
    call, _ = compiled(model.train())
    for name, spreads in (("none", False), ("half", True)):
        li.activate(model, name)
        assert bool((call(x).std(0) > 1e-4).any()) == spreads


def two_frozen() -> nn.Sequential:
    """A layer with two frozen adapters, of which the second is active."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        fill(li.inject(model, {"rank": 2, "targets": ["0"]}, name), name)
    li.train_only(model, None)
    return model


CHANGES: dict[str, Any] = {
    "activate": lambda model: li.activate(model, "a"),
    "routed": lambda model: None,
    "swap_adapter": lambda model: li.swap_adapter(model, li.adapter_state(model, "a"), "b"),
    "eject": lambda model: li.eject(model, "b"),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("verb", CHANGES)
def test_a_compiled_block_in_a_checkpoint_is_recomputed_under_its_forwards_selection(
    verb: str, reentrant: bool
) -> None:
    """Or refused. In the first step it is compiled, in later ones the graph is there."""
    model = two_frozen()
    block, _ = compiled(model)
    x = torch.randn(2, 4, requires_grad=True)
    with li.routed(model, ["a", "b"]) if verb == "routed" else nullcontext():
        (wanted,) = torch.autograd.grad(model(x).tanh().sum(), x)
    for _ in range(1 if verb == "eject" else 2):
        li.activate(model, "b")
        with li.routed(model, ["a", "b"]) if verb == "routed" else nullcontext():
            y = checkpoint(lambda t: block(t).tanh(), x, use_reentrant=reentrant)
        CHANGES[verb](model)
        if verb in ("swap_adapter", "eject"):
            with refused(li.StateError, "'b'"):
                y.sum().backward()
            continue
        y.sum().backward()
        assert error(x.grad, wanted) < 1e-6
        x.grad = None


def test_the_first_graph_of_a_process_may_be_traced_inside_a_checkpoint(forks: Forks) -> None:
    """Checkpoints that begin later are watched; this one has to be found while it runs."""
    run = test_a_compiled_block_in_a_checkpoint_is_recomputed_under_its_forwards_selection
    forks.start(run, "activate", False).result()


@pytest.mark.parametrize("first", ["compile", "inject"])
def test_compiled_before_or_after_inject(first: str) -> None:
    plain, x = Block().double(), random(3, 4)
    model: Any = copy.deepcopy(plain)
    if first == "compile":
        model = torch.compile(model, backend="eager", fullgraph=True)
        assert error(model(x), plain(x)) < EXACT  # a graph of the plain model is there
    li.inject(model, config("up", r"down\.weight"))
    if first == "inject":
        model = torch.compile(model, backend="eager", fullgraph=True)
    assert same_bits(model(x), plain(x))
    fill(model)
    wanted = dense(plain, model._orig_mod)(x)
    assert error(model(x), wanted) < EXACT
    li.merge(model)
    assert error(model(x), wanted) < EXACT
    li.eject(li.unmerge(model))
    assert same_bits(model(x), plain(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_may_be_frozen_by_inductor() -> None:
    model, x = layers()
    fill(li.inject(model, {"rank": 2, "targets": ["0"]})).eval()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert error(torch.compile(model)(x), model(x)) < 1e-5

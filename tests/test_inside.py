"""What only torch's inner side or Python's stack can say is still said, also by a new torch."""

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lora_inject.core.functional import noted_hooks, patches, torch_inside, torch_stack


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_tracers_and_transforms_are_seen() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_inside.is_watched())
        return x * 2

    x = torch.ones(2)
    look(x)
    torch.func.vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with forward_ad.dual_level():
        look(x)
    assert seen == [False, True, True, True]


def test_a_dispatch_mode_is_seen() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    assert not torch_inside.is_recorded()
    with TorchDispatchMode():
        assert torch_inside.is_recorded()


def test_a_backward_and_the_node_that_runs_are_seen() -> None:
    x = torch.ones(2, requires_grad=True)
    first = torch_inside.next_node()
    y = x * 3
    last = torch_inside.next_node()
    seen: list[Any] = []
    y.register_hook(lambda _: seen.append((torch_stack.in_backward(), torch_stack.running_node())))
    y.register_hook(lambda _: seen.append(torch_inside.may_recompute()))
    assert not torch_stack.in_backward()
    assert not torch_inside.may_recompute()
    y.sum().backward()
    assert seen[0][0] is True
    assert seen[1] is True
    assert first < last
    assert isinstance(seen[0][1], int)


@pytest.fixture(params=["as this torch", "as torch before 2.8"])
def _hooks_are_seen(request: Any, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Once as torch tells of hooks on saved tensors, once where it does not; what patches it."""
    if request.param == "as torch before 2.8" and torch_stack._TORCH_TELLS:
        monkeypatch.setattr(torch_stack, "_TORCH_TELLS", False)
        for each in (torch_inside, torch_stack):
            monkeypatch.setattr(each, "top_hooks", noted_hooks.innermost_noted)
        monkeypatch.setattr(patches, "_IN_PLACE", {})
        monkeypatch.setattr(patches, "_PATCHES", {})
        for name in ("__enter__", "__exit__"):  # put back after the test
            monkeypatch.setattr(saved_tensors_hooks, name, getattr(saved_tensors_hooks, name))
        noted_hooks.note_saving_hooks()
    model = torch.nn.Module()
    patches.hold(model)
    return model


@pytest.mark.usefixtures("_hooks_are_seen")
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_function_of_a_running_checkpoint_is_found_and_can_be_replaced(reentrant: bool) -> None:
    runs = []

    def part(x: torch.Tensor) -> torch.Tensor:
        assert torch_inside.may_recompute()
        for running in torch_stack.checkpoints():
            known = running.function
            running.function = lambda *args, known=known: (runs.append("again"), known(*args))[1]
        return x.sin()

    assert list(torch_stack.checkpoints()) == []
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(part, x, use_reentrant=reentrant)
    assert runs == []
    y.sum().backward()
    assert runs == ["again"]


def test_the_inputs_of_a_reentrant_checkpoint_are_seen() -> None:
    seen = []

    def part(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_stack.reentrant_inputs())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=True)
    assert seen[0] is not None
    assert [tuple(t.shape) for t in seen[0]] == [(2,)]
    assert torch_stack.reentrant_inputs() is None


@pytest.mark.usefixtures("_hooks_are_seen")
def test_the_call_of_a_module_is_seen() -> None:
    class Asks(torch.nn.Module):
        def forward(self) -> bool:
            return torch_stack.in_forward()

    asks = Asks()
    assert asks() is True
    assert asks.forward() is False


@pytest.mark.usefixtures("_hooks_are_seen")
def test_hooks_on_saved_tensors_are_seen() -> None:
    pair, inner = ((lambda t: t), (lambda t: t)), ((lambda t: t + 0), (lambda t: t))
    assert torch_stack.saving_hooks() is None
    with saved_tensors_hooks(*pair):
        assert torch_stack.saving_hooks() == pair
        with saved_tensors_hooks(*inner):
            assert torch_stack._pack_hooks() == [inner[0], pair[0]]
        assert torch_stack.saving_hooks() == pair
    assert torch_stack.saving_hooks() is None


def test_who_enters_is_told_from_who_manages_a_context() -> None:
    @contextlib.contextmanager
    def managed() -> Iterator[int]:
        yield torch_stack.entering_code()

    def generator() -> Iterator[int]:
        yield torch_stack.entering_code()

    async def coroutine() -> int:
        return torch_stack.entering_code()

    with managed() as flags:
        assert not flags & inspect.CO_GENERATOR
    assert next(generator()) & inspect.CO_GENERATOR
    assert asyncio.run(coroutine()) & inspect.CO_COROUTINE


@pytest.mark.slow
def test_a_marked_function_is_a_constant_of_a_graph() -> None:
    called: list[None] = []

    @torch_inside.constant_in_graphs
    def known() -> int:
        called.append(None)
        return 3

    def look(x: torch.Tensor) -> torch.Tensor:
        return x * known()

    compiled: Callable[..., torch.Tensor] = torch.compile(look, backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert compiled(x).tolist() == compiled(x).tolist() == [3, 3]
    assert len(called) == 1

"""`routed` and `disabled` belong to the thread, asyncio task or generator that entered them."""

import asyncio
import contextlib
import copy
import functools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from conftest import error, fill, same_bits
from helpers.reference import llama
from helpers.refusals import refused
from helpers.versions import at_least
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li

NAMES = ("a", "b", "c")


class Net(nn.Module):
    """Gives other threads a chance between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.between()
        return self.second(h)


def net() -> Net:
    model = Net().double()
    for name in NAMES:
        fill(li.inject(model, {"rank": 2, "targets": ["first", "second"]}, name), name)
    return li.activate(model, "a").eval()


X = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)


def served() -> tuple[Net, dict[str | None, Tensor]]:
    """The model, and what each adapter alone gives, computed without a context."""
    model = net()
    wanted = {name: li.activate(model, name)(X).detach() for name in (*NAMES, None)}
    return li.activate(model, "a"), wanted


@pytest.mark.parametrize("in_graphs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_requests_on_a_thread_pool_are_never_mixed(
    in_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests on 4 threads, which change places within every forward."""
    model, wanted = served()
    call = compiled(model) if in_graphs else model
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    if not in_graphs:
        monkeypatch.setattr(model, "between", lambda: threading.Event().wait(1e-5))

    @torch.no_grad()
    def request(name: str | None) -> Tensor:
        with li.routed(model, [name, name]):
            return call(X)  # type: ignore[no-any-return]

    try:
        with ThreadPoolExecutor(4) as pool:
            names = [(*NAMES, None)[i % 4] for i in range(100 if in_graphs else 400)]
            for name, y in zip(names, pool.map(request, names), strict=True):
                assert error(y, wanted[name]) < 1e-12
    finally:
        sys.setswitchinterval(switching)
    with torch.no_grad(), li.disabled(model):
        assert error(in_thread(lambda: call(X)), wanted["a"]) < 1e-12
        assert error(call(X), wanted[None]) < 1e-12


def in_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("context", [li.disabled, lambda m: li.routed(m, ["b", "b"])])
def test_other_threads_run_under_the_models_setting_also_when_started_inside(context: Any) -> None:
    model, wanted = served()
    with context(model):
        inside = model(X)
        assert same_bits(in_thread(lambda: model(X)), wanted["a"])
        in_thread(lambda: li.activate(model, "c"))
        assert same_bits(model(X), inside)
    assert same_bits(model(X), wanted["c"])


@pytest.mark.parametrize("verb", [li.merge, lambda m: li.eject(m, "b")], ids=["merge", "eject"])
def test_what_a_running_request_needs_is_not_taken_away(verb: Any) -> None:
    model, wanted = served()
    with li.routed(model, ["b", "b"]):
        with refused(li.StateError, "disabled()", "routed()"):
            in_thread(lambda: verb(model))
        assert error(model(X), wanted["b"]) < 1e-12
    verb(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_on_another_thread_recomputes_under_its_forwards_rows(reentrant: bool) -> None:
    """As autograd's own threads of devices do."""
    model = net().train()
    li.train_only(model, NAMES)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x = X.clone().requires_grad_()
        with li.routed(model, ["b", "c"]):
            y = run(x)
        with li.disabled(model):
            in_thread(lambda y=y: y.sum().backward())
        grads.append({k: p.grad for k, p in li.adapter_parameters(model).items()})
        model.zero_grad()
    for key, gradient in grads[1].items():
        assert (gradient is None) == (grads[0][key] is None) == key.startswith("a:")
        assert gradient is None or error(gradient, grads[0][key]) < 1e-12


def test_asyncio_tasks_have_their_own_contexts() -> None:
    model, wanted = served()

    @contextlib.asynccontextmanager
    async def mine(name: str | None) -> AsyncIterator[None]:
        with li.routed(model, [name, name]):
            await asyncio.sleep(0)
            yield

    async def request(name: str | None) -> None:
        async with mine(name):
            for _ in range(5):
                await asyncio.sleep(0)
                assert error(model(X), wanted[name]) < 1e-12
            y = await asyncio.to_thread(model, X)  # which takes the context along
            assert error(y, wanted[name]) < 1e-12

    async def late(left: asyncio.Event) -> None:
        """Outlives the context that it was started in."""
        await left.wait()
        with refused(li.StateError, "routed()"):
            model(X)
        with li.disabled(model):
            assert same_bits(model(X), wanted[None])

    async def serve() -> None:
        requests, left = asyncio.gather(*map(request, (*NAMES, None) * 3)), asyncio.Event()
        await asyncio.sleep(0)
        assert same_bits(model(X), wanted["a"])
        with li.routed(model, ["b", "b"]):
            task = asyncio.create_task(late(left))
            await asyncio.sleep(0)
        left.set()
        await asyncio.gather(requests, task)

    asyncio.run(serve())
    assert same_bits(model(X), wanted["a"])


def test_leaving_out_of_order_or_in_another_thread_is_an_error() -> None:
    model, wanted = served()
    first, second = li.routed(model, ["b", "b"]), li.disabled(model)
    first.__enter__()
    second.__enter__()
    with refused(li.StateError, "leaving", "order"):
        first.__exit__(None, None, None)
    assert same_bits(model(X), wanted[None])
    with refused(li.StateError, "leaving", "thread"):
        in_thread(lambda: second.__exit__(None, None, None))


def test_a_context_decorates_nothing() -> None:
    """The body of a coroutine or a generator would run with the adapters."""
    model, _ = served()
    for name, context in (("disabled", li.disabled(model)), ("routed", li.routed(model, ["b"]))):
        with refused(li.StateError, name, f"with {name}(...)"):
            context(model)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.skipif(not at_least(torch.__version__, 2, 9), reason="dynamo says it in its own words")
@pytest.mark.slow
def test_a_compiled_forward_refuses_what_it_cannot_tell_apart_or_runs_without_a_graph() -> None:
    model, wanted = served()
    call, may_break = compiled(model), torch.compile(model, backend="eager")

    async def request() -> None:
        with li.routed(model, ["b", "b"]):
            await asyncio.sleep(0)
            with pytest.raises(Exception, match="compiled code cannot tell whose forward"):
                call(X)
            assert error(may_break(X), wanted["b"]) < 1e-12

    asyncio.run(request())
    assert error(call(X), wanted["a"]) < 1e-12


# ---------------------------------------------------- a reference: the model without its adapters


class Parts(nn.Module):
    """Gives its layer, which an adapter is on, away in containers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double()])

    @property
    def in_a_list(self) -> list[nn.Module]:
        return [self.layers[0]]

    @property
    def in_a_dict(self) -> dict[str, tuple[nn.Module]]:
        return {"only": (self.layers[0],)}

    @property
    def in_a_partial(self) -> Any:
        return functools.partial(self.forward)

    def both(self) -> tuple[nn.Module, int]:
        return self.layers[0], 1

    def one_by_one(self, inputs: Tensor) -> Iterator[Tensor]:
        yield self(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers[0](inputs)


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "a list": lambda model: model.in_a_list[0](X),
    "a tuple in a dict": lambda model: model.in_a_dict["only"][0](X),
    "a partial": lambda model: model.in_a_partial(X),
    "a method that returns several": lambda model: model.both()[0](X),
    "an index of a ModuleList": lambda model: model.layers[0](X),
    "a loop over a ModuleList": lambda model: next(layer(X) for layer in model.layers),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_of_a_reference_compute_without_adapters(way: str) -> None:
    model = Parts()
    plain = model(X)
    fill(li.inject(model, {"rank": 2, "targets": ["0"]}))
    assert not torch.equal(WAYS[way](model), plain)
    assert torch.equal(WAYS[way](li.reference(model)), plain)


def test_a_reference_refuses_a_method_that_computes_later() -> None:
    model = li.inject(Parts(), {"rank": 2, "targets": ["0"]})
    with refused(li.StateError, "reference", "one_by_one", "disabled"):
        li.reference(model).one_by_one(X)


@pytest.mark.recent
@pytest.mark.parametrize("context", [li.disabled, lambda model: li.routed(model, ["default"] * 2)])
def test_generation_in_a_thread_of_its_own_does_not_forget_the_context(context: Any) -> None:
    model = fill(li.inject(llama().float(), {"rank": 2, "targets": ["q_proj"]}))
    ends = {"eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, **ends)
    # Else it takes most of the memory.
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)

    def generate() -> dict[str, Any]:
        return model.generate_batch([[1, 2, 3], [4, 5]], config, small)

    with context(model), refused(li.StateError, "activate"):
        generate()
    assert len(generate()) == 2
    plain = copy.deepcopy(model)
    assert "init_continuous_batching" not in li.eject(plain).__dict__

"""Threads: what one does to a model while another computes with it, or changes it, too.

Where threads have to meet, they do so at a place that a test can hold open: a change of class, the
reading of a file, a probe.
"""

import contextlib
import copy
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, refusal
from helpers.forks import Forks
from helpers.reference import random
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li

PACKAGE = str(Path(li.__file__).parent)
CONFIG = {"rank": 2, "alpha": 3.0, "targets": ["0"]}
SHORT = 0.3  # seconds until somebody who waits for another thread goes on alone


def elsewhere(run: Callable[[], Any]) -> Any:
    """What a run gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


class Watched(nn.Linear):
    """A layer that lets another thread do something right before its class changes."""

    def __init__(self) -> None:
        super().__init__(4, 4, dtype=torch.float64)
        self.__dict__["at_change"] = lambda: None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            elsewhere(self.__dict__["at_change"])
        super().__setattr__(name, value)


@pytest.mark.parametrize("reads", [False, True])
def test_a_layer_whose_last_adapter_goes_computes_the_base_in_other_threads(reads: bool) -> None:
    model, x, seen = nn.Sequential(Watched()), random(3, 4), list[Tensor]()
    plain = model(x)
    li.inject(model, CONFIG)

    def compute() -> None:
        layer = model[0]
        seen.append(nn.functional.linear(x, layer.weight, layer.bias) if reads else layer(x))

    model[0].__dict__["at_change"] = compute
    li.eject(model)
    assert seen
    assert all(torch.equal(y, plain) for y in seen)


def test_a_layer_that_is_asked_whether_it_takes_an_adapter_computes_the_base_meanwhile() -> None:
    class New(Watched):
        """Of no class that was asked before."""

    layer, x, seen = New(), random(3, 4), list[Tensor]()
    model = nn.Sequential(layer)
    plain = model(x)
    layer.__dict__["at_change"] = lambda: seen.append(model(x))
    li.inject(model, CONFIG)
    layer.__dict__["at_change"] = lambda: None
    assert all(torch.equal(y, plain) for y in seen)


class Meeting:
    """A `get_parameter` of somebody's, in whose wrapping two threads meet."""

    def __init__(self, torchs: Any) -> None:
        self.torchs, self.meeting, self.wrapped = torchs, threading.Barrier(2), False
        self.__doc__ = torchs.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torchs(*args, **kwargs)

    def __get__(self, module: Any, owner: Any = None) -> Any:
        return self if module is None else self.__call__.__get__(self)

    @property
    def __name__(self) -> str:
        _meet(self.meeting)
        self.wrapped = True
        return "get_parameter"


def first_injects_at_once() -> bool:
    """Whether `nn.Module` has its own function again after two models of two threads are gone."""
    nn.Module.get_parameter = own = Meeting(nn.Module.get_parameter)
    models = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda model: li.inject(model, CONFIG), models))
    models.clear()
    gc.collect()
    return own.wrapped and nn.Module.__dict__["get_parameter"] is own


def test_two_first_injects_at_once_leave_nothing_in_torch(forks: Forks) -> None:
    assert forks.start(first_injects_at_once).result()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4)).double()


def _value() -> li.AdapterState:
    return li.adapter_state(fill(li.inject(_net(), CONFIG)))


def _copied_together(value: li.AdapterState) -> li.AdapterState:
    """An adapter whose tensors two threads copy at once, if nothing keeps them apart."""
    meeting, A = threading.Barrier(2), value.sites["0"].A

    def detach() -> Tensor:
        _meet(meeting)
        return Tensor.detach(A)

    A.detach = detach
    return value


def _meet(meeting: threading.Barrier) -> None:
    with contextlib.suppress(threading.BrokenBarrierError):
        meeting.wait(SHORT)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a")])
def test_of_two_adapters_put_on_at_once_the_second_finds_the_first(names: tuple[str, str]) -> None:
    model, value, x = _net(), _copied_together(_value()), random(3, 4)

    def put_on(name: str) -> Exception | None:
        return refusal(lambda: li.install(model, value, name), Exception)

    with ThreadPoolExecutor(2) as pool:
        refusals = [raised for raised in pool.map(put_on, names) if raised is not None]
    assert [type(raised) for raised in refusals] == [li.StateError] * (names == ("a", "a"))
    assert len(li.adapters(model)) == len(set(names))
    alone = li.install(_net(), _value())
    assert error(model(x), alone(x)) < 1e-12  # the first is active, and the second is not


class FirstOnly(nn.Sequential):
    """Calls the first of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def test_what_another_thread_puts_on_survives_a_refused_inject() -> None:
    model = FirstOnly(*_net(), *_net())
    alone, x = copy.deepcopy(model), random(3, 4)
    fill(li.inject(alone, CONFIG, "theirs"), "theirs")
    theirs = li.adapter_state(alone, "theirs")
    with ThreadPoolExecutor(1) as pool:
        loads = []

        def probe() -> None:
            loads.append(pool.submit(lambda: li.install(model, theirs, "theirs")))
            refusal(lambda: loads[0].result(SHORT), TimeoutError)
            model(x)

        with refused(li.LayerError, "1"):
            li.inject(model, {"rank": 2, "targets": ["0", "1"]}, "mine", probe=probe)
        loads[0].result()
    assert list(li.adapters(model)) == ["theirs"]
    assert torch.equal(model(x), alone(x))


def test_no_thread_undoes_what_another_notes_of_use() -> None:
    """The card and the summary said that no forward had used a layer, and a probe refused it.

    Here another thread runs a first forward of another adapter within each of its expressions.
    """
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.ones(1, 4)
    users = [f"u{i}" for i in range(80)]
    for user in users:
        li.inject(model, {"rank": 1, "targets": ["0", "1"]}, user)

    def run(user: str) -> None:
        with torch.no_grad(), li.routed(model, [user]):
            model(x)

    left = iter(users[1:])

    def trace(frame: Any, *_: Any) -> None:
        code = frame.f_code
        is_ours = code.co_filename.startswith(PACKAGE) and code.co_name == "<genexpr>"
        if is_ours and (user := next(left, None)):
            elsewhere(lambda: run(user))

    with torch.no_grad(), li.routed(model, users[:1]):
        sys.settrace(trace)
        model(x)
        sys.settrace(None)
    idle = {name for name, info in li.adapters(model).items() if info.idle}
    assert idle <= set(left)

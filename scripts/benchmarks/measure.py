"""How everything here is measured: interleaved, shuffled, paired, with a control.

A time on a shared machine says little, a ratio of two times taken a moment apart says a
lot. So all variants of a case run in one process, in an order that is shuffled for each round, and
each round gives one ratio to the floor of the same round. The floor runs twice under two names; how
far their ratio is from 1 is how far any other ratio may be off.

What is left out: the allocator's settings are those of the system, and no process is pinned. On a
machine that others use, `clock("cpu")` counts the processor time of this process instead of the
time that passes, which leaves out waiting for a core, but not sharing its caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

AGAIN = "floor again"
BARE = "bare operations"

_now = time.perf_counter


def clock(which: str) -> None:
    """Choose what is measured from here on: `wall` or `cpu`."""
    global _now  # noqa: PLW0603 - one clock for all rows of a run
    _now = {"wall": time.perf_counter, "cpu": time.process_time}[which]


def _wait() -> None:
    """Wait until the device has done what it was asked for; a CPU has."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Variant:
    """One way of doing the work of a case.

    Attributes:
        run: Does it once; this is what is timed.
        before: Prepares one run, untimed.
        after: Cleans up after one run, untimed.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Line:
    """One measured number, as every report shows it.

    Attributes:
        case: What was measured, with sizes, dtype and threads where they are not the row's.
        variant: Who did it.
        metric: What the number is, with its unit.
        low: The smallest of all rounds.
        mid: The median.
        high: The largest.
        n: How many rounds.
    """

    case: str
    variant: str
    metric: str
    low: float
    mid: float
    high: float
    n: int


@dataclass
class Options:
    """What the command line asks of every row.

    Attributes:
        quick: Tiny sizes and few rounds: shows that a row works, measures nothing.
        rounds: Rounds of every case, None for what each row thinks is enough.
    """

    quick: bool = False
    rounds: int | None = None

    def n_rounds(self, usual: int) -> int:
        """Return how many rounds to run."""
        return self.rounds or (2 if self.quick else usual)


@dataclass
class Result:
    """What one row found."""

    lines: list[Line] = field(default_factory=list)

    def add(self, case: str, variant: str, metric: str, values: Sequence[float] | float) -> None:
        """Add one number, from its values in all rounds, and print it."""
        many = [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
        middle = statistics.median(many)
        line = Line(case, variant, metric, min(many), middle, max(many), len(many))
        self.lines.append(line)
        spread = f"[{line.low:.4g} - {line.high:.4g}]"
        print(
            f"  {case:<44} {variant:<34} {middle:10.4g} {spread} {metric} (n={line.n})", flush=True
        )

    def ratios(
        self,
        case: str,
        times: Mapping[str, Sequence[float]],
        metric: str = "time / floor",
        floor: str = "floor",
    ) -> None:
        """Add the floor's time in ms, and every other variant's paired ratio to it."""
        self.add(case, floor, "ms", [1e3 * t for t in times[floor]])
        for name in times:
            if name != floor:
                self.add(case, name, metric, paired(times[name], times[floor]))


def some_ids(*shape: int) -> torch.Tensor:
    """Return integers below 500, the same ones each time."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(500, shape, generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def noise_of(control: Line) -> float:
    """Return how far off a median may be, from the control of the same case.

    How far the median of the control is from what it should be, and half its range over the root of
    the number of rounds.
    """
    right = 1.0 if control.metric.startswith("time / ") else 0.0
    return abs(control.mid - right) + (control.high - control.low) / (2 * control.n**0.5)


def paired(times: Sequence[float], floor: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [t / f for t, f in zip(times, floor, strict=True)]


def interleave(
    variants: Mapping[str, Variant | Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time every variant once a round, in an order that is shuffled for each round.

    Args:
        variants: Name to what is timed.
        rounds: Rounds that count.
        warm_up: Rounds before them that do not.

    Returns:
        Name to seconds of each round.
    """
    known = {n: v if isinstance(v, Variant) else Variant(v) for n, v in variants.items()}
    names = list(known)
    shuffle = torch.Generator("cpu").manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # so that the collections between the runs look at their garbage alone
    for number in range(warm_up + rounds):
        for i in torch.randperm(len(names), generator=shuffle, device="cpu").tolist():
            seconds = _timed(known[names[i]])
            if number >= warm_up:
                times[names[i]].append(seconds)
    gc.unfreeze()
    return times


def _timed(variant: Variant) -> float:
    """Return the seconds of one run, without the garbage collector."""
    if variant.before is not None:
        variant.before()
    gc.collect()
    gc.disable()
    _wait()
    try:
        began = _now()
        variant.run()
        _wait()
        seconds = _now() - began
    finally:
        gc.enable()
    if variant.after is not None:
        variant.after()
    return seconds


def many(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Return a function that calls `run` so often, for work of microseconds."""

    def loop() -> None:
        for _ in range(calls):
            run()

    return loop


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps for a backward of `run()`, which is never run.

    Every distinct storage counts once and whole, as a view keeps all of it alive; those of the
    model's own parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets its address
        # Nothing is handed to the graph: a node that held its own output would never be freed.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        run()
    alive.clear()  # else the graph, its hooks and this list hold each other, out of gc's sight
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how far `run()` raises what torch has allocated on the device, at its highest."""
    if torch.get_default_device().type == "cuda":
        gc.collect()
        _wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak

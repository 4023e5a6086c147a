"""Runs on the sentences: the learning rate by the development part, then one run for each seed.

A method is tuned once, by its own grid and one seed that is used for nothing else;
methods that are near to a tuned one (`Method.like`) take its rate. The head's rate is tuned with
the encoder frozen and is the same everywhere. All stages that compare methods share these runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

from . import classifier
from .lab import Lab, Result
from .methods import METHODS, Method

TUNING_SEED = 100
KEPT = ("lora-qv-r8", "lora-qv-r64")  # adapters that the stage `directions` reads
SHARED = ("n_train", "batch", "max_tokens")


def do(lab: Lab, names: Sequence[str]) -> None:
    """Tune what these methods need, then run each with every seed; all methods of a seed first."""
    for name in names:
        rate_of(lab, METHODS[name])
    for seed in lab.sizes.seeds:
        for name in names:
            one(lab, METHODS[name], seed)


def one(lab: Lab, method: Method, seed: int) -> Result:
    """One run that is measured on the test part."""
    rate, head_rate = rate_of(lab, method), rate_of(lab, METHODS["head"])
    name = record_name(method.name, seed)
    keep = f"{name}.safetensors" if method.name in KEPT else ""
    settings = {
        "rate": rate,
        "head_rate": head_rate,
        "seed": seed,
        **lab.settings(*SHARED, "n_test"),
    }
    return lab.run(
        name,
        settings,
        lambda: classifier.fine_tune(lab, method, seed, rate, head_rate, "test", keep),
    )


def record_name(method: str, seed: int) -> str:
    """Name of the record of a run on the test part."""
    return f"sentences/{method}/seed{seed}"


def rate_of(lab: Lab, method: Method) -> float:
    """The learning rate of a method, tuned now if it was not yet."""
    tuned = METHODS[method.like]
    found = {rate: result["accuracy"] for rate, result in tune(lab, tuned).items()}
    return max(found, key=lambda rate: found[rate])


def tune(lab: Lab, method: Method) -> dict[float, Result]:
    """Results on the development part, for each learning rate of the method's grid."""
    found = {}
    is_head = method.name == "head"
    for rate in method.rates[: lab.sizes.keep_rates]:
        head_rate = rate if is_head else rate_of(lab, METHODS["head"])
        settings = {"rate": rate, "head_rate": head_rate, **lab.settings(*SHARED, "n_dev")}
        found[rate] = lab.run(
            f"sentences/tuning/{method.name}/{rate:g}",
            settings,
            lambda rate=rate, head_rate=head_rate: classifier.fine_tune(
                lab, method, TUNING_SEED, rate, head_rate, "dev"
            ),
        )
    return found


# ------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Scores:
    """What is known of one method.

    Attributes:
        method: The method.
        results: By seed, as far as they are done.
    """

    method: Method
    results: dict[int, Result]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each seed."""
        return [result["accuracy"] for result in self.results.values()]

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None where there is one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def middle(self, field: str) -> Any:
        """Median of one field over seeds; None where it was not measured."""
        values = [result[field] for result in self.results.values()]
        return None if None in values else statistics.median(values)


def scores(lab: Lab, name: str) -> Scores | None:
    """What is recorded of a method, or None."""
    found = {}
    for seed in lab.sizes.seeds:
        record = lab.record(record_name(name, seed))
        if record is not None:
            found[seed] = record["result"]
    return Scores(METHODS[name], found) if found else None


@dataclass(frozen=True)
class Gap:
    """How much one method is ahead of another.

    Attributes:
        difference: Mean accuracy of the one minus that of the other, over the seeds both have.
        error: Its standard error: of the finite test part, row by row paired, and of the seeds.
        n_seeds: How many seeds both have.
    """

    difference: float
    error: float
    n_seeds: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.error:.1f}"


def gap(one: Scores, other: Scores) -> Gap | None:
    """Compare two methods on the same rows and seeds; None where they share no seed."""
    seeds = sorted(one.results.keys() & other.results.keys())
    if not seeds:
        return None
    pairs = [(one.results[seed]["right"], other.results[seed]["right"]) for seed in seeds]
    by_seed = [(a.count("1") - b.count("1")) / len(a) for a, b in pairs]
    by_row = [
        statistics.mean(int(a[row]) - int(b[row]) for a, b in pairs)
        for row in range(len(pairs[0][0]))
    ]
    of_rows = statistics.stdev(by_row) / sqrt(len(by_row))
    of_seeds = statistics.stdev(by_seed) / sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    return Gap(statistics.mean(by_seed), hypot(of_rows, of_seeds), len(seeds))

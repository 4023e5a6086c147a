"""How much work the verbs do, in calls of functions: what time would say if machines were quiet."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calls import python_calls
from torch import nn

from lora_inject import adapter_state, inject, install, plan
from lora_inject.errors import MatchError

CONFIG = {"rank": 2, "targets": ["q", "k", "v", "o"]}
N_BLOCKS = 100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(4, 4, bias=False))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.v(self.k(self.q(x))))


def a_site(verb: Callable[[nn.Module], Any], prepare: Callable[[nn.Module], Any]) -> float:
    """Return the calls that a verb makes for each further site of a model."""
    n_calls = []
    for n in (1, N_BLOCKS, 2 * N_BLOCKS):  # the first imports what a verb needs
        model = nn.Sequential(*[Block() for _ in range(n)])
        prepare(model)
        n_calls.append(python_calls(lambda: verb(model)))  # noqa: B023 - it runs at once
    return (n_calls[2] - n_calls[1]) / (4 * N_BLOCKS)


# verb -> how it is called, on what, and the calls that it may make for each site
VERBS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], float]] = {
    "plan": (lambda model: plan(model, CONFIG), lambda _: None, 60),
    "inject": (lambda model: inject(model, CONFIG), lambda _: None, 110),
    "install a second": (
        lambda model: install(model, adapter_state(model), "b"),
        lambda model: inject(model, CONFIG),
        190,
    ),
}


def test_a_verb_makes_few_calls_for_each_site() -> None:
    # In a process of its own: each further library that is loaded is asked of each site, too.
    command = [sys.executable, __file__]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert {verb: n for verb, n in figures.items() if n > VERBS[verb][2]} == {}


def test_the_collector_waits_while_a_verb_makes_its_objects_and_no_longer() -> None:
    model, thresholds, usual = nn.Sequential(Block()), [], gc.get_threshold()

    def probe() -> None:
        thresholds.append(gc.get_threshold()[0])
        model(torch.ones(1, 4))

    inject(model, CONFIG, probe=probe)
    assert thresholds[0] > 100_000
    with pytest.raises(MatchError):
        plan(model, {"targets": ["no_such_layer"]})
    assert gc.get_threshold() == usual


if __name__ == "__main__":
    print(json.dumps({verb: a_site(run, prepare) for verb, (run, prepare, _) in VERBS.items()}))

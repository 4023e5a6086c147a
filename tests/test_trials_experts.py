"""Trials of experts that are layers of their own: whose a picked token is cannot be told."""

from typing import Any

import pytest
import torch
from helpers.trials import by_hand, check_equal
from torch import Tensor, nn

import lora_inject as li
from lora_inject import Trial, Trials


class Picking(nn.Module):
    """Experts that get the tokens whose first feature has their sign."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out, chosen = torch.zeros_like(flat), (flat[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero()[:, 0]
            if len(here):
                out = out.index_add(0, here, expert(flat[here]))
        return out.view_as(x)


class Whole(Picking):
    """Experts that get all tokens, behind some of the model's own, or one token of each row."""

    def __init__(self, n_own: int, one: bool = False) -> None:
        super().__init__()
        self.n_own, self.one = n_own, one

    def forward(self, x: Tensor) -> Tensor:
        if not (x[:, :1] != x).any():
            raise ValueError("no row is like this")  # as the check of a step may find
        x = torch.cat([x.new_ones(len(x), self.n_own, 4), x], 1)
        x = x[:, :1] if self.one else x
        up, down = (expert(x.flatten(0, 1)) for expert in self.experts)
        return (up.sigmoid() * down).view_as(x)


def rows(signs: str, seed: int) -> Tensor:
    """One row for each word, one token for each sign."""
    words = signs.split()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(words), len(words[0]), 4, generator=generator).double() + 0.1
    return x * torch.tensor([[[1.0 if s == "+" else -1.0] for s in word] for word in words])


def square(out: Tensor, _: Any = None) -> Tensor:
    return (out - 1).square().mean()


RULE = {"rank": 2, "targets": [r"experts\.\d"]}
TRIALS = {name: Trial(RULE, lr=1e-2, seed=i) for i, name in enumerate("ab")}


@pytest.mark.parametrize(
    "steps",
    [
        [("++--", "+---")],
        [("++--", "++--"), ("+++-", "+---")],
        [("++--", "+--+"), ("+++-", "+---")],
        [("+-", "-+"), ("++", "--")],
        [("++--", "--++"), ("++++", "----")],
        [("+-+- --++", "+--+ ++--"), ("++-- ++++", "---- +--+")],
    ],
)
def test_tokens_that_an_expert_picks_are_refused_and_go_to_no_other_trial(steps) -> None:
    """Each time the number of an expert's tokens is a multiple of the number of rows."""
    running, done = Trials(Picking(), TRIALS), []

    def train() -> None:
        for step, each in enumerate(steps):
            batch = {n: rows(signs, step) for n, signs in zip(TRIALS, each, strict=True)}
            running.step(batch, loss=square, by_name=True)
            done.append(batch)

    with pytest.raises(li.LayerError, match=r"Trials with \d rows: a Linear got .*by itself"):
        train()
    assert {*running.n_steps.values()} == {len(done)}
    for name, trial in TRIALS.items():
        alone = Picking()
        by_hand(alone, name, trial, [{"x": batch[name]} for batch in done], square)
        check_equal(running.model, alone, name)


@pytest.mark.parametrize("model", [(0,), (3,), (0, True)], ids=["all", "more", "one"])
def test_tokens_of_whole_rows_of_any_length_equal_a_plain_loop(model) -> None:
    running = Trials(Whole(*model), TRIALS)
    data = [
        {name: rows(2 * f" {'+-' * n}", n + ord(name)) for name in TRIALS} for n in (2, 3, 1, 2)
    ]
    for batch in data:
        running.step(batch, loss=square, by_name=True)
    for name, trial in TRIALS.items():
        alone = Whole(*model)
        by_hand(alone, name, trial, [{"x": batch[name]} for batch in data], square)
        check_equal(running.model, alone, name)

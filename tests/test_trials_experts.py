"""Trials of experts that are layers of their own: whose a picked token is cannot be told."""

from typing import Any

import pytest
import torch
from helpers.trials import by_hand, check_equal
from torch import nn

import lora_inject as li
from lora_inject import Trial, Trials
from lora_inject.trials.counts import Counts


class Picking(nn.Module):
    """Experts that get the tokens whose first feature has their sign."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (x[:, :1] != x).any():
            raise ValueError("no row is like this")
        x = torch.cat([x.new_ones(len(x), self.n_own, 4), x], 1)
        x = x[:, :1] if self.one else x
        up, down = (expert(x.flatten(0, 1)) for expert in self.experts)
        return (up.sigmoid() * down).view_as(x)


def rows(signs: str, seed: int) -> torch.Tensor:
    """One row for each word, one token for each sign."""
    words = signs.split()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(words), len(words[0]), 4, generator=generator).double() + 0.1
    return x * torch.tensor([[[1.0 if s == "+" else -1.0] for s in word] for word in words])


def square(out: torch.Tensor, _: Any = None) -> torch.Tensor:
    return (out - 1).square().mean()


TRIALS = {n: Trial({"rank": 2, "targets": [r"experts\.\d"]}, lr=1e-2, seed=i)
          for i, n in enumerate("ab")}  # fmt: skip


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
    running, alone = Trials(Picking(), TRIALS), {name: Picking() for name in TRIALS}
    done: list[dict[str, Any]] = []

    def train() -> None:
        for step, each in enumerate(steps):
            done.append({n: rows(signs, step) for n, signs in zip(TRIALS, each, strict=True)})
            running.step(done[-1], loss=square, by_name=True)

    with pytest.raises(li.LayerError, match=r"Trials with \d rows: a Linear got .*by itself"):
        train()
    assert {*running.n_steps.values()} == {len(done) - 1}
    for name, trial in TRIALS.items():
        data = [{"x": batch[name]} for batch in done[:-1]]
        by_hand(alone[name], name, trial, data, square)
        check_equal(running.model, alone[name], name)


@pytest.mark.parametrize("model", [(0,), (3,), (0, True)], ids=["all", "more", "one"])
def test_tokens_of_whole_rows_of_any_length_equal_a_plain_loop(model) -> None:
    running = Trials(Whole(*model), TRIALS)
    data = {name: [{"x": rows(2 * f" {'+-' * n}", n + i)} for n in (2, 3, 1, 2)]
            for i, name in enumerate(TRIALS)}  # fmt: skip
    for step in range(4):
        rows_of = {name: each[step]["x"] for name, each in data.items()}
        running.step(rows_of, loss=square, by_name=True)
    for name, trial in TRIALS.items():
        alone = Whole(*model)
        by_hand(alone, name, trial, data[name], square)
        check_equal(running.model, alone, name)


class Windows(Whole):
    """Experts that get pairs of tokens, as layers of images get windows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (expert(x.view(-1, 2, 4)) for expert in self.experts)
        return (up.sigmoid() * down).view_as(x)


@pytest.mark.parametrize("ids", [True, False])
def test_visible_rows_need_no_further_run_to_be_checked(ids) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)).double() if ids else Windows(0)
    rules, n_runs = {"rank": 1, "targets": ["0" if ids else r"experts\.\d"]}, []
    running = Trials(model, {n: Trial(rules, lr=1e-2) for n in "ab"})
    model.register_forward_pre_hook(lambda *_: n_runs.append(1))
    for n in (4, 6, 2):
        running.step(torch.arange(n)[None] % 5 if ids else rows("+" * n, n), loss=square)
    assert len(n_runs) == 5 + 3


@pytest.mark.parametrize(
    ("steps", "passes"),
    [
        ([(5, 5), (7, 7)], True),
        ([(5, 8), (7, 10)], True),
        ([(5, 1), (7, 1)], True),
        ([(4, 2), (4, 3)], False),
        ([(4, 4), (4, 3)], False),
        ([(4, 0), (4, 2)], False),
    ],
    ids=["all", "three more", "the first", "picked", "all, then picked", "none, then picked"],
)
def test_a_number_of_tokens_has_to_follow_from_the_number_of_positions(steps, passes) -> None:
    """Steps of positions in a row and tokens that a layer gets for it; the first is the check."""
    counts, layer = Counts(), nn.Linear(1, 1)
    counts.learns = True
    counts.check(layer, steps[0][1], (steps[0][0],), "check")
    counts.learns = False
    if passes:
        counts.check(layer, steps[1][1], (steps[1][0],), "step")
        return
    with pytest.raises(li.LayerError, match=f"got {steps[1][1]} tokens for each row, which does n"):
        counts.check(layer, steps[1][1], (steps[1][0],), "step")

"""Trials: what cannot share a pass runs in turn; what is wrong is refused and changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from helpers.trials import (
    BERT_TRIALS,
    batches,
    check_equal,
    of_bert,
    of_llama,
    plain_loop,
    square,
    values,
)
from torch import Tensor, nn

import lora_inject as li
from lora_inject import Trial, Trials

pytestmark = pytest.mark.recent


def trials(**targets: Any) -> dict[str, Trial]:
    return {n: Trial({"rank": 1, "targets": [target]}, lr=1e-2) for n, target in targets.items()}


TWO = trials(a="all-linear", b="all-linear")
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@contextmanager
def untouched(running: Trials, *names: str) -> Iterator[None]:
    """Hold that the body is refused by these names, and that no value and no count is another."""
    before = {name: values(running.model, name) for name in running.trials}
    n_steps = dict(running.n_steps)
    with refused(li.StateError, *names):
        yield
    assert running.n_steps == n_steps
    for name, tensors in before.items():
        check_equal(running.model, tensors, name, 0.0)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def linear() -> Any:
    return nn.Sequential(nn.Linear(4, 4))


def after(first: nn.Module) -> Any:
    return nn.Sequential(first, nn.Linear(4, 4))


# ------------------------------------------------- rows that meet: never another run in silence


class Positions(nn.Module):
    """A projection of positions, which are no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.places = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.places(torch.eye(4, dtype=x.dtype))


def centered(dims: Any = 0) -> nn.Module:
    return Function(lambda x: x - x.mean(dims))


def of_ids() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), centered((0, 1)))


def of_lstm() -> nn.Module:
    parts = (nn.LSTM(4, 4, batch_first=True), Function(lambda out: out[0]))
    return nn.Sequential(*parts, nn.Linear(4, 4))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MEETING: dict[str, tuple[Callable[[], Any], Tensor, tuple[str, str]]] = {
    "in a normalization": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        ROWS, ("0", "0"),
    ),
    "before the first adapter": (lambda: after(centered()), ROWS, ("1", "1")),
    "equal ones": (lambda: after(centered()), torch.ones(1, 4), ("1", "1")),
    "slightly": (
        lambda: after(Function(lambda x: x * (1 + 1e-6 * x.sum()))), ROWS, ("1", "1"),
    ),
    "tokens": (lambda: after(of_ids()), TOKENS, ("1", "1")),
    "equal tokens": (lambda: after(of_ids()), torch.full((2, 3), 5), ("1", "1")),
    "in a layer of a later trial": (Positions, torch.rand(1, 4, 4), ("fc", "places")),
    "in layers that take no rows": (
        of_lstm, torch.rand(2, 3, 4), ("0.weight_ih_l0", "0.weight_hh_l0"),
    ),
}  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().double().train()


@pytest.mark.parametrize("case", MEETING)
@pytest.mark.parametrize("before", ["nothing", "an evaluation"])
@pytest.mark.filterwarnings("ignore:trials run in turn")
def test_each_trial_whose_rows_meet_others_runs_as_alone(case: str, before: str) -> None:
    make, rows, (of_a, of_b) = MEETING[case]
    rows = rows.double() if rows.is_floating_point() else rows
    given = trials(a=of_a, b=of_b)
    other = rows.flip(0) * (2 if rows.is_floating_point() else 1)
    running = Trials(seeded(make), given, loss=square)
    if before == "an evaluation":  # whose own check hides nothing
        running.evaluate(rows)
    for each in ({"a": (rows,), "b": (rows,)}, {"a": (rows,), "b": (other,)}):
        running.step(each)
    for name in given:
        mine = [[rows], [rows if name == "a" else other]]
        alone = plain_loop(seeded(make), name, given[name], mine, lambda _, out, __: square(out))
        check_equal(running.model, alone, name)


def test_a_base_that_draws_numbers_draws_those_of_each_trial_alone() -> None:
    def run(some: dict[str, Trial]) -> Trials:
        running = Trials(seeded(lambda: after(nn.Dropout(0.5))), some, loss=square)
        for _ in range(3):
            running.step(ROWS.double())
        return running

    with pytest.warns(match="trials run in turn"):
        together = run(TWO)
    for name, trial in TWO.items():
        check_equal(together.model, run({name: trial}).model, name)


@pytest.mark.parametrize("at_once", [True, False])
def test_trials_do_not_share_statistics_that_their_forwards_move(at_once: bool) -> None:
    """In eval mode each would be judged with what the others left in BatchNorm's."""
    norm = nn.BatchNorm1d(4)
    running = Trials(seeded(lambda: nn.Sequential(nn.Linear(4, 4), norm)), TWO, loss=square)
    batch = (ROWS.double(),)
    with untouched(running, "'1.running_mean'"):
        if at_once:
            running.step(batch)
        else:
            running.forward_backward({"a": batch})
    assert not norm.running_mean.any()
    running.drop("b")
    running.step(batch)
    assert norm.running_mean.any()


def test_rows_without_a_mask_of_padding_run_in_turn() -> None:
    """With a mask they share a pass, without a word."""
    model = of_bert().double()
    running = Trials(model, BERT_TRIALS, loss=lambda out, _: square(out.logits))
    rows = batches(BERT_TRIALS, 0, {})
    for i, (name, batch) in enumerate(rows.items()):
        ids = batch["input_ids"][:, : 4 + i]
        rows[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    running.step(rows)
    for batch in rows.values():
        del batch["attention_mask"]
    with pytest.warns(match="trials run in turn"):
        running.step(rows)


# ------------------------------------------------------------------- steps that would be wrong


@dataclass(frozen=True)
class Wrong:
    names: tuple[str, ...]
    make: Callable[[], Any] = linear
    batch: Any = ROWS
    loss: Any = square
    forward: Callable[[Any, Any], Any] | None = None
    since: Callable[[Any], Any] = id
    targets: tuple[str, str] = ("all-linear", "all-linear")


def one_for_all(of_a: Any, of_b: Any, *names: str) -> Wrong:
    """A batch with an entry that is one for all trials, and differs."""
    batch = {n: {"x": torch.ones(2, 4), "s": s} for n, s in (("a", of_a), ("b", of_b))}
    return Wrong(names, batch=batch, forward=lambda model, b: model(b["x"]) * b["s"])


def of_tokens(*names: str, forward: Any = None, **labels: Any) -> Wrong:
    """Rows of a language model with its own loss."""
    rows = batches("ab", 0, {})
    for name, change in labels.items():
        rows[name]["labels"] = change(rows[name]["labels"])
    return Wrong(names, of_llama, rows, None, forward)


def shorter(ids: Tensor) -> Tensor:
    return ids[:, 1:]


def detached() -> Any:
    return nn.Sequential(nn.Linear(4, 4), Function(Tensor.detach), nn.Linear(4, 4))


WRONG = {
    "no batch of a trial": Wrong(("'b'",), batch={"a": (ROWS,)}),
    "a batch of no trial": Wrong(("'typo'",), batch={"typo": (ROWS,)}),
    "unequal widths": Wrong(("(2, 4)", "(2, 5)"), batch={"a": (ROWS,), "b": (torch.ones(2, 5),)}),
    "unequal rows": Wrong(("(2,), (3,)",), batch=(ROWS, torch.ones(3, 4))),
    "0-dim entries": one_for_all(torch.tensor(1.0), torch.tensor(2.0), "1.0", "2.0"),
    "numbers": one_for_all(1.0, 2.0, "1.0", "2.0"),
    "dtypes": one_for_all(torch.ones(2), torch.ones(2).double(), "float32", "float64"),
    "a loss of each row": Wrong(("(2,)", "mean"), loss=lambda out, _: out[:, 0]),
    "a loss without a gradient": Wrong(("gradient",), loss=lambda out, _: out.detach().sum()),
    "a loss that leaves a trial out": Wrong(("'b'",), detached, targets=("all-linear", "0")),
    "labels of another length": of_tokens("'b'", "(2, 7", "12", b=shorter),
    "labels that are all too short": of_tokens("labels", a=shorter, b=shorter),
    "labels that are no tokens": of_tokens("'b'", "31", b=lambda ids: ids + 31),
    "labels that are all ignored": of_tokens("'b'", "-100", b=lambda ids: ids * 0 - 100),
    "labels that are floats": of_tokens("float64", a=Tensor.double, b=Tensor.double),
    "moved since": Wrong(("cast",), since=nn.Module.double),
    "frozen since": Wrong(("'b'", "train_only"), since=lambda model: li.train_only(model, "a")),
}


def test_the_loss_of_the_next_token_is_refused_for_another_model() -> None:
    model = of_bert()
    with refused(li.StateError, "BertForSequenceClassification", "loss=", model=model):
        Trials(model, BERT_TRIALS)


@pytest.mark.parametrize("case", WRONG)
def test_a_step_that_would_be_wrong_is_refused_and_changes_nothing(case: str) -> None:
    wrong = WRONG[case]
    of_a, of_b = wrong.targets
    model = wrong.make().train()
    forward = wrong.forward and partial(wrong.forward, model)
    running = Trials(model, trials(a=of_a, b=of_b), forward=forward, loss=wrong.loss)
    wrong.since(model)
    with untouched(running, *wrong.names):
        running.step(wrong.batch)


def test_a_forward_and_a_loss_may_write_into_their_batch() -> None:
    def normalized(out: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"]
        return (out - labels.sub_(labels.mean() + 1)).square().mean()

    batch = {"x": torch.ones(3, 4), "labels": torch.randn(3, 4)}
    before, runs = batch["labels"].clone(), []
    for some in (TWO, {"b": TWO["b"]}):
        model = seeded(linear).float()
        forward = lambda b, m=model: m(b.pop("x").mul_(2))  # noqa: E731
        running = Trials(model, some, forward=forward, loss=normalized)
        for _ in range(2):
            running.step(batch)
        runs.append(running.model)
    assert torch.equal(batch["x"], torch.ones(3, 4))
    assert torch.equal(batch["labels"], before)
    check_equal(*runs, "b", 1e-6)


def test_a_dict_with_the_name_of_a_trial_is_by_name() -> None:
    rows = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    running = Trials(linear(), dict.fromkeys("xy", TWO["a"]), loss=square)
    losses = running.evaluate(rows)
    for name, each in rows.items():
        with torch.no_grad():
            assert losses[name] == pytest.approx(float(square(running.model[0](each))), rel=1e-6)
    with untouched(running, "'labels'"):
        running.step({"x": rows["x"], "labels": rows["y"]})


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0}, {"clip": -1}, {"schedule": "cosine"}, {"betas": (0.9, 1.5)}, {"seed": 2**64}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: Any) -> None:
    with refused(li.ConfigError, "Trial."):
        Trial({"targets": ["fc"]}, **{"lr": 1e-2} | settings)

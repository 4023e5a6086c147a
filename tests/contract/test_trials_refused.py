"""Trials: what would make a trial other than the same run alone is refused, and changes nothing."""

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.experts import expert_rule, experts
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
TICKS = count()


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


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MEETING: dict[str, tuple[Callable[[], Any], Tensor, tuple[str, str]]] = {
    "in a normalization": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ROWS, ("0", "0"),
    ),
    "before the first adapter": (lambda: after(centered()), ROWS, ("1", "1")),
    "equal ones": (lambda: after(centered()), torch.ones(1, 4), ("1", "1")),
    "slightly": (
        lambda: after(Function(lambda x: x * (1 + 1e-6 * x.sum()))), ROWS, ("1", "1"),
    ),
    "tokens": (lambda: after(of_ids()), TOKENS, ("1", "1")),
    "equal tokens": (lambda: after(of_ids()), torch.full((2, 3), 5), ("1", "1")),
    "in a layer of a later trial": (Positions, torch.rand(1, 4, 4), ("fc", "places")),
}  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().double().train()


@pytest.mark.parametrize("case", MEETING)
@pytest.mark.parametrize("before", ["nothing", "an evaluation"])
def test_rows_that_meet_are_refused_or_each_trial_runs_as_alone(case: str, before: str) -> None:
    make, rows, (of_a, of_b) = MEETING[case]
    rows = rows.double() if rows.is_floating_point() else rows
    given = trials(a=of_a, b=of_b)
    running = Trials(seeded(make), given)
    if before == "an evaluation":  # whose own check hides nothing
        with contextlib.suppress(li.StateError):
            running.evaluate(rows, loss=square)
    try:
        running.step(rows, loss=square)
    except li.StateError as error:
        said = str(error)
        assert "'a'" in said
        assert "'b'" in said
        assert not any(running.n_steps.values())
        return
    for name in given:
        alone = plain_loop(
            seeded(make), name, given[name], [[rows]], lambda _, out, __: square(out)
        )
        check_equal(running.model, alone, name)


def test_rows_that_meet_in_a_later_forward_are_refused() -> None:
    running = Trials(linear(), TWO)
    running.step(ROWS, loss=square)
    with untouched(running, "'a'", "'b'"):
        running.step(ROWS, loss=square, forward=lambda x: (y := running.model(x)) - y.mean(0))


# ------------------------------------------------------------------- steps that would be wrong


@dataclass(frozen=True)
class Wrong:
    names: tuple[str, ...]
    make: Callable[[], Any] = linear
    batch: Any = ROWS
    loss: Any = square
    forward: Callable[[Any, Any], Any] | None = None
    since: Callable[[Any], Any] = id
    packed: bool = False
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


def hiding(model: Any, batch: Any) -> Any:
    return SimpleNamespace(logits=model(batch["input_ids"]).logits)


def detached() -> Any:
    return nn.Sequential(nn.Linear(4, 4), Function(Tensor.detach), nn.Linear(4, 4))


WRONG = {
    "a mean over the batch": of_tokens("mean", forward=lambda model, b: model(**b)),
    "a base with dropout": Wrong(("random",), lambda: after(nn.Dropout(0.5))),
    "a base that remembers": Wrong(("again",), lambda: after(Function(lambda x: x * next(TICKS)))),
    "NaN of the base": Wrong(("NaN", "'a'"), batch=ROWS * torch.nan),
    "an output that hides its tensors": of_tokens("SimpleNamespace", forward=hiding),
    "no batch of a trial": Wrong(("'b'",), batch={"a": (ROWS,)}),
    "a batch of no trial": Wrong(("'typo'",), batch={"typo": (ROWS,)}),
    "unequal widths": Wrong(("4, 5",), batch={"a": (ROWS,), "b": (torch.ones(2, 5),)}),
    "unequal rows": Wrong(("[2, 3]",), batch=(ROWS, torch.ones(3, 4))),
    "0-dim entries": one_for_all(torch.tensor(1.0), torch.tensor(2.0), "1.0", "2.0"),
    "numbers": one_for_all(1.0, 2.0, "1.0", "2.0"),
    "dtypes": one_for_all(torch.ones(2), torch.ones(2).double(), "float32", "float64"),
    "a loss of each row": Wrong(("(2,)", "mean"), loss=lambda out, _: out[:, 0]),
    "a loss without a gradient": Wrong(("gradient",), loss=lambda out, _: out.detach().sum()),
    "a loss that leaves a trial out": Wrong(("'b'",), detached, targets=("all-linear", "0")),
    "the loss of the next token for another model": Wrong(
        ("BertForSequenceClassification", "loss="), of_bert, loss=None
    ),
    "labels of another length": of_tokens("'b'", "(2, 6)", "(2, 7)", b=shorter),
    "labels that are all too short": of_tokens("labels", a=shorter, b=shorter),
    "labels that are no tokens": of_tokens("'b'", "31", b=lambda ids: ids + 31),
    "labels that are all ignored": of_tokens("'b'", "-100", b=lambda ids: ids * 0 - 100),
    "labels that are floats": of_tokens("float64", a=Tensor.double, b=Tensor.double),
    "packed rows that meet": Wrong(
        ("packed", "use_cache"),
        of_llama,
        {"input_ids": torch.ones(1, 4, dtype=torch.int64)},
        lambda out, _: out.logits.sum(),
        packed=True,
    ),
    "packed rows in two": Wrong(("(2, 4)",), of_llama, torch.ones(2, 4), packed=True),
    "moved since": Wrong(("cast",), since=nn.Module.double),
    "frozen since": Wrong(("'b'", "train_only"), since=lambda model: li.train_only(model, "a")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_step_that_would_be_wrong_is_refused_and_changes_nothing(case: str) -> None:
    wrong = WRONG[case]
    of_a, of_b = wrong.targets
    running = Trials(wrong.make().train(), trials(a=of_a, b=of_b), packed=wrong.packed)
    wrong.since(running.model)
    forward = wrong.forward and partial(wrong.forward, running.model)
    with untouched(running, *wrong.names):
        running.step(wrong.batch, loss=wrong.loss, forward=forward)


@pytest.mark.parametrize("source", [random, np.random], ids=["random", "numpy"])
def test_a_base_that_draws_numbers_of_python_or_numpy_is_refused_and_draws_none(source) -> None:
    source.seed(1)
    first = source.random()
    source.seed(1)
    layer = Function(lambda x: x if source.random() < 1e-9 else x.tanh())
    running = Trials(after(layer), TWO)
    with untouched(running, "random"):
        running.step(ROWS, loss=square)
    assert source.random() == first


def test_padding_that_changes_an_output_is_refused() -> None:
    """Without a mask, in a later step too; or since there are as many outputs as rows."""
    model = of_bert().double()
    running, rows = Trials(model, BERT_TRIALS), batches(BERT_TRIALS, 0, {})
    for i, (name, batch) in enumerate(rows.items()):
        ids = batch["input_ids"][:, : 4 + i]
        rows[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def by_row(batch: Any) -> tuple[Tensor, ...]:
        logits = model(**batch).logits
        return (logits,) * len(logits)

    with untouched(running, "padding", "'all'"):
        running.step(rows, forward=by_row, loss=lambda out, _: square(out[0]))
    running.step(rows, loss=lambda out, _: square(out.logits))
    for batch in rows.values():
        del batch["attention_mask"]
    with untouched(running, "padding", "'all'"):
        running.step(rows, loss=lambda out, _: square(out.logits))


def test_a_loss_that_writes_into_the_batch_of_others_is_refused() -> None:
    running = Trials(linear(), TWO)

    def normalized(out: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"]
        return (out - labels.sub_(labels.mean() + 1)).square().mean()

    batch = {"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}
    how = {"forward": lambda b: running.model(b["x"]), "loss": normalized}
    with untouched(running, "'a'", "copy"):
        running.step(batch, **how)
    own = {n: {key: t.clone() for key, t in batch.items()} for n in "ab"}
    running.step(own, **how)  # which nobody else reads


def test_entries_that_are_named_as_trials_are_taken_for_neither() -> None:
    def both(out: Any, batch: Any) -> Tensor:
        return square(out - (batch["y"] if isinstance(batch, dict) else batch))

    rows = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    running = Trials(linear(), dict.fromkeys("xy", TWO["a"]))
    how = {"forward": lambda b: running.model(b["x"] if isinstance(b, dict) else b), "loss": both}
    with untouched(running, "'x'", "'y'", "by_name=True", "by_name=False"):
        running.step(rows, **how)
    one = running.evaluate(rows, by_name=False, **how)
    with torch.no_grad():
        wanted = float(both(running.model[0](rows["x"]), rows))
    assert one["x"] == one["y"] == pytest.approx(wanted, rel=1e-6)
    each = running.evaluate(rows, by_name=True, **how)
    assert each["x"] != one["x"]


def two_dtypes() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())


CANNOT_RUN: dict[str, tuple[Callable[[], Any], dict[str, Trial], list[str]]] = {
    "no match": (linear, trials(a="0", b="fd"), ["fd"]),
    "LSTM": (
        lambda: nn.Sequential(nn.LSTM(4, 4)), trials(a="0.weight_ih_l0"), ["0.weight", "LSTM"],
    ),
    "Bilinear": (
        lambda: nn.Sequential(nn.Bilinear(4, 4, 4)), trials(a="0"), ["0.weight", "Bilinear"],
    ),
    "tokens that are sorted by expert": (
        lambda: experts("llama4")[0], trials(a=expert_rule("in_out")), ["gate_up_proj"],
    ),
    "two dtypes": (two_dtypes, trials(a="0|1"), ["float32", "float64"]),
    "dropout of tokens": (
        lambda: nn.Sequential(nn.Embedding(4, 4)),
        trials(a={"match": "0", "dropout": 0.1}), ["dropout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_RUN)
def test_trials_that_cannot_run_leave_nothing_behind(case: str) -> None:
    make, given, names = CANNOT_RUN[case]
    model = make()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with refused(li.LoraInjectError, *names):
        Trials(model, given)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0}, {"clip": -1}, {"schedule": "cosine"}, {"betas": (0.9, 1.5)}, {"seed": 2**64}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: Any) -> None:
    with refused(li.ConfigError, "Trial."):
        Trial({"targets": ["fc"]}, **{"lr": 1e-2} | settings)

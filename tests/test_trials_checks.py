"""Trials: what would make a trial other than the same run alone is refused, and changes nothing."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.experts import expert_rule, experts
from helpers.trials import BERT_TRIALS, batches, check_equal, of_bert, of_llama, values
from torch import Tensor, nn

import lora_inject as li
from lora_inject import Trial, Trials


def trials(**targets: Any) -> dict[str, Trial]:
    return {n: Trial({"rank": 1, "targets": [target]}, lr=1e-2) for n, target in targets.items()}


TWO = trials(a="all-linear", b="all-linear")
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
TICKS = count()
MEET = "the rows of 'a' change the outputs of 'b'"


def linear() -> Any:
    return nn.Sequential(nn.Linear(4, 4))


def square(out: Any, _: Any = None) -> Tensor:
    return (out - 1).square().mean()


def refused(running: Trials, words: str, batch: Any, **how: Any) -> None:
    """Run what must raise, and see that neither a value nor a count of steps is another."""
    before = {name: values(running.model, name) for name in running.trials}
    n_steps = dict(running.n_steps)
    with pytest.raises(li.StateError, match=words):
        running.step(batch, **how)
    assert running.n_steps == n_steps
    for name, tensors in before.items():
        check_equal(running.model, tensors, name, 0.0)


def upstream(first: nn.Module) -> Any:
    return nn.Sequential(first, nn.Linear(4, 4))


def mixing() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Positions(nn.Module):
    """A projection of positions, which are no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.places = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.places(torch.eye(4))


@dataclass(frozen=True)
class Wrong:
    words: str
    make: Callable[[], Any] = linear
    batch: Any = ROWS
    loss: Any = square
    forward: Callable[[Any, Any], Any] | None = None
    since: Callable[[Any], Any] = id
    packed: bool = False
    targets: tuple[str, str] = ("all-linear", "all-linear")


def one_for_all(of_a: Any, of_b: Any, words: str) -> Wrong:
    """A batch with an entry that is one for all trials, and differs."""
    batch = {n: {"x": torch.ones(2, 4), "s": s} for n, s in (("a", of_a), ("b", of_b))}
    return Wrong(words, batch=batch, forward=lambda model, b: model(b["x"]) * b["s"])


def of_tokens(words: str, forward: Any = None, **labels: Any) -> Wrong:
    """Rows of a language model with its own loss."""
    rows = batches("ab", 0, {})
    for name, change in labels.items():
        rows[name]["labels"] = change(rows[name]["labels"])
    return Wrong(words, of_llama, rows, None, forward)


def shorter(ids: Tensor) -> Tensor:
    return ids[:, 1:]


def of_ids() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), Function(lambda x: x - x.mean((0, 1))))


def centering() -> nn.Module:
    return Function(lambda x: x - x.mean(0))


UPSTREAM: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "rows that meet": (centering, ROWS),
    "equal rows that meet": (centering, torch.ones(1, 4)),
    "rows that meet slightly": (lambda: Function(lambda x: x * (1 + 1e-6 * x.sum())), ROWS),
    "tokens that meet": (of_ids, torch.tensor([[1, 2, 3], [4, 5, 6]])),
    "equal tokens that meet": (of_ids, torch.full((2, 3), 5)),
}
WRONG = {
    f"{name} before the first adapter": Wrong(MEET, lambda first=first: upstream(first()), rows)
    for name, (first, rows) in UPSTREAM.items()
}
WRONG |= {
    "rows that meet": Wrong(MEET, mixing),
    "rows that meet in a layer of a later trial": Wrong(
        "the rows of 'b' change the outputs of 'a'",
        Positions,
        torch.randn(1, 4, 4),
        targets=("fc", "places"),
    ),
    "a mean over the batch": of_tokens(
        "a mean over the batch would mix the trials", forward=lambda model, b: model(**b)
    ),
    "a base with dropout": Wrong(
        "draws random numbers", lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    ),
    "a base that remembers": Wrong(
        "returns other values when it runs again",
        lambda: upstream(Function(lambda x: x * next(TICKS))),
    ),
    "NaN of the base": Wrong(
        "returns NaN for the rows of 'a' before any training", batch=ROWS * torch.nan
    ),
    "an output that hides its tensors": of_tokens(
        "a SimpleNamespace, in which there is no tensor",
        forward=lambda model, b: SimpleNamespace(logits=model(b["input_ids"]).logits),
    ),
    "no batch of a trial": Wrong("there is no batch for 'b'", batch={"a": (ROWS,)}),
    "a batch of no trial": Wrong("there is no trial 'typo'", batch={"typo": (ROWS,)}),
    "unequal widths": Wrong("4, 5 features", batch={"a": (ROWS,), "b": (torch.ones(2, 5),)}),
    "unequal rows": Wrong(r"its tensors have \[2, 3\] rows", batch=(ROWS, torch.ones(3, 4))),
    "0-dim entries": one_for_all(
        torch.tensor(1.0), torch.tensor(2.0), r"Tensor\(1.0\) of torch.float32 and Tensor\(2.0\)"
    ),
    "numbers": one_for_all(1.0, 2.0, "an entry without rows differs: float 1.0 and float 2.0"),
    "dtypes": one_for_all(torch.ones(2), torch.ones(2).double(), "float32 and .*float64"),
    "a loss of each row": Wrong(
        r"it has the shape \(2,\). Return its mean", loss=lambda out, _: out[:, 0]
    ),
    "a loss without a gradient": Wrong(
        "no gradient leads from it to A and B", loss=lambda out, _: out.detach().sum()
    ),
    "a loss that leaves a trial out": Wrong(
        "loss of trial 'b': no gradient leads from it to A",
        lambda: nn.Sequential(nn.Linear(4, 4), Function(Tensor.detach), nn.Linear(4, 4)),
        targets=("all-linear", "0"),
    ),
    "the loss of the next token for a model with another": Wrong(
        "BertForSequenceClassification has another.*loss=", of_bert, loss=None
    ),
    "labels of another length": of_tokens(
        r"batch of 'b': its labels have the shape \(2, 6\), and its input_ids \(2, 7\)", b=shorter
    ),
    "labels that are all too short": of_tokens(
        r"logits of shape .* for \d+ labels\. Give a label for each", a=shorter, b=shorter
    ),
    "labels that are no tokens": of_tokens(
        r"'b'.*a label is \d\d, and the logits are of 31 tokens", b=lambda ids: ids + 31
    ),
    "labels that are all ignored": of_tokens(
        r"'b'.*each label after the first of a row is -100", b=lambda ids: ids * 0 - 100
    ),
    "labels that are floats": of_tokens(
        r"labels of torch.int64, and these are torch.float64", a=Tensor.double, b=Tensor.double
    ),
    "packed rows that meet": Wrong(
        "does not keep packed .*use_cache",
        of_llama,
        {"input_ids": torch.ones(1, 4, dtype=torch.int64)},
        lambda out, _: out.logits.sum(),
        packed=True,
    ),
    "packed rows in two": Wrong(
        r"\(2, 4\).*Packed, each is \(1, tokens, ...\)", of_llama, torch.ones(2, 4), packed=True
    ),
    "moved since": Wrong(
        "moved, cast or sharded since the trials were made", since=nn.Module.double
    ),
    "frozen since": Wrong(
        r"trial 'b': its tensors were frozen .*train_only",
        since=lambda model: li.train_only(model, "a"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_step_that_would_be_wrong_is_refused_and_changes_nothing(case: str) -> None:
    wrong = WRONG[case]
    of_a, of_b = wrong.targets
    running = Trials(wrong.make().train(), trials(a=of_a, b=of_b), packed=wrong.packed)
    wrong.since(running.model)
    forward = wrong.forward and partial(wrong.forward, running.model)
    refused(running, wrong.words, wrong.batch, loss=wrong.loss, forward=forward)


def test_what_a_run_has_done_before_hides_no_mixing_of_rows() -> None:
    running = Trials(mixing().train(), TWO)
    running.evaluate(ROWS, loss=square)
    refused(running, MEET, ROWS, loss=square)
    running = Trials(linear(), TWO)
    running.step(ROWS, loss=square)
    centered = lambda x: (y := running.model(x)) - y.mean(0)  # noqa: E731
    refused(running, MEET, ROWS, forward=centered, loss=square)


@pytest.mark.parametrize("source", [random, np.random], ids=["random", "numpy"])
def test_a_base_that_draws_numbers_of_python_or_numpy_is_refused_and_draws_none(source) -> None:
    source.seed(1)
    first = source.random()
    source.seed(1)
    layer = Function(lambda x: x if source.random() < 1e-9 else x.tanh())
    running = Trials(upstream(layer), TWO)
    refused(running, "draws random numbers, one stream for all trials", ROWS, loss=square)
    assert source.random() == first


def test_padding_that_changes_an_output_is_refused() -> None:
    """Without a mask, in a later step too; or since there are as many outputs as rows."""
    words, model = "padding to one length changes the outputs of 'all'", of_bert().double()
    running, rows = Trials(model, BERT_TRIALS), batches(BERT_TRIALS, 0, {})
    for i, (name, batch) in enumerate(rows.items()):
        ids = batch["input_ids"][:, : 4 + i]
        rows[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def by_row(batch: Any) -> tuple[Tensor, ...]:
        logits = model(**batch).logits
        return (logits,) * len(logits)

    refused(running, words, rows, forward=by_row, loss=lambda out, _: square(out[0]))
    running.step(rows, loss=lambda out, _: square(out.logits))
    for batch in rows.values():
        del batch["attention_mask"]
    refused(running, words, rows, loss=lambda out, _: square(out.logits))


def test_a_loss_that_writes_into_the_batch_of_others_is_refused() -> None:
    running = Trials(linear(), TWO)

    def normalized(out: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"]
        return (out - labels.sub_(labels.mean() + 1)).square().mean()

    batch = {"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}
    how = {"forward": lambda b: running.model(b["x"]), "loss": normalized}
    refused(running, r"loss of trial 'a': it writes into .*a copy", batch, **how)
    own = {n: {key: t.clone() for key, t in batch.items()} for n in "ab"}
    running.step(own, **how)  # which nobody else reads


def test_entries_that_are_named_as_trials_are_taken_for_neither() -> None:
    def both(out: Any, batch: Any) -> Tensor:
        return square(out - (batch["y"] if isinstance(batch, dict) else batch))

    rows = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    running = Trials(linear(), dict.fromkeys("xy", TWO["a"]))
    how = {"forward": lambda b: running.model(b["x"] if isinstance(b, dict) else b), "loss": both}
    refused(running, r"'x' and 'y' are tensors.*by_name=True.*by_name=Fal", rows, **how)
    one = running.evaluate(rows, by_name=False, **how)
    with torch.no_grad():
        wanted = float(both(running.model[0](rows["x"]), rows))
    assert one["x"] == one["y"] == pytest.approx(wanted, rel=1e-6)
    each = running.evaluate(rows, by_name=True, **how)
    assert each["x"] != one["x"]


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (linear, trials(a="0", b="fd"), "matched none"),
        (
            lambda: nn.Sequential(nn.LSTM(4, 4)),
            trials(a="0.weight_ih_l0"),
            "it changes '0.weight.*LSTM",
        ),
        (
            lambda: nn.Sequential(nn.Bilinear(4, 4, 4)),
            trials(a="0"),
            "it changes '0.weight.*Bilinear",
        ),
        (
            lambda: experts("llama4")[0],  # whose tokens are sorted by expert
            trials(a=expert_rule("in_out")),
            r"'a': it changes .*gate_up_proj.* Llama4TextExperts",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()),
            trials(a="0|1"),
            "torch.float32 on cpu and torch.float64 on cpu",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(4, 4)),
            trials(a={"match": "0", "dropout": 0.1}),
            "dropout, which is not drawn by trial",
        ),
    ],
    ids=["no match", "LSTM", "Bilinear", "sorted experts", "two dtypes", "dropout of tokens"],
)
def test_trials_that_cannot_run_leave_nothing_behind(make, given, words) -> None:
    model = make()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(li.LoraInjectError, match=words):
        Trials(model, given)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0}, {"clip": -1}, {"schedule": "cosine"}, {"betas": (0.9, 1.5)}, {"seed": 2**64}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(li.ConfigError, match=r"Trial\.\w+: it is .*Give"):
        Trial({"targets": ["fc"]}, **{"lr": 1e-2} | settings)

"""Trials: what would make a trial other than the same run alone is found, or refused in words."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trials import (
    BERT_TRIALS,
    Mixing,
    batches,
    by_hand,
    check_each,
    check_equal,
    of_bert,
    of_llama,
    values,
)
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import lora_inject as li
from lora_inject import Trial, Trials

FC = {"rank": 1, "targets": ["fc"]}
X = torch.randn(4, 5, 3, 4, generator=torch.Generator().manual_seed(1)).double()


def square(out: torch.Tensor, _: Any = None) -> torch.Tensor:
    return (out - 1).square().mean()


def test_an_evaluation_before_the_first_step_hides_no_mixing_of_rows_in_training() -> None:
    running = Trials(Mixing().train(), {n: Trial(FC, lr=1e-2) for n in "ab"})
    running.evaluate(torch.randn(2, 4), loss=square)
    with pytest.raises(li.StateError, match="the rows of 'a' change the outputs of 'b'"):
        running.step(torch.randn(2, 4), loss=square)
    assert not any(running.n_steps.values())


def test_another_forward_in_a_later_step_is_checked_as_well() -> None:
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    running.step(torch.randn(2, 4), loss=square)
    with pytest.raises(li.StateError, match="the rows of 'a' change the outputs of 'b'"):
        running.step(
            torch.randn(2, 4), forward=lambda x: (y := running.model(x)) - y.mean(0), loss=square
        )
    assert {*running.n_steps.values()} == {1}


ZERO = {"rank": 1, "targets": ["0"]}


class Positions(nn.Module):
    """A projection of positions, which are no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.places = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.places(torch.eye(4))


def test_layers_of_a_later_trial_are_checked_if_no_earlier_one_has_them() -> None:
    trials = {"a": Trial(FC, lr=1e-2), "b": Trial({"rank": 1, "targets": ["places"]}, lr=1e-2)}
    running = Trials(Positions(), trials)
    with pytest.raises(li.StateError, match="the rows of 'b' change the outputs of 'a'"):
        running.step(torch.randn(1, 4, 4), loss=square)


def test_the_check_of_many_trials_runs_two_of_them() -> None:
    running = Trials(
        nn.Sequential(nn.Linear(4, 4)), {f"t{i}": Trial(ZERO, lr=1e-2) for i in range(6)}
    )
    rows: list[int] = []
    running.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    running.step(torch.randn(3, 4), loss=square)
    assert rows == [6, 6, 6, 6, 6, 18]


@pytest.mark.parametrize(
    ("of_a", "of_b", "message"),
    [
        (torch.tensor(1.0), torch.tensor(2.0), r"Tensor\(1.0\) of torch.float32 and Tensor\(2.0\)"),
        (1.0, 2.0, "an entry without rows differs: float 1.0 and float 2.0"),
        (torch.ones(2), torch.tensor(2.0), "their rows differ"),
        (torch.ones(2), torch.ones(2).double(), r"Tensor\(2,\) of torch.float32 and .* of torch.f"),
    ],
    ids=["0-dim", "number", "rows and 0-dim", "dtypes"],
)
def test_entries_that_are_one_for_all_trials_must_not_differ(of_a, of_b, message) -> None:
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    rows = {n: {"x": torch.ones(2, 4), "s": s} for n, s in (("a", of_a), ("b", of_b))}
    options = {"forward": lambda b: running.model(b["x"]) * b["s"], "loss": square}
    with pytest.raises(li.StateError, match=message):
        running.step(rows, **options)
    assert not any(running.n_steps.values())
    if not isinstance(of_a, torch.Tensor) or not of_a.dim():
        rows["b"]["s"] = of_a
        running.step(rows, **options)


def test_nan_that_the_base_returns_is_reported_as_such() -> None:
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    with pytest.raises(li.StateError, match="returns NaN for the rows of 'a' before any training"):
        running.step(torch.full((2, 4), float("nan")), loss=square)


class Heads(nn.Module):
    """Two heads on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.one, self.two = (nn.Linear(4, 4).double() for _ in range(3))
        self.norm = nn.LayerNorm(4).double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.fc(x)
        return self.one(x), self.norm(self.two(x))


def by_branch(out: Any, batch: Any) -> torch.Tensor:
    which = int(batch["which"][0])
    used = out if which == 2 else out[which : which + 1]
    return sum(square(one) for one in used)


@pytest.mark.parametrize("max_tokens", [None, 1], ids=["at once", "in turn"])
def test_a_loss_that_branches_by_trial_leaves_other_branches_as_they_are(max_tokens) -> None:
    branches = {"one": [0] * 4, "two": [1] * 4, "both": [2] * 4, "in turn": [0, 1, 1, 0]}
    rules = {"rank": 1, "targets": ["fc|one|two"], "train": ["norm"]}
    trials = {
        name: Trial(rules, lr=1e-2, weight_decay=0.3, clip=0.5, b_lr_ratio=1 + i % 2, seed=i)
        for i, name in enumerate(branches)
    }
    data = {n: [{"x": x[0], "which": torch.full((3,), k)} for x, k in zip(X, each, strict=True)]
            for n, each in branches.items()}  # fmt: skip
    running = Trials(Heads(), trials, max_tokens=max_tokens)
    for step in range(len(X)):
        rows = {name: each[step] for name, each in data.items()}
        running.step(rows, forward=lambda b: running.model(b["x"]), loss=by_branch)
    for name, trial in trials.items():
        alone = Heads()
        plain = [{"x": one["x"], "labels": one} for one in data[name]]
        by_hand(alone, name, trial, plain, lambda out, b: by_branch(out, b["labels"]))
        check_equal(running.model, alone, name, 1e-11)


def test_a_loss_with_a_term_of_its_own_adapter_equals_a_plain_loop() -> None:
    trials = {
        n: Trial({"rank": 2, "targets": ["fc|one"]}, lr=1e-2, seed=i)
        for i, n in ((0, "a"), (1, "b"))
    }

    def loss(model: nn.Module, name: str, out: Any, decay: bool) -> torch.Tensor:
        own = li.adapter_parameters(model, name).values()
        penalty = sum(p.square().sum() for p in own)
        return penalty if decay else square(out[0]) + penalty

    running = Trials(Heads(), trials)
    for step, x in enumerate(X):
        rows = {n: {"x": x[0], "of": torch.full((3,), i)} for i, n in enumerate(trials)}
        running.step(
            rows,
            forward=lambda b: running.model(b["x"]),
            loss=lambda out, b, s=step: loss(
                running.model, "ab"[int(b["of"][0])], out, s == 2 and bool(b["of"][0])
            ),
        )
    for name, trial in trials.items():
        alone, step = Heads(), iter(range(4))
        by_hand(
            alone, name, trial, [{"x": x[0]} for x in X],
            lambda out, _, m=alone, n=name, s=step: loss(m, n, out, next(s) == 2 and n == "b"),
        )  # fmt: skip
        check_equal(running.model, alone, name)


def test_a_trial_that_no_gradient_reaches_is_an_error_and_not_left_as_it_is() -> None:
    trials = {"a": Trial({"rank": 1, "targets": ["fc|two"]}, lr=1e-2),
              "b": Trial({"rank": 1, "targets": ["two"]}, lr=1e-2)}  # fmt: skip
    running = Trials(Heads(), trials)
    with pytest.raises(li.StateError, match=r"loss of trial 'b': no gradient leads from it to A"):
        running.step(X[0][0], loss=lambda out, _: square(out[0]))
    assert not any(running.n_steps.values())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nan_of_one_packed_trial_reaches_no_other(where) -> None:
    trials = {n: Trial({"rank": 2, "dropout": 0.2, "targets": ["[qv]_proj"]}, lr=1e-2, seed=i)
              for i, n in enumerate("abc")}  # fmt: skip

    def run(some: dict[str, Trial]) -> Trials:
        running = Trials(of_llama().double().train(), some, packed=True)

        def loss(out: Any, batch: Any) -> torch.Tensor:
            found = li.causal_loss(out, batch)
            is_b = int(batch["labels"][0, 0]) == 7
            wild = where == "backward" and is_b and running.n_steps["b"] == 1
            zero = (out.logits - out.logits.detach()).square().sum()
            return zero.sqrt() + found if wild else found

        for step in range(3):
            rows = batches(some, step, {})
            for name, batch in rows.items():
                batch["labels"] = batch["labels"].clone()
                batch["labels"][:, 0] = -100 if name != "b" else 7
                batch.update({key: t.reshape(1, -1) for key, t in batch.items()})
                batch["position_ids"] = torch.arange(7).repeat(2)[None]
            if where == "forward" and step == 1 and "b" in some:
                for parameter in li.adapter_parameters(running.model, "b").values():
                    parameter.data.fill_(float("nan"))
            forward = lambda b: running.model(  # noqa: E731
                **{k: v for k, v in b.items() if k != "labels"}, use_cache=False
            )
            running.step({n: rows[n] for n in running.running}, forward=forward, loss=loss)
        return running

    together = run(trials)
    assert list(together.stopped) == ["b"]
    for name in "ac":
        check_equal(together.model, run({name: trials[name]}).model, name, 1e-11)


def test_gradients_that_somebody_sets_to_none_train_all_the_same() -> None:
    rules = {"rank": 2, "targets": ["q_proj"]}
    others = {"low": {"targets": ["q_proj", "embed_tokens"]}, "full": {"train": ["norm"]}}
    others["dora"] = {"variant": "dora"}
    trials = {name: Trial(rules | other, lr=1e-2) for name, other in others.items()}

    def run(clears: bool) -> Trials:
        running = Trials(of_llama().double(), trials)
        for step in range(3):
            running.step(batches(trials, step, {}))
            if clears:
                running.model.zero_grad(set_to_none=True)
        return running

    plain, cleared = run(False), run(True)
    for name in trials:
        check_equal(cleared.model, plain.model, name, 0.0)


@pytest.mark.parametrize("verb", ["step", "evaluate"])
@pytest.mark.parametrize("which", ["all", "qv"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids + 31, r"'{}'.*a label is \d\d, and the logits are of 31 tokens"),
        (lambda ids: ids - 101, r"'{}'.*a label is -\d+, and the logits"),
        (lambda ids: ids * 0 - 100, r"'{}'.*each label after the first of a row is -100"),
        (lambda ids: ids.double(), r"labels of torch.int64, and these are torch.float64"),
        (lambda ids: ids[:, 1:], r"logits of shape \(.*\) for \d+ labels. Give a label for each"),
    ],
    ids=["too large", "negative", "all ignored", "floats", "too few"],
)
def test_labels_that_are_no_tokens_are_refused_in_words(verb, which, change, message) -> None:
    """Of equally many rows, and of fewer of one trial."""
    trials = {name: Trial({"rank": 2, "targets": ["q_proj"]}, lr=1e-2) for name in ("all", "qv")}
    for n_rows in ({}, {"all": 1}):
        running, rows = Trials(of_llama(), trials), batches(trials, 0, n_rows)
        changed = [which] if "{}" in message else list(trials)  # rows of all have one form
        for name in changed:
            rows[name]["labels"] = change(rows[name]["labels"])
        before = {name: values(running.model, name) for name in trials}
        with pytest.raises(li.StateError, match=message.replace("{}", which)):
            getattr(running, verb)(rows)
        for name in trials:
            check_equal(running.model, before[name], name, 0.0)


def test_labels_that_are_all_too_short_do_not_ask_for_padding() -> None:
    running = Trials(of_llama(), {n: Trial({"targets": ["q_proj"]}, lr=1e-2) for n in "ab"})
    rows = {n: {key: t[:, i:] for key, t in b.items()}
            for i, (n, b) in enumerate(batches("ab", 0, {}).items())}  # fmt: skip
    for batch in rows.values():
        batch["labels"] = batch["labels"][:, 1:]
    with pytest.raises(li.StateError, match=r"\(7, 6\).* \(a label for each token, or -100\)"):
        running.step(rows)


def test_trials_that_were_frozen_since_are_refused() -> None:
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    li.train_only(running.model, "a")
    with pytest.raises(li.StateError, match=r"trial 'b': its tensors were frozen .*train_only"):
        running.step(torch.ones(2, 4), loss=square)


# ------------------------------------------------------------------------- before the first adapter


class Upstream(nn.Module):
    """Something before the first adapter."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fc = first, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.first(x))


class Centered(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Slightly(nn.Module):
    """An influence far below any tolerance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-6 * x.sum())


class Looked(nn.Module):
    """A table, whose rows are centered over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        return rows - rows.mean((0, 1))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("first", "rows"),
    [
        (lambda: nn.BatchNorm1d(4), torch.randn(2, 4)),
        (Centered, torch.randn(2, 4)),
        (Centered, torch.ones(1, 4)),
        (Slightly, torch.randn(2, 4)),
        (Looked, IDS),
        (Looked, IDS[:1]),
        (Looked, torch.full((2, 3), 5)),
    ],
    ids=["batch norm", "centering", "equal rows", "slight", "ids", "a row", "equal ids"],
)
@pytest.mark.parametrize("each", [True, False], ids=["by name", "one for all"])
def test_rows_that_mix_before_the_first_adapter_are_refused(first, rows, each) -> None:
    running = Trials(Upstream(first()).train(), {n: Trial(FC, lr=1e-2) for n in "ab"})
    before = {n: values(running.model, n) for n in "ab"}
    batch = {"a": (rows,), "b": (rows.flip(0),)} if each else rows
    with pytest.raises(li.StateError, match="the rows of 'a' change the outputs of 'b'"):
        running.step(batch, loss=square)
    assert not any(running.n_steps.values())
    for name in "ab":
        check_equal(running.model, before[name], name, 0.0)


class Dropping(nn.Module):
    """A layer that is dropped by numbers of Python, or of NumPy."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.draw() < 1e-9 else x.tanh()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_a_base_that_draws_numbers_of_python_or_numpy_is_refused(draw) -> None:
    running = Trials(Upstream(Dropping(draw)), {n: Trial(FC, lr=1e-2) for n in "ab"})
    random.seed(1)
    np.random.seed(1)
    wanted = draw()
    random.seed(1)
    np.random.seed(1)
    with pytest.raises(li.StateError, match="draws random numbers, one stream for all trials"):
        running.step(torch.randn(2, 4), loss=square)
    assert draw() == wanted


class Once(nn.Module):
    """A layer that is changed by each of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return x * self.n


def test_a_forward_that_remembers_is_refused() -> None:
    running = Trials(Upstream(Once()), {n: Trial(FC, lr=1e-2) for n in "ab"})
    with pytest.raises(li.StateError, match="returns other values when it runs again"):
        running.step(torch.randn(2, 4), loss=square)


def test_a_forward_may_change_the_batch_that_it_gets() -> None:
    def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
        batch.pop("labels")
        return model(batch.pop("x").mul_(2))

    data = {"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}
    kept = {key: t.clone() for key, t in data.items()}
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    for _ in range(2):
        running.step(data, forward=partial(forward, running.model), loss=square)
    assert all(torch.equal(data[key], t) for key, t in kept.items())


def normalized(out: torch.Tensor, batch: Any) -> torch.Tensor:
    labels = batch["labels"]
    return (out - labels.sub_(labels.mean() + 1)).square().mean()


@pytest.mark.parametrize("verb", ["step", "evaluate"])
@pytest.mark.parametrize("each", [True, False], ids=["by name", "one for all"])
def test_a_loss_that_writes_into_the_batch_of_others_is_refused(verb, each) -> None:
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "ab"})
    before = {n: values(running.model, n) for n in "ab"}
    batch = {"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}
    given = dict.fromkeys("ab", batch) if each else batch
    how = {"forward": lambda b: running.model(b["x"]), "loss": normalized}
    with pytest.raises(li.StateError, match=r"loss of trial 'a': it writes into .*a copy"):
        getattr(running, verb)(given, **how)
    for name in "ab":
        check_equal(running.model, before[name], name, 0.0)
    own = {n: {key: t.clone() for key, t in batch.items()} for n in "ab"}
    getattr(running, verb)(own, **how)  # which nobody else reads


@pytest.mark.parametrize("verb", ["step", "evaluate"])
def test_entries_that_are_named_as_trials_are_taken_for_neither(verb) -> None:
    def both(out: Any, batch: Any) -> torch.Tensor:
        return (out - (batch["y"] if isinstance(batch, dict) else batch)).square().mean()

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    running = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(ZERO, lr=1e-2) for n in "xy"})
    how = {"forward": lambda b: running.model(b["x"] if isinstance(b, dict) else b), "loss": both}
    with pytest.raises(li.StateError, match=r"'x' and 'y' are tensors.*by_name=True.*by_name=Fal"):
        getattr(running, verb)({"x": x, "y": y}, **how)
    one = running.evaluate({"x": x, "y": y}, by_name=False, **how)
    with torch.no_grad():
        wanted = float((running.model[0](x) - y).square().mean())
    assert one["x"] == one["y"] == pytest.approx(wanted, rel=1e-6)
    each = running.evaluate({"x": x, "y": y}, by_name=True, **how)
    assert each["x"] != one["x"]
    with pytest.raises(li.StateError, match="by_name=True: it is a Tensor"):
        getattr(running, verb)(x, by_name=True, **how)


# ---------------------------------------------------------------------------------- unequal lengths


def of_t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                      dropout_rate=0.0, feed_forward_proj="gated-gelu")  # fmt: skip
    return T5ForConditionalGeneration(config).double().train()


def seq2seq(out: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())


T5_TRIALS = {
    "all": Trial({"rank": 2, "dropout": 0.2, "targets": ["[qkvo]|wi_.|wo"]}, lr=1e-2, clip=0.1),
    "qv": Trial({"rank": 2, "dropout": 0.1, "targets": ["[qv]"]}, lr=1e-2, seed=1),
    "decoder": Trial({"rank": 3, "dropout": 0.3, "targets": [r"decoder\..*\.(q|wo)"]}, lr=1e-2),
}


@pytest.mark.parametrize("n_decoder", [[3, 3, 3], [3, 7, 5]], ids=["shorter", "as long as some"])
def test_dropout_of_a_decoder_is_not_that_of_the_encoders_padding(n_decoder) -> None:
    lengths = {"all": 5, "qv": 7, "decoder": 4}

    def run(some: dict[str, Trial]) -> Trials:
        running = Trials(of_t5(), some)
        for step, n in enumerate(n_decoder):
            rows = {}
            for name in some:
                generator = torch.Generator().manual_seed(step * 100 + len(name))
                ids = torch.randint(1, 31, (2, lengths[name]), generator=generator)
                out = torch.randint(1, 31, (2, n), generator=generator)
                rows[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                              "decoder_input_ids": out, "labels": out.roll(-1, 1)}  # fmt: skip
            running.step(rows, loss=seq2seq)
        return running

    check_each(run, T5_TRIALS)


class Channels(nn.Module):
    """Outputs with channels before positions."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.stride = nn.Linear(4, 4).double(), stride

    def forward(self, x: torch.Tensor) -> tuple[int, torch.Tensor]:
        return 7, self.fc(x).mT[..., :: self.stride]


def test_outputs_are_without_padding_in_any_dimension() -> None:
    trials = {n: Trial(FC, lr=1e-2, seed=i) for i, n in enumerate("ab")}

    def run(some: dict[str, Trial], stride: int = 1) -> Trials:
        running = Trials(Channels(stride), some)
        for x in X:
            rows = {name: x[0][None, : 2 + (name == "a")] for name in some}
            running.step(rows, loss=lambda out, _: square(out[1]), by_name=True)
        return running

    check_each(run, trials)
    with pytest.raises(li.StateError, match="padding to one length changes the outputs of 'b'"):
        run(trials, stride=2)


def test_a_mask_that_a_later_step_leaves_out_is_missed() -> None:
    running = Trials(of_bert().double(), BERT_TRIALS)
    rows = {}
    for i, (name, batch) in enumerate(batches(BERT_TRIALS, 0, {}).items()):
        ids = batch["input_ids"][:, : 4 + i]
        rows[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    running.step(rows, loss=lambda out, _: square(out.logits))
    for batch in rows.values():
        del batch["attention_mask"]
    with pytest.raises(li.StateError, match="padding to one length changes the outputs of 'all'"):
        running.step(rows, loss=lambda out, _: square(out.logits))


# ------------------------------------------------------------------------------------- the settings


def of_masked_words() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=24, vocab_size=31)).eval()


@pytest.mark.parametrize("make", [of_masked_words, of_t5, of_bert])
@pytest.mark.parametrize("verb", ["step", "evaluate"])
def test_the_loss_of_the_next_token_is_not_taken_for_models_with_another(make, verb) -> None:
    model = make().eval()
    running = Trials(model, {"a": Trial({"rank": 1, "targets": ["query|q"]}, lr=1e-2)})
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(li.StateError, match=f"{type(model).__name__} has another.*loss="):
        getattr(running, verb)({"input_ids": ids, "decoder_input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.5)}, r"Trial.betas: it is \(0.9, 1.5\). Give two numbers"),
        ({"betas": 0.9}, "Trial.betas: it is a float. Give two numbers"),
        ({"seed": 0.5}, "Trial.seed: it is 0.5. Give a whole number"),
        ({"seed": 2**64}, "Trial.seed"),
    ],
)
def test_betas_and_seeds_that_torch_would_refuse_later_are_refused(settings, message) -> None:
    with pytest.raises(li.ConfigError, match=message):
        Trial(FC, lr=1e-2, **settings)


def test_adapters_of_two_dtypes_are_refused_and_leave_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with pytest.raises(li.StateError, match=r"torch.float32 on cpu and torch.float64 on cpu"):
        Trials(model, {"a": Trial({"rank": 1, "targets": ["0|1"]}, lr=1e-2)})
    assert not li.adapters(model)
    with pytest.raises(li.StateError, match="max_tokens: it is a str"):
        Trials(model, {"a": Trial(ZERO, lr=1e-2)}, max_tokens="8")


class Noisy(nn.Module):
    """A weight of its own, and dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training) @ self.weight


def test_a_layer_of_a_base_in_eval_mode_stays_in_eval_mode() -> None:
    trials = {n: Trial({"rank": 1, "targets": ["weight"]}, lr=1e-2, seed=i)
              for i, n in enumerate("ab")}  # fmt: skip
    running = Trials(Noisy().eval(), trials)
    for x in X:
        running.step(x[0], loss=square)
    for name, trial in trials.items():
        alone = Noisy().eval()
        by_hand(alone, name, trial, [{"x": x[0]} for x in X], square)
        check_equal(running.model, alone, name)


# ------------------------------------------------------------------- checkpoints and dropping

WAYS = {
    "a": Trial({"rank": 2, "dropout": 0.2, "targets": ["all-linear"]}, lr=1e-2, clip=0.5),
    "b": Trial({"rank": 3, "dropout": 0.1, "targets": ["[qv]_proj"]}, lr=1e-2, seed=1),
}


def test_each_trial_equals_a_plain_loop_under_reentrant_checkpoints() -> None:
    def make() -> Any:
        model = of_llama().double().train()
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        return model

    running = Trials(make(), WAYS)
    data = [batches("a", step, {})["a"] for step in range(3)]
    for batch in data:
        running.step(batch)
    for name, trial in WAYS.items():
        alone = make()
        by_hand(alone, name, trial, data, li.causal_loss)
        check_equal(running.model, alone, name)


def test_a_run_goes_on_bit_for_bit_after_a_trial_was_dropped(tmp_path: Path) -> None:
    rules = {"rank": 2, "dropout": 0.1, "targets": ["all-linear"]}
    trials = {n: Trial(rules, lr=1e-2, seed=i, clip=0.5) for i, n in enumerate("abcd")}
    running = Trials(of_llama().train(), trials)
    running.step(batches("a", 0, {})["a"])
    running.drop("b")
    running.step(batches("a", 1, {})["a"])
    again = Trials.resume(of_llama().train(), running.save(tmp_path / "run.pt"))
    for step in (2, 3):
        batch = batches("a", step, {})["a"]
        assert again.step(batch) == running.step(batch)
    for name in again.trials:
        check_equal(again.model, running.model, name, 0.0)

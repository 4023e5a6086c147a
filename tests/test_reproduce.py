"""The reproduction runs, resumes and writes what it says it writes; what it finds is never tested.

`--random-weights` stands tiny models and made-up sentences in for the real ones.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import script
from helpers.forks import Fork
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_inject as li

with mock.patch.dict(os.environ):  # which it sets, for a program of its own
    main = script("reproduction.__main__").main
snippets = script("data.snippets")
labs, layers, methods, trials, classifier, together, toy = (
    script(f"reproduction.{name}")
    for name in ("lab", "adapter_layers", "methods", "trials", "classifier", "together", "toy")
)


@pytest.fixture(autouse=True)
def ctrl_c():
    """`main` listens for Ctrl-C: afterwards it is pytest's again."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def lab(tmp_path):
    return labs.Lab(tmp_path / "results", labs.QUICK, random_weights=True, say=lambda _: None)


def finished(folder: Path) -> dict[str, int]:
    """Names of the records there are, and when each was written."""
    records = folder / "records"
    return {str(p.relative_to(records)): p.stat().st_mtime_ns for p in records.rglob("*.json")}


def run_main(argv: list[str]) -> None:
    sys.exit(main(argv))


@pytest.mark.slow
def test_all_stages_run_survive_ctrl_c_and_a_kill_and_write_the_document(tmp_path, forks):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    words = ["--quick", "--random-weights", "--folder", str(folder)]

    def stop(number: signal.Signals, after: int) -> Fork:
        """Run until there are some more records, and send a signal."""
        fork, wanted = forks.start(run_main, words), len(finished(folder)) + after
        while len(finished(folder)) < wanted:
            time.sleep(0.01)
        os.kill(fork.pid, number)
        return fork

    interrupted = stop(signal.SIGINT, 1)
    assert interrupted.wait() == 130
    assert "goes on from there" in interrupted.out() + interrupted.err()
    assert stop(signal.SIGKILL, 5).wait() == -signal.SIGKILL
    kept = finished(folder)
    for name in kept:
        assert "result" in json.loads((folder / "records" / name).read_text())

    assert main(words) == 0
    after = finished(folder)
    assert kept.items() <= after.items()  # none of them was run again
    assert list(folder.rglob("*.partial")) == []

    text = (folder / "reproduction.md").read_text()
    assert "the numbers mean nothing" in text
    assert "not run" not in text

    assert main(words) == 0
    assert finished(folder) == after


def test_a_run_is_done_once_and_again_where_its_settings_or_weights_change(lab, tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": len(calls), "shape": (2, 3)}

    assert lab.run("a/b", {"rate": 0.1}, work) == {"value": 1, "shape": [2, 3]}
    assert lab.run("a/b", {"rate": 0.1}, work) == {"value": 1, "shape": [2, 3]}
    assert lab.run("a/b", {"rate": 0.2}, work)["value"] == 2
    assert lab.run("a/c", {"rate": 0.2}, work)["value"] == 3
    real = labs.Lab(tmp_path / "results", labs.QUICK, random_weights=False, say=lambda _: None)
    assert real.run("a/c", {"rate": 0.2}, work)["value"] == 4


DIM, INNER, DEPTH = 64, 128, 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora-qv-r8", DEPTH * 2 * 8 * 2 * DIM),
        # q, k, v, o, two norms, the MLP's output and inside of each; embeddings' norm, pooler
        ("bitfit", DEPTH * (7 * DIM + INNER) + 2 * DIM),
        ("adapter-h", layers.count(2 * DEPTH, DIM, 8, 2 * DEPTH)),
        ("adapter-l", layers.count(DEPTH, DIM, 16, DEPTH)),
    ],
)
def test_training_moves_what_the_formula_counts_and_follows_from_the_seed(lab, name, expected):
    encoder, tokenizer = lab.encoder()
    rows = classifier.encode(tokenizer, lab.sentences().train, lab.sizes.max_tokens)
    model = classifier.Classifier(encoder).eval()
    start = model(*classifier.collate(rows[:1])[:2])
    methods.METHODS[name].apply(model)
    assert torch.equal(model(*classifier.collate(rows[:1])[:2]), start)
    if not li.adapters(model):
        model.head.requires_grad_(True)
    groups = classifier.groups_of(model, 1e-2, 1e-2)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    assert counts == [expected, 2 * DIM + 2]
    trains = {key: p.requires_grad for key, p in model.named_parameters()}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = classifier.train(model, groups, rows * 3, 16, seed=0)
    assert sum(losses[-3:]) < sum(losses[:3])
    moved = {key: not torch.equal(p, before[key]) for key, p in model.named_parameters()}
    # what has no part in the forward (the pooler) gets no gradient
    assert all(moved[key] == trains[key] for key in trains if "pooler" not in key)
    one, same, other = (
        classifier.fine_tune(lab, methods.METHODS[name], seed, 1e-2, 1e-2, "test")["train_losses"]
        for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize("normed", [False, True])
def test_an_adapter_layer_is_its_formula(normed):
    torch.manual_seed(0)
    layer = layers.Bottleneck(6, 3, normed=normed).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    inner = x
    if normed:
        off = x - x.mean(-1, keepdim=True)
        inner = off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        inner = inner * layer.norm.weight + layer.norm.bias
    down = inner @ layer.down.weight.T + layer.down.bias
    act = down * 0.5 * (1 + torch.erf(down / math.sqrt(2)))
    expected = x + act @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_padding_changes_no_logit():
    torch.manual_seed(0)
    model = classifier.Classifier(toy.encoder()[0]).eval()
    short, long = ([5, 6, 7], 0), ([9] * 8, 1)
    padded = model(*classifier.collate([short, long])[:2])
    torch.testing.assert_close(padded[:1], model(*classifier.collate([short])[:2]))


def test_full_rank_and_all_biases_reach_any_update_of_an_encoder(lab):
    reached = together.full_rank(lab)
    assert reached["full"] < 1e-12
    assert reached["base"] > reached["half"] > 1e-3


def test_a_gap_is_paired_by_row_and_has_the_error_of_rows_and_seeds():
    def scores(*rights: str):
        runs = [{"right": right, "accuracy": right.count("1") / len(right)} for right in rights]
        return trials.Scores(methods.METHODS["full"], dict(enumerate(runs)))

    one, other = scores("1111", "1110"), scores("1100", "1010")
    gap = trials.gap(one, other)
    assert gap.difference == pytest.approx((2 / 4 + 1 / 4) / 2)
    rows = torch.tensor([0.0, 0.5, 0.5, 0.5])  # mean over seeds of one minus other
    of_seeds = torch.tensor([0.5, 0.25]).std() / 2**0.5
    assert gap.error == pytest.approx(math.hypot(rows.std() / 4**0.5, of_seeds))
    assert trials.gap(one, scores()) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.text("abc ", min_size=1)), max_size=60))
def test_a_split_has_every_sentence_once_and_no_review_twice(rows):
    made = [snippets.Snippet(f"{review}_{i}", text, 1.0) for i, (review, text) in enumerate(rows)]
    split = snippets.split(made)
    parts = [split.train, split.dev, split.test]
    assert sorted((s for part in parts for s in part), key=str) == sorted(made, key=str)
    reviews = [{s.id.partition("_")[0] for s in part} for part in parts]
    assert sum(map(len, reviews)) == len(set().union(*reviews))

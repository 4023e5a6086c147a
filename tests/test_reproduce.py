"""The reproduction runs, resumes and writes what it says it writes; what it finds is never tested.

Tiny random models and made-up sentences stand in for the real ones (`--random-weights`),
so that every stage is run end to end without a download. Claims that are exact by construction
(full rank, what each method trains, the formula of adapter layers) are tested for themselves.
"""

import json
import math
import os
import re
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


# ---------------------------------------------------------------------------------- the whole of it


def finished(folder: Path) -> dict[str, int]:
    """Names of the records there are, and when each was written."""
    records = folder / "records"
    return {str(p.relative_to(records)): p.stat().st_mtime_ns for p in records.rglob("*.json")}


def run_main(argv: list[str]) -> None:
    sys.exit(main(argv))


@pytest.mark.slow
def test_all_stages_run_survive_ctrl_c_and_a_kill_and_write_the_document(tmp_path, capsys, forks):
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
    started = re.findall(r"^[\d:]+ (\S+) \.\.\.$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(f"{name}.json" for name in started) == sorted(after.keys() - kept.keys())
    assert list(folder.rglob("*.partial")) == []

    text = (folder / "reproduction.md").read_text()
    assert "the numbers mean nothing" in text
    assert "not run" not in text
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert pictures
    assert all((folder / picture).stat().st_size > 1_000 for picture in pictures)

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


# ------------------------------------------------------------------------------- what each trains


def with_method(name: str, encoder: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = classifier.Classifier(encoder).eval()
    methods.METHODS[name].apply(model)
    if not li.adapters(model):
        model.head.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", ["full", "top2", "bitfit", "lora-qv-r8", "adapter-h", "adapter-l"])
def test_training_moves_what_trains_and_nothing_else_and_follows_from_the_seed(lab, name):
    encoder, tokenizer = lab.encoder()
    rows = classifier.encode(tokenizer, lab.sentences().train, lab.sizes.max_tokens)
    model = with_method(name, encoder)
    trains = {key: p.requires_grad for key, p in model.named_parameters()}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    groups = classifier.groups_of(model, 1e-2, 1e-2)
    losses = classifier.train(model, groups, rows * 3, 16, seed=0)
    assert sum(losses[-3:]) < sum(losses[:3])
    moved = {key: not torch.equal(p, before[key]) for key, p in model.named_parameters()}
    assert all(trains[key] for key in moved if moved[key])
    # what has no part in the forward (the pooler) or no row in the batch gets no gradient
    assert all(moved[key] for key in trains if trains[key] and "pooler" not in key)
    one, same, other = (
        classifier.fine_tune(lab, methods.METHODS[name], seed, 1e-2, 1e-2, "test")["train_losses"]
        for seed in (0, 0, 1)
    )
    assert one == same != other


def trained(name: str) -> list[int]:
    """Elements that train besides the head, and in the head."""
    groups = classifier.groups_of(with_method(name, toy.encoder()[0]), 1.0, 1.0)
    return [sum(p.numel() for p in group["params"]) for group in groups]


DIM, INNER, DEPTH = 64, 128, 3
# q, k, v, o and their biases, the MLP and its biases, two norms
LAYER = 4 * (DIM + 1) * DIM + 2 * DIM * INNER + DIM + INNER + 4 * DIM


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("head", 0),
        ("lora-q-r4", DEPTH * 4 * 2 * DIM),
        ("lora-qv-r8", DEPTH * 2 * 8 * 2 * DIM),
        ("lora-all-r1", DEPTH * (4 * 2 * DIM + 2 * (DIM + INNER))),
        # q, k, v, o, two norms and the MLP's output of each layer, its inside; the embeddings'
        # norm, the pooler
        ("bitfit", DEPTH * (7 * DIM + INNER) + 2 * DIM),
        ("adapter-h", layers.count(2 * DEPTH, DIM, 8, 2 * DEPTH)),
        ("adapter-l", layers.count(DEPTH, DIM, 16, DEPTH)),
        ("top2", 2 * LAYER),
    ],
)
def test_each_method_trains_what_its_formula_says(name, expected):
    assert trained(name) == [expected, 2 * DIM + 2]


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


def test_adapter_layers_start_as_nothing_and_padding_changes_no_logit():
    torch.manual_seed(0)
    model = classifier.Classifier(toy.encoder()[0]).eval()
    short, long = ([5, 6, 7], 0), ([9] * 8, 1)
    alone = model(*classifier.collate([short])[:2])
    padded = model(*classifier.collate([short, long])[:2])
    torch.testing.assert_close(padded[:1], alone)
    for name in ("adapter-h", "adapter-l"):
        model = classifier.Classifier(toy.encoder()[0]).eval()
        before = model(*classifier.collate([short])[:2])
        methods.METHODS[name].apply(model)
        assert torch.equal(model(*classifier.collate([short])[:2]), before)


def test_full_rank_and_all_biases_reach_any_update_of_an_encoder(lab):
    reached = together.full_rank(lab)
    assert reached["full"] < 1e-12
    assert reached["base"] > reached["half"] > 1e-3


# -------------------------------------------------------------------------------------- statistics


def scores(*rights: str):
    results = {
        seed: {"right": right, "accuracy": right.count("1") / len(right)}
        for seed, right in enumerate(rights)
    }
    return trials.Scores(methods.METHODS["full"], results)


def test_a_gap_is_paired_by_row_and_has_the_error_of_rows_and_seeds():
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

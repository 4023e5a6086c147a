"""The parts of scripts/finetune.py: rows from files, the objective, what is measured."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training_models import llama, llama_folder
from transformers import AutoTokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from data.pairs import IGNORED, target_log_probs  # noqa: E402
from training import arguments, bleu, callbacks, curves, sources, tasks  # noqa: E402
from training.rows import FIELDS, Fields, Row, hold_out, read  # noqa: E402

sys.path.remove(str(SCRIPTS))

# ------------------------------------------------------------------------------------------- rows

FILES = {
    "a.jsonl": '{"context": "a b", "target": "c", "more": 1}\n\n{"context": 1.5, "target": 2}\n',
    "a.csv": 'context,target,more\na b,c,1\n\n"1.5",2,\n',
    "a.txt": "a b || c\n\n1.5||2\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    assert read(path, FIELDS["pairs"]) == [Row("a b", "c"), Row("1.5", "2")]


def test_a_second_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('one,two,label\n"a, a",b,yes\n"line\nbreak",,no\n')
    found = read(path, Fields("one", "label", "two"))
    assert found == [Row("a, a", "yes", "b"), Row("line\nbreak", "no", None)]


BAD = [
    ("a.jsonl", '{"context": "a", "target": "b"}\n{"context": \n', "line 2: no JSON"),
    ("a.jsonl", "[1]\n", "line 1: no object"),
    ("a.jsonl", '\n\n{"context": "a", "label": "b"}\n', "line 3: no 'target'; there is: 'context'"),
    ("a.jsonl", '{"context": "a", "target": ["b"]}\n', "line 1: ['b'] is no text"),
    ("a.jsonl", '{"context": "a", "target": null}\n', "line 1: its target is empty"),
    ("a.jsonl", '{"context": "a", "target": true}\n', "line 1: True is no text"),
    ("a.csv", "context,target\na,b\na\n", "line 3: it has not 2 columns"),
    ("a.csv", "context,target\na,b,c\n", "line 2: it has not 2 columns"),
    ("a.csv", 'context,target\na,"b"c\n', "line 2: no CSV"),
    ("a.csv", 'context,target\na,"b\n', "line 2: no CSV"),
    ("a.csv", "text,target\na,b\n", "line 2: no 'context'"),
    ("a.txt", "a||b\nno separator\n", "line 2: 0 separators"),
    ("a.txt", "a||b||c\n", "line 1: 2 separators"),
    ("a.txt", "a||b\n  ||b\n", "line 2: its text is empty"),
    ("a.txt", "\n", "it holds none"),
]


@pytest.mark.parametrize(("name", "text", "what"), BAD)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    name: str, text: str, what: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SystemExit, match=re.escape(what)) as raised:
        read(path, FIELDS["pairs"])
    assert str(path) in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        read(tmp_path / "a.csv", FIELDS["pairs"])


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.text("xyz", min_size=1))))
def test_no_text_is_on_both_sides(values: list[tuple[str, str]]) -> None:
    rows = [Row(*value) for value in values]
    train, held_out = hold_out(rows, 0.4)
    assert not {row.text for row in train} & {row.text for row in held_out}
    assert sorted(train + held_out, key=repr) == sorted(rows, key=repr)
    assert hold_out(rows[::-1], 0.4) == (train, held_out)


def test_files_as_data(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"context {i % 40}||target {i}\n" for i in range(200)))
    data = sources.from_files(path, None, path, FIELDS["pairs"], 0.25)
    assert len(data.train) + len(data.held_out) == len(data.test) == 200
    assert len(data.held_out) % 5 == 0
    with pytest.raises(SystemExit, match="--held-out"):
        sources.from_files(path, None, None, FIELDS["pairs"], 0.0)


def test_words_and_definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the format of WordNet's files: a licence that is set in, then one entry on each line."""
    entry = '000017{} 03 n 02 living_thing{} 0 being 0 001 @ 00 n 00 | a thing {}; "example"  \n'
    text = "  1 This software is provided as is | whatever\n"
    (tmp_path / "data.noun").write_text(text + "".join(entry.format(i, i, i) for i in range(60)))
    monkeypatch.setattr(sources, "WORDNET", tmp_path)
    data = sources.built_in("wordnet", "pairs", tmp_path)
    assert len(data.train) + len(data.held_out) == 60
    assert Row("living thing7", "a thing 7") in data.train + data.held_out
    with pytest.raises(SystemExit, match="--task pairs"):
        sources.built_in("wordnet", "classify", tmp_path)
    monkeypatch.setattr(sources, "WORDNET", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="wordnet-base"):
        sources.built_in("wordnet", "pairs", tmp_path)


def test_snippets_of_movies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (-2.0, -0.2, 3.0)
    found = [sources.snippets.Snippet(str(i), f"{i}: {s}", s) for i in range(40) for s in scores]
    monkeypatch.setattr(sources.snippets, "fetch", lambda folder: folder)
    monkeypatch.setattr(sources.snippets, "read", lambda sdist, kind: found)
    data = sources.built_in("movies", "classify", tmp_path)
    rows = data.train + data.held_out + data.test
    assert sorted(row.target for row in rows) == ["0"] * 40 + ["1"] * 40, "the clear ones"
    assert all(row.target == str(int(row.text.endswith(": 3.0"))) for row in rows)
    data = sources.built_in("movie-scores", "regress", tmp_path)
    rows = data.train + data.held_out + data.test
    assert len(rows) == 120
    assert all(row.text.endswith(f": {row.target}") for row in rows)


# -------------------------------------------------------------------------------------- objective


def batch(n: int = 3, length: int = 7, vocab: int = 17) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, vocab, (n, length))
    labels = tokens.clone()
    for row in range(n):
        labels[row, : 2 + row] = IGNORED
        labels[row, length - row :] = IGNORED
    return tokens, labels


def by_hand(logits: Tensor, labels: Tensor, smoothing: float) -> list[float]:
    """Eq. (2) one token at a time, in float64."""
    losses = []
    for row in range(labels.shape[0]):
        for i in range(1, labels.shape[1]):
            if labels[row, i] != IGNORED:
                scores = logits[row, i - 1].double()
                log_probs = [float(s - torch.logsumexp(scores, 0)) for s in scores]
                nll = -log_probs[int(labels[row, i])]
                even = -sum(log_probs) / len(log_probs)
                losses.append((1 - smoothing) * nll + smoothing * even)
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_eq_2_over_the_tokens_of_the_target(smoothing: float) -> None:
    tokens, labels = batch()
    logits = llama()(tokens).logits.detach() * 20
    wanted = by_hand(logits, labels, smoothing)
    found = tasks.pair_loss(logits, labels, smoothing=smoothing)
    assert found.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)
    part = tasks.pair_loss(logits, labels, n_items=50, smoothing=smoothing)
    assert part.item() == pytest.approx(sum(wanted) / 50, rel=1e-6)
    changed = logits.clone()
    changed[:, 0] += torch.randn(17)  # predicts a token of the context
    assert tasks.pair_loss(changed, labels, smoothing=smoothing) == found


def test_it_is_the_objective_of_the_demo() -> None:
    tokens, labels = batch()
    model = llama().eval()
    with torch.no_grad():
        log_probs = target_log_probs(model, tokens, labels)
        logits = model(tokens).logits
    torch.testing.assert_close(tasks.pair_loss(logits, labels), -log_probs.mean())
    losses = tasks.token_losses(logits, labels)
    torch.testing.assert_close(losses[labels[:, 1:] != IGNORED], -log_probs)
    assert losses[labels[:, 1:] == IGNORED].eq(0).all()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(llama_folder(tmp_path_factory.mktemp("llama")))


def test_perplexity_is_over_all_tokens_together(tokenizer: Any) -> None:
    task = tasks.Pairs(tokenizer, "{text}:", 64, 0.1)
    losses = np.array([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    labels = np.array([[7, 5, 5, IGNORED], [7, 5, IGNORED, IGNORED]])
    found = task.metrics(SimpleNamespace(predictions=losses, label_ids=labels))
    assert found == {"nll": 3.0, "perplexity": pytest.approx(math.exp(3)), "target_tokens": 3}


def test_a_pair_as_tokens(tokenizer: Any) -> None:
    task = tasks.Pairs(tokenizer, "{text}:", 9, 0.0)
    rows = [Row("ab", "cde"), Row("a", "much too long")]
    (example,) = task.encode(rows, train=True)
    assert tokenizer.decode(example.tokens[: example.n_prompt]) == "ab:"
    assert tokenizer.decode(example.tokens[example.n_prompt :]) == "cde<end>"
    (measured,) = task.encode(rows, train=False)
    assert measured.tokens == example.tokens[:-1], "measured without the end"
    made = task.collate([example, measured])
    assert made["labels"].ne(IGNORED).sum(1).tolist() == [4, 3]
    with pytest.raises(SystemExit, match="--max-tokens"):
        task.encode(rows[1:], train=True)


def test_classes_and_numbers(tokenizer: Any) -> None:
    classes = tasks.Classes(tokenizer, 8, ["bad", "good"])
    made = classes.collate(classes.encode([Row("ab", "good"), Row("abcd", "bad", "e")], train=True))
    assert made["labels"].tolist() == [1, 0]
    assert made["attention_mask"].sum(1).tolist() == [2, 5]
    with pytest.raises(SystemExit, match="bad, good"):
        classes.encode([Row("ab", "fair")], train=True)
    logits = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    loss = classes.loss({"logits": logits}, torch.tensor([1, 0]))
    log_p = logits.double().log_softmax(1)
    assert loss.item() == pytest.approx(-(log_p[0, 1] + log_p[1, 0]).item() / 2)
    found = SimpleNamespace(predictions=logits.numpy(), label_ids=np.array([1, 0]))
    assert classes.metrics(found) == {"accuracy": 0.5}

    numbers = tasks.Numbers(tokenizer, 8)
    made = numbers.collate(numbers.encode([Row("ab", "1.5"), Row("b", "-2")], train=True))
    assert made["labels"].tolist() == [1.5, -2.0]
    with pytest.raises(SystemExit, match="Write a number"):
        numbers.encode([Row("ab", "much")], train=True)
    guesses = torch.tensor([[1.0], [0.0]])
    assert numbers.loss({"logits": guesses}, made["labels"]).item() == (0.25 + 4) / 2
    found = SimpleNamespace(predictions=guesses.numpy(), label_ids=made["labels"].numpy())
    assert numbers.metrics(found) == {"mse": 2.125, "pearson": pytest.approx(1.0)}


# ---------------------------------------------------------------------------------- beside training


def test_rows_of_one_context_are_its_references() -> None:
    rows = [Row("a", "1"), Row("b", "2"), Row("a", "3"), Row("c", "4"), Row("b", "5")]
    assert bleu.by_context(rows, 2) == {"a": ["1", "3"], "b": ["2", "5"]}
    assert list(bleu.by_context(rows)) == ["a", "b", "c"]


def test_bleu_takes_several_references() -> None:
    pytest.importorskip("sacrebleu")
    right = "the cat sat on the mat today"
    several = [[right, "another way to say the same"], ["quite different words are here now"]]
    found = bleu.bleu([right, "quite different words are here now"], several)
    assert found["score"] == pytest.approx(100.0)
    assert found["n"] == 2
    worse = bleu.bleu([right, "the cat"], several)
    assert worse["score"] < 80


@pytest.mark.parametrize("n", [1, 20])
def test_answers_do_not_depend_on_the_batch(n: int, tokenizer: Any) -> None:
    model = llama(vocab=103, initializer_range=0.5).train()
    task = tasks.Pairs(tokenizer, "{text}:", 64, 0.0)
    contexts = ["a", "some longer context", "bc"] * n
    together = bleu.say(model, task, contexts, max_new_tokens=6)
    assert model.training
    alone = [bleu.say(model, task, [context], max_new_tokens=6)[0] for context in contexts[:3]]
    assert together == alone * n
    assert any(together)


def test_early_stop_decides_by_the_record_alone() -> None:
    def stops(values: list[float], higher: bool = False) -> bool:
        state = SimpleNamespace(log_history=[{"eval_nll": v} for v in values] + [{"loss": 1}])
        control = SimpleNamespace(should_training_stop=False)
        callbacks.EarlyStop("eval_nll", higher, 2).on_evaluate(None, state, control)
        return control.should_training_stop

    assert not stops([3, 2, 1])
    assert not stops([3, 1, 2])
    assert stops([3, 1, 2, 1.5])
    assert stops([3, 1, 1, 1]), "as good as before is not better"
    assert stops([1, 2, 1.5, 1.4], higher=True)
    assert not stops([])


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = [{"step": i, "loss": 1 / i} for i in range(1, 9)] + [{"step": 8, "eval_nll": 0.5}]
    path = curves.draw({"lora": record, "full": record}, "eval_nll", tmp_path / "curves.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.draw({}, "eval_nll", tmp_path / "curves.png") is None


def test_runs_are_compared_in_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_nll": 1.5}]
    for name in ("lora", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"log": log}))
    script = [sys.executable, str(SCRIPTS / "compare.py"), "--output", str(tmp_path / "both.png")]
    runs = [f"LoRA={tmp_path / 'lora'}", f"full={tmp_path / 'full'}"]
    subprocess.run([*script, *runs], check=True, capture_output=True)
    assert (tmp_path / "both.png").read_bytes()[1:4] == b"PNG"
    for wrong in ("lora", f"lora={tmp_path / 'nowhere'}"):
        refused = subprocess.run([*script, wrong], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "say NAME=FOLDER" in refused.stderr


# --------------------------------------------------------------------------------------- arguments


def parsed(*words: str) -> Any:
    return arguments.parse("", ["--model", "m", "--train", "t", "--output", "o", *words])


def test_the_papers_numbers_are_the_defaults() -> None:
    args = parsed()
    assert (args.lr, args.weight_decay, args.batch, args.epochs) == (2e-4, 0.01, 8, 5)
    assert (args.label_smoothing, args.rank, args.alpha, args.dropout) == (0.1, 4, 32, 0.1)
    assert arguments.warmup_of(args, 20_000) == 500
    assert arguments.warmup_of(args, 100) == 10, "of a short run a tenth"
    args = parsed("--task", "classify")
    assert (args.lr, args.weight_decay, args.rank, args.alpha) == (5e-4, 0.1, 8, 8)
    assert arguments.warmup_of(args, 1000) == 60
    assert parsed("--method", "full").lr < 2e-4
    assert parsed("--lr", "0.5", "--warmup", "3").lr == 0.5


def test_the_document_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    options = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    text = (SCRIPTS.parent / "docs" / "finetuning.md").read_text()
    assert set(re.findall(r"--[a-z][a-z0-9-]+", text)) == options
    for name in sources.BUILT_IN:
        assert f"`{name}`" in text


@pytest.mark.parametrize(
    ("words", "world", "what"),
    [
        (["--batch", "6", "--accumulate", "2"], 2, "Choose a multiple of 4"),
        (["--bleu", "4"], 1, "--test"),
        (["--bleu", "4", "--test", "f", "--task", "regress"], 1, "pairs"),
        (["--bleu", "4", "--test", "f"], 2, "2 processes"),
        (["--fsdp"], 1, "torchrun"),
        (["--init-from", "a", "--method", "full"], 1, "--method is full"),
        (["--targets", "q", "--method", "head"], 1, "it adapts no layer"),
    ],
)
def test_options_that_cannot_be_meant(words: list[str], world: int, what: str) -> None:
    with pytest.raises(SystemExit, match=what):
        arguments.check_sense(parsed(*words), world)


def test_a_continuation_is_of_the_same_run(tmp_path: Path) -> None:
    def check(*words: str) -> None:
        args = parsed(*words)
        args.output = tmp_path / "run"
        arguments.check_same(args)
        if not args.resume:
            arguments.note_down(args)

    check("--lr", "0.1")
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["lr"] == "0.1"
    with pytest.raises(SystemExit, match="Pass --resume"):
        check("--lr", "0.1")
    check("--lr", "0.1", "--resume", "--quiet")
    with pytest.raises(SystemExit, match=r"lr was 0\.1 and is now 0\.2"):
        check("--lr", "0.2", "--resume")

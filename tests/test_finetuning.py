"""scripts/finetuning/: rows from files, the objective, and the program as a user runs it."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import script
from safetensors.torch import load_file
from training_models import bert_folder, llama_folder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

import lora_inject as li

rows, tasks, finetune = (script(f"finetuning.{name}") for name in ("rows", "tasks", "finetune"))
WORDS = ["red", "green", "blue", "black", "white"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_eq_2_over_the_tokens_of_the_target(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 17, generator=generator)
    labels = torch.randint(0, 17, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.4] = -100
    wanted = []
    for i in range(3):
        for t in range(1, 7):
            if labels[i, t] != -100:
                logp = logits[i, t - 1].double().log_softmax(-1)
                own = -logp[labels[i, t]]
                wanted.append(float((1 - smoothing) * own - smoothing * logp.mean()))
    task = tasks.Words(None, "", 0, smoothing)
    loss = float(task.loss({"logits": logits}, labels))
    assert loss == pytest.approx(np.mean(wanted), rel=1e-5)
    halves = task.loss({"logits": logits}, labels, num_items_in_batch=2 * len(wanted))
    assert float(halves) == pytest.approx(np.mean(wanted) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tiny models and data."""
    out = tmp_path_factory.mktemp("place")
    llama_folder(out / "llama")
    bert_folder(out / "bert")
    lines = [f"{a} {b}||{b}.\n" for a in WORDS for b in WORDS for _ in range(2)]
    (out / "pairs.txt").write_text("".join(lines))
    classes = [f"{a} {b},{int(a < b)}\n" for a in WORDS for b in WORDS if a != b]
    (out / "classes.csv").write_text("text,label\n" + "".join(classes))
    numbers = [{"text": f"{a} {b}", "label": (len(a) - len(b)) / 2} for a in WORDS for b in WORDS]
    (out / "numbers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in numbers))
    return out


def test_only_the_assistant_is_learned_from_a_conversation(place, tmp_path):
    roles = zip(("user", "assistant") * 2, ("ab", "cd", "e", "f"), strict=True)
    talk = [{"role": role, "content": content} for role, content in roles]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    given = rows.read(tmp_path / "a.jsonl", ["context", "target"])
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    task = tasks.Words(tokenizer, "{text}", 200, 0.0)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    (encoded,) = task.encode(given, train=True)
    ids, labels = np.array(encoded["input_ids"]), np.array(encoded["labels"])
    assert tokenizer.decode(ids) == "[u]ab;[a]cd;[u]e;[a]f;"
    assert tokenizer.decode(ids[labels != -100]) == "cd;f;"


def command(place: Path, output: Path, *words: str, task: str = "pairs") -> list[str]:
    """The command line of a short run."""
    data = {"pairs": "pairs.txt", "classify": "classes.csv", "regress": "numbers.jsonl"}[task]
    model = "llama" if task == "pairs" else "bert"
    line = ["--task", task, "--train", str(place / data), "--model", str(place / model)]
    line += ["--output", str(output), "--share", "0.3", "--quiet", "--batch", "4", "--lr", "0.01"]
    line += ["--max-steps", "8", "--eval-every", "2"]
    if "--method" not in words:
        line += ["--targets", "[qv]_proj" if task == "pairs" else "query|value"]
    return [*line, *words]


def run(place: Path, output: Path, *words: str, task: str = "pairs") -> dict[str, Any]:
    """Run the program in this process."""
    finetune.main(command(place, output, *words, task=task))
    return results(output)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def curve(results: dict[str, Any], key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in results["log"] if key in entry}


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory) -> Path:
    """The output of a run without dropout, which other ways to compute it are compared with."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(place, out, "--dropout", "0")
    return out


def test_pairs(place, tmp_path):
    done = run(place, tmp_path / "out", "--test", str(place / "pairs.txt"))
    assert done["steps"] == len(curve(done)) == 8
    best = min(curve(done, "eval_nll").values())
    assert done["after"]["held_out"]["nll"] == pytest.approx(best, rel=1e-5)
    assert done["after"]["held_out"]["nll"] < done["before"]["held_out"]["nll"]
    assert {"nll", "perplexity"} < done["after"]["test"].keys()
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    li.load_adapter(model, tmp_path / "out" / "adapter")
    assert done["n_trained"] == sum(p.numel() for p in li.adapter_parameters(model).values())


@pytest.mark.parametrize(("task", "metric"), [("classify", "accuracy"), ("regress", "mse")])
@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_judging_texts(task, metric, method, place, tmp_path):
    words = ["--method", method] if method != "lora" else []
    words += ["--max-steps", "4", "--seed", "3"]
    done = run(place, tmp_path / "out", *words, task=task)
    assert set(curve(done, f"eval_{metric}")) == {2, 4}
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
        assert done["n_trained"] == sum(p.numel() for p in model.parameters())
        return
    state = li.read_adapter(tmp_path / "out" / "adapter")
    assert {*state.trained} == {"classifier.weight", "classifier.bias"}, "the new head is in it"
    assert len(state.sites) == (4 if method == "lora" else 0)


def test_a_batch_in_parts_is_the_batch(place, plain, tmp_path):
    """The targets differ in length, so a mean of means would be another number."""
    parts = run(place, tmp_path / "parts", "--dropout", "0", "--accumulate", "4",
                "--gradient-checkpointing", "--keep", "1")  # fmt: skip
    for key in ("loss", "eval_nll"):
        assert curve(parts, key) == pytest.approx(curve(results(plain), key), rel=1e-5)


def test_a_continuation_is_of_the_same_run(place, plain):
    words = command(place, plain, "--dropout", "0")
    with pytest.raises(SystemExit, match="Pass --resume"):
        finetune.main(words)
    with pytest.raises(SystemExit, match=r"lr was 0\.01 and is now 0\.2"):
        finetune.main([*words, "--resume", "--lr", "0.2"])


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(step: int, words: list[str]) -> None:
    build = finetune.build

    def killed(*args):
        trainer = build(*args)
        trainer.add_callback(Kill(step))
        return trainer

    finetune.build = killed
    finetune.main(words)


def run_as_a_rank(words: list[str]) -> None:
    finetune.WORLD = int(os.environ["WORLD_SIZE"])
    finetune.FIRST = os.environ["RANK"] == "0"
    finetune.main(words)


@pytest.mark.slow
def test_killed_and_resumed_equals_not_killed(place, tmp_path, forks):
    """SIGKILL at a random step; dropout is on."""
    whole = run(place, tmp_path / "whole")
    step = random.randint(3, 7)
    fork = forks.start(run_until_killed, step, command(place, tmp_path / "killed"))
    assert fork.wait() == -signal.SIGKILL, fork.err()
    resumed = run(place, tmp_path / "killed", "--resume")
    for key in ("loss", "eval_nll"):
        assert curve(resumed, key) == curve(whole, key), f"killed at step {step}"
    one, other = (adapter_of(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(place, plain, tmp_path, forks):
    words = command(place, tmp_path / "two", "--dropout", "0")
    for rank in forks.start_ranks(2, run_as_a_rank, words):
        rank.result()
    for key in ("loss", "eval_nll"):
        one, two = (curve(results(out), key) for out in (plain, tmp_path / "two"))
        assert two == pytest.approx(one, rel=1e-5)

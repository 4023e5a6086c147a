"""scripts/finetune.py as a user runs it, on tiny models: every task, method and way to stop.

The program's own results.json is compared, so that a run that was killed, or computed in
parts, or by two processes, is seen to have given the same losses.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_models import bert_folder, llama_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora_inject as li

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import finetune  # noqa: E402 - found by the path above

sys.path.remove(str(SCRIPTS))

WORDS = ["red", "green", "blue", "black", "white"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    out = tmp_path_factory.mktemp("place")
    llama_folder(out / "llama")
    bert_folder(out / "bert")
    lines = [f"{a} {b}||{b}.\n" for a in WORDS for b in WORDS for _ in range(2)]
    (out / "pairs.txt").write_text("".join(lines))
    rows = [f"{a} {b},{int(a < b)}\n" for a in WORDS for b in WORDS if a != b]
    (out / "classes.csv").write_text("text,label\n" + "".join(rows))
    numbers = [{"text": f"{a} {b}", "label": (len(a) - len(b)) / 2} for a in WORDS for b in WORDS]
    (out / "numbers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in numbers))
    return out


def command(place: Path, output: Path, *words: str, task: str = "pairs") -> list[str]:
    """The command line of a short run."""
    data = {"pairs": "pairs.txt", "classify": "classes.csv", "regress": "numbers.jsonl"}[task]
    model = "llama" if task == "pairs" else "bert"
    targets = "[qv]_proj" if task == "pairs" else "query|value"
    found = ["--task", task, "--train", str(place / data), "--model", str(place / model)]
    found += ["--output", str(output), "--share", "0.3", "--quiet", "--batch", "4", "--lr", "0.01"]
    if not {"--method", "--config", "--max-steps"} & set(words):
        found += ["--max-steps", "8"]
    if not {"--method", "--config"} & set(words):
        found += ["--targets", targets, "--eval-every", "2"]
    return [*found, *words]


def run(place: Path, output: Path, *words: str, task: str = "pairs") -> dict[str, Any]:
    """Run the program in this process."""
    assert finetune.main(command(place, output, *words, task=task)) == 0
    return results(output)


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run without dropout, which other ways to compute it are compared with."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(place, out, "--dropout", "0")
    return out


def curve(found: dict[str, Any], key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in found["log"] if key in entry}


# ----------------------------------------------------------------------------------- every task


def test_pairs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = ["--test", str(place / "pairs.txt"), "--bleu", "3"]
    pytest.importorskip("sacrebleu")
    found = run(place, tmp_path / "out", *test)
    assert found["steps"] == 8
    assert len(curve(found)) == 8
    assert set(curve(found, "eval_nll")) == {2, 4, 6, 8}
    best = min(curve(found, "eval_nll").values())
    assert found["after"]["held_out"]["nll"] == pytest.approx(best, rel=1e-5)
    assert found["after"]["held_out"]["nll"] < found["before"]["held_out"]["nll"]
    assert {"nll", "perplexity"} < found["after"]["test"].keys()
    assert found["after"]["bleu"]["n"] == 3
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    n_all = sum(p.numel() for p in model.parameters())
    li.load_adapter(model, tmp_path / "out" / "adapter")
    assert found["n_trained"] == sum(p.numel() for p in li.adapter_parameters(model).values())
    assert found["n_all"] == n_all + found["n_trained"]
    said = " ".join(capsys.readouterr().out.split())
    for words in ("lora, 8 steps", "held-out perplexity", "BLEU", "MiB", "best at step"):
        assert words in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"adapter", "checkpoints", "results.json", "arguments.json"}


@pytest.mark.parametrize(("task", "metric"), [("classify", "accuracy"), ("regress", "mse")])
@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_judging_texts(task: str, metric: str, method: str, place: Path, tmp_path: Path) -> None:
    words = ["--method", method] if method != "lora" else []
    words += ["--max-steps", "4", "--eval-every", "2", "--seed", "3"]
    found = run(place, tmp_path / "out", *words, task=task)
    assert metric in found["after"]["held_out"]
    assert set(curve(found, f"eval_{metric}")) == {2, 4}
    labels = {"num_labels": 2 if task == "classify" else 1}
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
        assert found["n_trained"] == sum(p.numel() for p in model.parameters())
        return
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", **labels)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    li.load_adapter(model, tmp_path / "out" / "adapter")
    info = li.adapters(model)["default"]
    assert info.trained == ("classifier.weight", "classifier.bias"), "the new head travels with it"
    assert len(info.sites) == (4 if method == "lora" else 0)
    assert found["n_trained"] == info.n_parameters
    assert all(torch.equal(model.state_dict()[k], t) for k, t in start.items() if "bert." in k)


def test_a_refused_run_leaves_nothing_and_can_be_tried_again(place: Path, tmp_path: Path) -> None:
    import finetune

    bad, output = tmp_path / "bad.txt", tmp_path / "out"
    bad.write_text("a||b\nno separator\n")
    words = ["--train", str(bad), "--model", str(place / "llama"), "--output", str(output)]
    for _ in range(2):
        assert finetune.main(words) == 1
        assert not output.exists()


def test_a_config_of_yours(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text("rank: 3\nalpha: 6\ntargets: [o_proj]\nexpect: {sites: 2}\n")
    found = run(place, tmp_path / "out", "--config", str(config), "--max-steps", "2")
    assert found["n_trained"] == 2 * 3 * (16 + 16)
    config.write_text("targets: [query]\n")
    words = ["--config", str(config), "--max-steps", "2"]
    assert finetune.main(command(place, tmp_path / "other", *words, task="classify")) == 1


def test_start_from_another_adapter_but_for_its_head(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "first", "--seed", "1", task="classify")
    start = ["--init-from", str(tmp_path / "first" / "adapter")]
    found = run(place, tmp_path / "second", *start, "--lr", "0", "--seed", "2", task="regress")
    assert found["n_trained"] == results(tmp_path / "first")["n_trained"] - 17, "a smaller head"
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("first", "second")
    )
    for key, tensor in first.items():
        if "lora_" in key:
            assert torch.equal(second[key], tensor), "a rate of 0 leaves what was taken over"
        else:
            assert second[key].shape != tensor.shape
    words = [*start, "--targets", "query"]
    assert finetune.main(command(place, tmp_path / "third", *words, task="regress")) == 1


@pytest.mark.parametrize("words", [["--bf16"], ["--b-lr-ratio", "4"], ["--gradient-checkpointing"]])
def test_options_that_change_how_it_is_computed(
    words: list[str], place: Path, plain: Path, tmp_path: Path
) -> None:
    wanted = curve(results(plain))
    changed = curve(run(place, tmp_path / "changed", "--dropout", "0", *words))
    if words == ["--gradient-checkpointing"]:
        assert changed == wanted
    else:
        assert changed != wanted
        assert changed == pytest.approx(wanted, rel=0.2)


def test_a_batch_in_parts_is_the_batch(place: Path, plain: Path, tmp_path: Path) -> None:
    """The targets differ in length, so a mean of means would be another number."""
    whole = results(plain)
    parts = run(place, tmp_path / "parts", "--dropout", "0", "--accumulate", "4")
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-5)
    assert curve(parts, "eval_nll") == pytest.approx(curve(whole, "eval_nll"), rel=1e-5)


def test_an_early_end(place: Path, tmp_path: Path) -> None:
    words = ["--lr", "0", "--max-steps", "30", "--patience", "2"]
    found = run(place, tmp_path / "out", *words)
    assert found["steps"] == 6, "no evaluation is better than the first"
    assert found["best_step"] == 2


# ---------------------------------------------------------------------------------- stop and go on


def test_ctrl_c_leaves_a_run_that_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(place, tmp_path / "whole")
    training_step = finetune.torch.optim.AdamW.step
    n = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n == 5:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.torch.optim.AdamW, "step", interrupted)
        assert finetune.main(command(place, tmp_path / "out")) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "out" / "results.json").exists()
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert "checkpoint-5" in names
    again = run(place, tmp_path / "out", "--resume")
    assert curve(again) == curve(whole)
    assert curve(again, "eval_nll") == curve(whole, "eval_nll")
    assert again["before"] == whole["before"]


PROGRAM = """
import os, random, signal, sys
sys.path.insert(0, sys.argv[1])
kill_at, while_writing = int(sys.argv[2]), sys.argv[3] == "writing"
import finetune
from lora_inject.formats import files
from transformers import TrainerCallback
from training import callbacks

class Kill(callbacks.StopWhenAsked):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at and not while_writing:
            os.kill(os.getpid(), signal.SIGKILL)

put_in_place = files._put_in_place

def killed(temporary, target):
    if target.name == f"checkpoint-{kill_at}" and while_writing:
        os.kill(os.getpid(), signal.SIGKILL)
    put_in_place(temporary, target)

callbacks.StopWhenAsked, files._put_in_place = Kill, killed
sys.exit(finetune.main(sys.argv[4:]))
"""


def in_a_process(words: list[str], kill_at: int = -1, while_writing: bool = False) -> int:
    """Run the program in a process of its own, which kills itself; its exit status."""
    how = ["writing" if while_writing else "training"]
    program = [sys.executable, "-c", PROGRAM, str(SCRIPTS), str(kill_at), *how, *words]
    root = {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=os.environ | root, capture_output=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_not_killed(place: Path, tmp_path: Path) -> None:
    """SIGKILL, once at a random step and once in the middle of a save; dropout is on."""
    length = ["--max-steps", "12"]
    whole = run(place, tmp_path / "whole", *length)
    words = command(place, tmp_path / "killed", *length)
    first = random.randint(3, 8)
    assert in_a_process(words, kill_at=first) == -signal.SIGKILL
    again = [*words, "--resume"]
    assert in_a_process(again, kill_at=10, while_writing=True) == -signal.SIGKILL
    there = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert any(name.endswith(".tmp") for name in there)
    assert "checkpoint-10" not in there
    assert "checkpoint-8" in there
    assert in_a_process(again) == 0
    found = results(tmp_path / "killed")
    for key in ("loss", "eval_nll"):
        assert curve(found, key) == curve(whole, key), f"killed first at step {first}"
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors"
                for name in ("whole", "killed")]  # fmt: skip
    one, other = (load_file(path) for path in adapters)
    assert all(torch.equal(one[key], other[key]) for key in one)
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert not any(name.endswith(".tmp") for name in left)


# --------------------------------------------------------------------- what is said of mistakes


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--model", "nowhere"], "no config.json"),
        (["--train", "nowhere.csv"], "no such file"),
        (["--method", "head"], "a language model has none"),
        (["--fields", "one"], "Give two or three"),
        (["--targets", "q_prj"], "q_proj"),
        (["--max-tokens", "3"], "--max-tokens"),
    ],
)
def test_mistakes(
    words: list[str], what: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(command(place, tmp_path / "out", *words)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("error: ")
    assert what in said


def test_what_to_adapt_must_be_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(place / "llama"), "--train", str(place / "pairs.txt")]
    assert finetune.main([*words, "--output", str(tmp_path / "out")]) == 1
    assert "--targets or --config" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------ two processes


TWICE = """
import os, shutil, sys
sys.path.insert(0, sys.argv[1])
import finetune
from torch import distributed

output, words = sys.argv[2], [*sys.argv[3:], "--output", sys.argv[2]]
assert finetune.main(words) == 0
distributed.barrier()
if distributed.get_rank() == 0:
    shutil.move(f"{output}/results.json", f"{output}/first.json")
    shutil.rmtree(f"{output}/checkpoints/checkpoint-8")
distributed.barrier()
assert finetune.main([*words, "--resume"]) == 0
"""


def torchrun(program: Path, *words: str) -> None:
    """Run a program in two processes, as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", port]
    root = {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(program), *words], env=os.environ | root, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:] + done.stderr.decode()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(
    words: list[str], place: Path, plain: Path, tmp_path: Path
) -> None:
    """Two gloo ranks; then the end of the run again, from a checkpoint that two ranks wrote."""
    one = results(plain)
    (tmp_path / "twice.py").write_text(TWICE)
    options = command(place, tmp_path / "two", "--dropout", "0", *words)
    torchrun(tmp_path / "twice.py", str(SCRIPTS), str(tmp_path / "two"), *options)
    two = json.loads((tmp_path / "two" / "first.json").read_text())
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    assert curve(two, "eval_nll") == pytest.approx(curve(one, "eval_nll"), rel=1e-5)
    first, second = (
        load_file(output / "adapter" / "adapter_model.safetensors")
        for output in (plain, tmp_path / "two")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    li.load_adapter(model, tmp_path / "two" / "adapter")
    assert curve(results(tmp_path / "two")) == curve(two), "from what two processes wrote"

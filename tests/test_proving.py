"""The command `prove` stores a proof in an adapter that was saved without one, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.servers import Served, serving
from training_models import llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_inject as li

CONFIG = {"rank": 4, "alpha": 8, "targets": ["all-linear"]}
TEXT = "SELECT name FROM users"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("base") / "tiny")


def adapted(base: Path, std: float = 0.2) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    return fill(li.inject(model, CONFIG), std=std)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return li.save_adapter(adapted(base), tmp_path / "sql")


def said(done: Any) -> str:
    return " ".join((done.out + done.err).split())


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_stores_the_proof_that_saving_stores(run, base: Path, adapter: Path, tmp_path) -> None:
    texts = [TEXT, "1 and 1 is 2"]
    probe = (texts, AutoTokenizer.from_pretrained(base))
    due = li.save_adapter(adapted(base), tmp_path / "due", probe=probe)
    done = run("prove", adapter, "--base", base, "--probe", texts[0], "--probe", texts[1])
    assert done.code == 0, done.err
    assert "stored: 32 log-probabilities of 2 texts, which the adapter moves by " in said(done)
    assert f"lora-inject verify-served URL {adapter}" in said(done)
    assert bytes_in(adapter) == bytes_in(due)
    model = adapted(base)
    assert li.verify_loaded(model, source=adapter).ok
    assert li.verify_loaded(li.activate(model, None), source=adapter).word == "without"


def test_rows_of_a_file_are_texts_and_a_second_proof_replaces_the_first(
    run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 and 1 ", "completion": "is 2"}\n{"text": "2 is a number"}\n')
    first = json.loads(run("prove", adapter, "--base", base, "--data", rows, "--json").out)
    assert (first["prompts"], first["values"]) == (2, 11 + 12)
    assert (first["replaced"], first["knows_base"]) == (False, True)
    second = run("prove", adapter, "--base", base, "--probe", TEXT)
    assert "it replaced a proof that was there" in second.err
    assert (adapter / "README.md").read_text().count("verify-served") == 1


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_of_peft_is_proven_and_peft_reads_it(run, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    card = (tmp_path / "theirs" / "README.md").read_bytes()
    done = run("prove", tmp_path / "theirs", "--base", base, "--probe", TEXT)
    assert done.code == 0, done.err
    assert "the file does not say on which base it was made" in done.err
    assert (tmp_path / "theirs" / "README.md").read_bytes() == card
    again = AutoModelForCausalLM.from_pretrained(base)
    read = peft.PeftModel.from_pretrained(again, tmp_path / "theirs").eval()
    assert li.verify_loaded(read, source=tmp_path / "theirs").ok


def test_a_native_file_is_proven_and_a_server_is_held_to_it(run, base: Path, tmp_path) -> None:
    file = li.save_adapter(adapted(base), tmp_path / "sql", format="native")
    assert run("prove", file, "--base", base, "--probe", TEXT).code == 0
    with serving(Served(adapted(base), "vllm")) as url:
        done = run("verify-served", url, file)
    assert (done.code, done.out.split(":")[0]) == (0, "with the adapter")


def other_weights(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def another_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"S": ', '"S": 9'))


ASKED = ("--probe", TEXT)
REFUSED: list[tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = [
    (other_weights, ASKED, "made on another base"),
    (no_tokenizer, ASKED, "it has no tokenizer"),
    (another_tokenizer, ASKED, "and the model has 103 tokens. Give tokens of the model's own"),
    (None, (), "say on which texts: --probe TEXT"),
    (None, ("--probe", __file__), "is a file, and a text is due"),
]


@pytest.mark.parametrize(("change", "probe", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_proves_nothing_is_refused_and_nothing_is_written(
    change, probe, words, run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "tiny")
    if change is not None:
        change(folder)
    before = bytes_in(adapter)
    done = run("prove", adapter, "--base", folder, *probe)
    assert done.code in (1, 2)
    assert words in said(done)
    assert bytes_in(adapter) == before


def test_an_adapter_without_an_effect_proves_nothing(run, base: Path, tmp_path: Path) -> None:
    adapter = li.save_adapter(adapted(base, std=1e-4), tmp_path / "faint")
    before = bytes_in(adapter)
    done = run("prove", adapter, "--base", base, "--probe", TEXT)
    assert done.code == 1
    assert "they prove nothing. Give inputs that it was trained for, or more of them" in said(done)
    assert bytes_in(adapter) == before

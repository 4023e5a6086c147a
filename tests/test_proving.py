"""The command `prove` stores a proof in an adapter that was saved without one, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.servers import Served, serving
from safetensors.torch import load_file
from training_models import llama_folder
from transformers import AutoModelForCausalLM

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


def test_a_proof_is_stored_and_the_tensors_stay(run, base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_bytes()
    done = run("prove", adapter, "--base", base, "--probe", TEXT, "--probe", "1 and 1 is 2")
    assert done.code == 0, done.err
    assert "stored: 32 log-probabilities of 2 texts, which the adapter moves by " in said(done)
    assert f"lora-inject verify-served URL {adapter}" in said(done)
    now = load_file(adapter / "adapter_model.safetensors")
    assert {name: t.tolist() for name, t in now.items()} == {
        name: t.tolist() for name, t in tensors.items()
    }
    assert (adapter / "adapter_config.json").read_bytes() == config
    assert sorted(bytes_in(adapter)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = adapted(base)
    assert li.verify_loaded(model, source=adapter).ok
    assert li.verify_loaded(li.activate(model, None), source=adapter).word == "without"
    assert li.load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_it_is_the_proof_that_saving_stores(run, base: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    due = li.save_adapter(adapted(base), tmp_path / "due", probe=([TEXT], tokenizer))
    assert run("prove", adapter, "--base", base, "--probe", TEXT).code == 0
    assert bytes_in(adapter) == bytes_in(due)


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
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "theirs")
    card = (tmp_path / "theirs" / "README.md").read_bytes()
    done = run("prove", tmp_path / "theirs", "--base", base, "--probe", TEXT)
    assert done.code == 0, done.err
    assert "the file does not say on which base it was made" in done.err
    assert (tmp_path / "theirs" / "README.md").read_bytes() == card
    again = AutoModelForCausalLM.from_pretrained(base)
    read = peft.PeftModel.from_pretrained(again, tmp_path / "theirs").eval()
    assert li.verify_loaded(read, source=tmp_path / "theirs").ok


def test_a_native_file_is_proven_and_a_server_is_held_to_it(
    run, base: Path, tmp_path: Path
) -> None:
    file = li.save_adapter(adapted(base), tmp_path / "sql", format="native")
    assert run("prove", file, "--base", base, "--probe", TEXT).code == 0
    with serving(Served(adapted(base), "vllm")) as url:
        done = run("verify-served", url, file)
    assert (done.code, done.out.split(":")[0]) == (0, "with the adapter")


REFUSED = {
    "another base": (
        lambda case: ("--base", with_other_weights(case), "--probe", TEXT),
        "made on another base",
    ),
    "no tokenizer": (
        lambda case: ("--base", without_tokenizer(case), "--probe", TEXT),
        "it has no tokenizer",
    ),
    "a tokenizer of another model": (
        lambda case: ("--base", with_another_tokenizer(case), "--probe", TEXT),
        "and the model has 103 tokens. Give tokens of the model's own tokenizer",
    ),
    "no text": (lambda case: ("--base", case / "tiny"), "say on which texts: --probe TEXT"),
    "an empty text": (lambda case: ("--base", case / "tiny", "--probe", ""), "it has no texts"),
    "one token": (
        lambda case: ("--base", case / "tiny", "--probe", "a"),
        "a row has fewer than two tokens",
    ),
    "a file as a text": (
        lambda case: ("--base", case / "tiny", "--probe", case / "tiny" / "config.json"),
        "is a file, and a text is due",
    ),
    "no base": (lambda case: ("--base", case / "none" / "here", "--probe", TEXT), "no such file"),
}


def with_other_weights(case: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(case / "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(case / "tiny")
    return case / "tiny"


def without_tokenizer(case: Path) -> Path:
    for path in (case / "tiny").glob("token*"):
        path.unlink()
    return case / "tiny"


def with_another_tokenizer(case: Path) -> Path:
    file = case / "tiny" / "tokenizer.json"
    file.write_text(file.read_text().replace('"S": ', '"S": 9'))
    return case / "tiny"


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_proves_nothing_is_refused_and_nothing_is_written(
    run, base: Path, adapter: Path, tmp_path: Path, wrong: str
) -> None:
    shutil.copytree(base, tmp_path / "tiny")
    arguments, words = REFUSED[wrong]
    before = bytes_in(adapter)
    done = run("prove", adapter, *arguments(tmp_path))
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


def test_a_format_without_room_is_refused_before_the_base_is_loaded(
    run, base: Path, tmp_path: Path
) -> None:
    file = li.save_adapter(adapted(base), tmp_path / "a", format="kohya", component="te1")
    done = run("prove", file, "--base", "nowhere/at-all", "--probe", TEXT)
    assert "files of the format 'kohya' hold no proof" in said(done)

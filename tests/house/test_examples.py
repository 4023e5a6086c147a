"""Each program of scripts/examples runs from its command line to its end, on a tiny model."""

import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.training import llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def run(name: str, *arguments: object) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = llama_folder(tmp_path_factory.mktemp("models") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter(folder: Path, path: Path, seed: int) -> Path:
    """An adapter with effect, on disk."""
    model = li.inject(base(folder), {"rank": 2, "targets": ["q_proj", "down_proj"]})
    torch.manual_seed(seed)
    return li.save_adapter(fill(model), path)


def test_own_module_learns(capsys: pytest.CaptureFixture[str]) -> None:
    run("own_module", "--steps", 20, "--width", 8)
    printed = capsys.readouterr().out
    first, last = map(float, printed.partition("\nloss ")[2].partition("\n")[0].split(" -> "))
    assert last < first


def test_qlora_with_sft_writes_an_adapter_of_the_quantized_base(chat_model, tmp_path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    data = tmp_path / "chat.jsonl"
    data.write_text(f"{json.dumps({'messages': talk})}\n" * 4)
    run("qlora_sft", "--model", chat_model, "--data", data, "--steps", 2, "--batch", 2)
    state = li.read_adapter(tmp_path / "qlora-adapter")
    assert all(site.B.abs().max() > 0 for site in state.sites.values())


def test_dpo_begins_at_log_two(chat_model, tmp_path, capsys) -> None:
    pytest.importorskip("trl")
    pair = {"prompt": "say ", "chosen": "yes", "rejected": "no"}
    data = tmp_path / "pairs.jsonl"
    data.write_text(f"{json.dumps(pair)}\n" * 4)
    run("dpo", "--model", chat_model, "--data", data, "--steps", 2)
    assert "loss 0.6931 ->" in capsys.readouterr().out
    assert li.read_adapter(tmp_path / "dpo-adapter").sites


def test_lightning_saves_the_adapter_alone_and_resumes_from_it(chat_model, tmp_path) -> None:
    pytest.importorskip("lightning")
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 60)
    run("lightning_fit", "--model", chat_model, "--data", text, "--steps", 2, "--length", 16)
    [checkpoint] = (tmp_path / "lightning-adapter-run").rglob("*.ckpt")
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in key for key in held)
    model = li.load_adapter(base(chat_model), tmp_path / "lightning-adapter")
    saved = li.adapter_state(model)
    fill(model)
    resumed = {key.removeprefix("model."): value for key, value in held.items()}
    model.load_state_dict(resumed, strict=False)
    assert li.adapter_state(model) == saved


def test_vision_trains_its_new_head_with_the_adapter(tmp_path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    run("vision", "--model", tmp_path / "vit", "--steps", 2, "--rows", 4)
    state = li.read_adapter(tmp_path / "vision-adapter")
    assert len(state.sites) == 2
    assert set(state.trained) == {"classifier.weight", "classifier.bias"}


def test_the_server_keeps_users_apart_and_reloads(chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    for seed, user in enumerate(("ann", "bob")):
        adapter(chat_model, tmp_path / user, seed)
    build = runpy.run_path(str(EXAMPLES / "serve.py"))["build"]
    app = build(base(chat_model), AutoTokenizer.from_pretrained(chat_model), tmp_path)
    client = TestClient(app)

    def ask(user: str) -> str:
        body = {"user": user, "prompt": "one two", "max_new_tokens": 8}
        return client.post("/generate", json=body).json()["text"]

    alone = {user: ask(user) for user in ("ann", "bob")}
    assert alone["ann"] != alone["bob"]
    users = ["ann", "bob"] * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, users)) == [alone[user] for user in users]
    (tmp_path / "ann").rename(tmp_path / "old")
    (tmp_path / "bob").rename(tmp_path / "ann")
    assert client.post("/reload/ann").status_code == 200
    assert ask("ann") == alone["bob"]
    assert client.post("/reload/..%2Fann").status_code == 404
    assert client.post("/generate", json={"user": "eve", "prompt": ""}).status_code == 404


@pytest.mark.parametrize("name", ["start", "choose_and_analyze"])
def test_every_cell_of_a_notebook_runs_and_shows_no_error(chat_model, tmp_path, name) -> None:
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    base(chat_model).save_pretrained(folder)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]).replace('"layers": "22-29"', '"layers": "0-1"'), names)
        assert cell["execution_count"]
        assert all(out["output_type"] != "error" for out in cell["outputs"])

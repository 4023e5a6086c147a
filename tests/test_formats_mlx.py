"""mlx-lm on a CPU computes the same from our folder, and what it wrote is read right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, make_state
from helpers.reference import IDS, adapted, llama, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

CONFIG = "adapter_config.json"
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    llama().float().save_pretrained(path)
    return path


def of_mlx(base: Path, adapter: Path) -> Tensor:
    mx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    model = load_adapters(model, str(adapter))
    model.eval()
    return torch.tensor(model(mx.array(IDS.numpy())).tolist())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "targets",
    [
        [{"match": "q_proj", "rank": 2}, {"match": "v_proj", "rank": 2}],
        [{"match": "k_proj", "rank": 3, "scaling": "rslora"}, {"match": "down_proj", "alpha": 1}],
        [{"match": "q_proj", "layers": 1}, "lm_head", "embed_tokens"],
    ],
    ids=["one rank", "unequal", "one layer, head and embedding"],
)
def test_mlx_computes_the_same(base: Path, targets: list[Any], tmp_path: Path) -> None:
    model = adapted(llama().float(), *targets)
    li.save_adapter(model, tmp_path / "a", format="mlx")
    due = logits(model)
    assert (due - logits(llama().float())).abs().max() > 0.1
    torch.testing.assert_close(of_mlx(base, tmp_path / "a"), due, rtol=1e-4, atol=1e-4)
    back = li.load_adapter(llama().float(), tmp_path / "a")
    torch.testing.assert_close(logits(back), due, rtol=1e-4, atol=1e-4)


def test_an_embedding_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    state = make_state(KIND_SPECS["embedding"])
    with pytest.raises(FormatError, match="as one tensor"):
        write_adapter(state, tmp_path / "a", "mlx", config={"tie_word_embeddings": True})
    with pytest.raises(FormatError, match=r"depends on the base.*--base"):
        write_adapter(state, tmp_path / "a", "mlx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"lora_parameters": {"rank": 2, "alpha": 3}}, "gives rank 2 and scale None"),
        ({"lora_parameters": {"rank": True, "scale": 1}}, "gives rank True"),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, "rank 2, adapter_config.json says 3"),
    ],
)
def test_configs_that_contradict_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_adapter(make_state(KIND_SPECS["linear"]), tmp_path / "a", "mlx")
    said = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**said, **change}))
    with pytest.raises(FormatError, match=words):
        read_adapter(path)


def test_experts_and_lost_halves_are_refused(tmp_path: Path) -> None:
    path = write_adapter(make_state(KIND_SPECS["linear"]), tmp_path / "a", "mlx")
    file = path / "adapters.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "moe.lora_a": torch.ones(2, 2, 2)}, file)
    with pytest.raises(FormatError, match=r"'moe.lora_a' of shape \(2, 2, 2\)"):
        read_adapter(path)
    save_file({"h.0.fc.lora_a": tensors["h.0.fc.lora_a"]}, file)
    with pytest.raises(FormatError, match="lora_b is missing"):
        read_adapter(path)

"""Experts for vLLM: single matrices under the names of the base's files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.adapter_states import KIND_SPECS, effect, make_state
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import write_adapter

IDS = torch.tensor([[1, 2, 3]])
PREFIX = "base_model.model."


def moe() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 4, "vocab_size": 13, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, initializer_range=0.3)).eval()


@needs_transformers_5
def test_experts_become_the_matrices_that_the_base_has(tmp_path: Path) -> None:
    moe().save_pretrained(tmp_path / "base")
    targets = [{"match": r"experts\.(gate_up|down)_proj", "rank": 2, "alpha": 3}, "q_proj"]
    model = fill(li.inject(moe(), {"rank": 3, "scaling": "rslora", "targets": targets}))
    state = li.adapter_state(model)
    stacked = write_adapter(state, tmp_path / "stacked", base_model="org/base")
    path = li.convert(stacked, tmp_path / "a", "vllm", base=tmp_path / "base")
    assert '"base_model_name_or_path": "org/base"' in (path / "adapter_config.json").read_text()
    tensors = load_file(path / "adapter_model.safetensors")
    experts = "model.layers.0.mlp.experts"
    gate_up = effect(state.sites[f"{experts}.gate_up_proj"]).float()
    down = effect(state.sites[f"{experts}.down_proj"]).float()
    for expert in range(3):
        due = {"gate_proj": gate_up[expert, :8], "up_proj": gate_up[expert, 8:]}
        for name, delta in {**due, "down_proj": down[expert]}.items():
            key = f"{PREFIX}{experts}.{expert}.{name}"
            found = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)
    assert not [f for f in li.check_adapter(path, "vllm", base=tmp_path / "base") if f.stops]
    back = li.load_adapter(moe(), path)  # transformers' older names are known
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_stacks_without_a_base_or_half_of_them_are_refused(tmp_path: Path) -> None:
    state = make_state(KIND_SPECS["experts"])
    with pytest.raises(FormatError, match=r"depend on the base's files.*--base"):
        write_adapter(state, tmp_path / "a", "vllm")
    with pytest.raises(FormatError, match=r'0 of its 3 experts separately.*format="peft"'):
        write_adapter(state, tmp_path / "a", "vllm", separate=lambda _: [])
    spec = KIND_SPECS["experts"].at("mlp.experts.up", "mlp.experts.up")
    path = write_adapter(make_state(spec), tmp_path / "b")
    assert "both stacks of experts" in li.check_adapter(path, "vllm")[0].problem

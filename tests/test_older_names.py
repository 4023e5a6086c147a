"""Adapters of transformers 4 on models of transformers 5: as PEFT reads them, live and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.checkpoint import Checkpoint, merge_checkpoint, read_weighted
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter

transformers = pytest.importorskip("transformers", "5")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**TEXT, num_local_experts=3)
        model = transformers.MixtralForCausalLM(config)
    elif kind == "qwen3_moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **EXPERTS))
    else:
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(
                **vision, num_attention_heads=2, image_size=8, patch_size=4
            ),
        )
        model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, 0, 0.2)
    return model.eval()  # type: ignore[no-any-return]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits  # type: ignore[no-any-return]


def off(found: Tensor, due: Tensor) -> float:
    return float((found - due).abs().max())


def write_old(path: Path, shapes: dict[str, tuple[int, int]], targets: list[str]) -> Path:
    """A PEFT folder whose modules have these names, and these (in, out) features."""
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (n_in, n_out) in shapes.items():
        for side, shape in (("A", (2, n_in)), ("B", (n_out, 2))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.3
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


FAMILIES: dict[str, tuple[str, tuple[str, str, str], int]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 24),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 12),
}


def old_experts(kind: str, path: Path) -> Path:
    block, leaves, width = FAMILIES[kind]
    shapes = {}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj"] = (16, 16)
        for expert in range(3):
            for leaf in leaves:
                name = f"model.layers.{layer}.{block}.experts.{expert}.{leaf}"
                shapes[name] = (width, 16) if leaf == leaves[2] else (16, width)
    return write_old(path, shapes, ["q_proj", *leaves])


@pytest.mark.parametrize("kind", FAMILIES)
def test_single_experts_become_stacks(kind: str, tmp_path: Path) -> None:
    path = old_experts(kind, tmp_path / "old")
    due = logits(peft.PeftModel.from_pretrained(build(kind), path))
    assert off(logits(build(kind)), due) > 0.1
    model = li.load_adapter(build(kind), path)
    assert off(logits(model), due) < 1e-5
    li.save_adapter(model, tmp_path / "new")
    assert off(logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "new")), due) < 1e-5
    build(kind).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    merge_checkpoint(base, [read_weighted(path, base)], tmp_path / "merged")
    assert off(logits(type(build(kind)).from_pretrained(tmp_path / "merged")), due) < 1e-5


def test_an_expert_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.7.w1"
    path = write_old(tmp_path / "old", {name: (16, 24)}, ["w1"])
    with pytest.raises(FormatError, match=r"of which it would be a part"):
        li.load_adapter(build("mixtral"), path)


def test_dora_of_single_experts_is_refused(tmp_path: Path) -> None:
    """A magnitude of each expert has no place on a stack; without it, it would be another model."""
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    path = write_old(tmp_path / "old", {name: (16, 24)}, ["w1"])
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    magnitude = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(24)}
    save_file(load_file(file) | magnitude, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(FormatError, match="which cannot hold the m of each"):
        li.load_adapter(build("mixtral"), path)


def test_names_of_llava_before_4_52_are_the_class_s_names_now(tmp_path: Path) -> None:
    old = {f"language_model.model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(2)}
    old["vision_tower.vision_model.encoder.layers.0.self_attn.v_proj"] = (8, 8)
    path = write_old(tmp_path / "old", old, ["q_proj", "v_proj"])
    model: Any = li.load_adapter(build("llava"), path)
    assert {*li.adapter_state(model).sites} == {
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.v_proj",
    }
    tensors = read_adapter(path).sites
    dense: Any = build("llava")
    with torch.no_grad():
        for n in range(2):
            site = tensors[f"language_model.model.layers.{n}.self_attn.q_proj"]
            layer = dense.model.language_model.layers[n].self_attn.q_proj
            layer.weight.add_(3 * site.B @ site.A)
    assert off(logits(model), logits(dense)) < 1e-5


def test_names_that_nobody_knows_are_refused_as_before(tmp_path: Path) -> None:
    path = write_old(tmp_path / "old", {"model.layers.0.attention.q": (16, 16)}, ["q"])
    with pytest.raises(FormatError, match="the model has no such module"):
        li.load_adapter(build("mixtral"), path)

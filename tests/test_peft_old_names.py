"""Adapters of transformers 4: single experts, and names that are the class's no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from helpers.adapter_states import edit_config
from helpers.architectures import ARCHITECTURES
from helpers.checkpoints import merged_on_disk
from helpers.versions import needs_peft_reads_experts
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter

pytest.importorskip("transformers", "5")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 32
# The block's old name, the old names of its layers, and which layers of the model have experts.
SINGLE: dict[str, tuple[str, tuple[str, ...], list[int], int]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), [0, 1], 4),
    "qwen moe, dense first": ("mlp", ("gate_proj", "up_proj", "down_proj"), [1], 4),
}


def write_old(path: Path, modules: list[str], targets: list[str]) -> Path:
    """A PEFT folder whose modules have these names, of WIDTH features on both sides."""
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in modules:
        for side, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.3
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@needs_peft_reads_experts
@pytest.mark.parametrize("kind", SINGLE)
def test_single_experts_become_stacks(kind: str, tmp_path: Path) -> None:
    block, leaves, layers, n = SINGLE[kind]
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in layers]
    for layer in layers:
        experts = f"model.layers.{layer}.{block}.experts"
        names += [f"{experts}.{expert}.{leaf}" for expert in range(n) for leaf in leaves]
    path = write_old(tmp_path / "old", names, ["q_proj", *leaves])
    row = ARCHITECTURES[kind]
    due = row.outputs(peft.PeftModel.from_pretrained(row.build(), path))
    assert error(row.outputs(row.build()), due) > 0.01
    model = li.load_adapter(row.build(), path)
    li.save_adapter(model, tmp_path / "new")
    theirs = peft.PeftModel.from_pretrained(row.build(), tmp_path / "new")
    for reader in (model, theirs, merged_on_disk(row.build(), path, tmp_path)):
        assert error(row.outputs(reader), due) < 2e-5


def test_a_stack_has_zeros_where_an_expert_has_no_adapter(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts"
    old = write_old(tmp_path / "old", [f"{name}.0.w1", f"{name}.2.w3"], ["w1", "w3"])
    sites = read_adapter(old).sites
    row = ARCHITECTURES["mixtral"]
    model, dense = li.load_adapter(row.build(), old), row.build()
    with torch.no_grad():
        stack = dense.model.layers[0].mlp.experts.gate_up_proj
        for expert, leaf, rows in ((0, "w1", slice(WIDTH)), (2, "w3", slice(WIDTH, None))):
            site = sites[f"{name}.{expert}.{leaf}"]
            stack[expert, rows] += 3 * site.B @ site.A
    assert error(row.outputs(model), row.outputs(dense)) < 2e-5


def test_experts_that_a_stack_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A magnitude of each expert has no place on a stack; without it, the model is another."""
    block = "model.layers.0.block_sparse_moe.experts"
    model = ARCHITECTURES["mixtral"].build()
    beyond = write_old(tmp_path / "beyond", [f"{block}.7.w1"], ["w1"])
    with pytest.raises(FormatError, match="of which it would be a part"):
        li.load_adapter(model, beyond)
    dora = edit_config(write_old(tmp_path / "dora", [f"{block}.1.w1"], ["w1"]), use_dora=True)
    file = dora / "adapter_model.safetensors"
    magnitude = {f"base_model.model.{block}.1.w1.lora_magnitude_vector": torch.ones(WIDTH)}
    save_file(load_file(file) | magnitude, file)
    with pytest.raises(FormatError, match="which cannot hold the m of each"):
        li.load_adapter(model, dora)


@needs_peft_reads_experts
def test_names_of_llava_before_4_52_are_the_class_s_names_now(tmp_path: Path) -> None:
    old = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(2)]
    old.append("vision_tower.vision_model.encoder.layers.0.self_attn.v_proj")
    path, row = write_old(tmp_path / "old", old, ["q_proj", "v_proj"]), ARCHITECTURES["llava"]
    model: Any = li.load_adapter(row.build(), path)
    assert {*li.adapter_state(model).sites} == {
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.v_proj",
    }
    site = read_adapter(path).sites[old[1]]
    name = "model.language_model.layers.1.self_attn.q_proj"
    dense = row.build().get_submodule(name).weight + 3 * site.B @ site.A
    assert error(model.get_submodule(name).weight, dense) < 1e-6


def test_two_names_of_one_site_and_names_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    names = ("language_model.model", "model.language_model")
    twice = [f"{start}.layers.0.self_attn.q_proj" for start in names]
    path = write_old(tmp_path / "twice", twice, ["q_proj"])
    with pytest.raises(FormatError, match="q_proj': two tensors of the adapter are this one"):
        li.load_adapter(ARCHITECTURES["llava"].build(), path)
    path = write_old(tmp_path / "unknown", ["model.layers.0.attention.q"], ["q"])
    with pytest.raises(FormatError, match=r"model\.layers\.0\.attention\.q.*no such module"):
        li.load_adapter(ARCHITECTURES["mixtral"].build(), path)

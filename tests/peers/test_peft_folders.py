"""Folders of PEFT that were edited, or written for names of before transformers 5.

They are read as PEFT reads them, or refused. PEFT leaves out tensors of modules that the config
does not target; here that is an error.
"""

import contextlib
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.architectures import ARCHITECTURES
from helpers.merging import merged_model
from helpers.refusals import refused
from helpers.states import edit_config
from helpers.versions import needs_peft_reads_experts, needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

# Edited -------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in ("q", "v", "mlp")}
    table, head = nn.Embedding(12, 8), nn.Linear(8, 3)
    return nn.Sequential(OrderedDict(table=table, **layers, head=head))


IDS = torch.arange(12)[None]
EDITS: dict[str, dict[str, Any]] = {
    "another alpha": {"lora_alpha": 64},
    "another rank": {"r": 3},
    "another scaling": {"use_rslora": True},
    "a rank of one": {"rank_pattern": {"q": 7}},
    "an alpha of one": {"alpha_pattern": {"q": 7}},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "another whole module": {"modules_to_save": ["mlp"]},
    "no whole module": {"modules_to_save": None},
    "a target as a whole module": {"modules_to_save": ["head", "v"]},
    "other rows": {"trainable_token_indices": {"table": [2, 6]}},
    "no rows": {"trainable_token_indices": None},
    "a target less": {"target_modules": ["q"]},
    "a target more": {"target_modules": ["q", "v", "mlp"]},
    "an expression for less": {"target_modules": "q"},
    "a target parameter": {"target_parameters": ["mlp.weight"]},
    "no targets": {"target_modules": [], "target_parameters": ["mlp.weight"]},
    "a target left out": {"exclude_modules": ["v"]},
    "layers": {"layers_to_transform": [0]},
}
# What means the same to PEFT, in other words.
SAME: dict[str, dict[str, Any]] = {
    "another order": {"target_modules": ["v", "q"]},
    "nothing left out": {"exclude_modules": []},
    "for training": {"inference_mode": False},
    "a task": {"task_type": "FEATURE_EXTRACTION"},
}


def ours(path: Path) -> Path:
    config = {"rank": 2, "targets": ["q", "v"], "train": ["head"], "tokens": {"table": [3, 5]}}
    return li.save_adapter(fill(li.inject(net(), config)), path, unused=[".*"])


def theirs(path: Path) -> Path:
    config = peft.LoraConfig(
        r=2, target_modules=["q", "v"], modules_to_save=["head"],
        trainable_token_indices={"table": [3, 5]},
    )  # fmt: skip
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


edited = pytest.mark.parametrize("fields", [*EDITS.values(), *SAME.values()], ids=[*EDITS, *SAME])


@edited
def test_an_edited_config_of_ours_is_noted_with_its_field(
    fields: Any, tmp_path: Path, caplog
) -> None:
    path = edit_config(ours(tmp_path / "a"), **fields)
    with contextlib.suppress(li.FormatError):
        li.load_adapter(net(), path)
    assert (f"'{next(iter(fields))}'" in caplog.text) is (fields in EDITS.values())


@edited
@pytest.mark.parametrize("by", [ours, theirs])
def test_an_edited_config_is_read_as_peft_reads_it_or_refused(by, fields, tmp_path) -> None:
    path = edit_config(by(tmp_path / "a"), **fields)
    try:
        model = li.load_adapter(net(), path)
    except li.FormatError:
        assert fields not in SAME.values()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        due = peft.PeftModel.from_pretrained(net(), path)
    torch.testing.assert_close(model(IDS), due.get_base_model()(IDS))


def test_tensors_of_modules_that_are_no_targets_can_be_read_on_request(tmp_path: Path) -> None:
    whole = li.load_adapter(net(), theirs(tmp_path / "a"))
    path = edit_config(tmp_path / "a", target_modules=["q"])
    with refused(li.FormatError, "'v'", "'target_modules'", "allow="):
        li.load_adapter(net(), path)
    model = li.load_adapter(net(), path, allow=["target_modules"])
    torch.testing.assert_close(model(IDS), whole(IDS))


# Older names --------------------------------------------------------------------------------------

WIDTH = 32
# The block's old name, the old names of its layers, which layers of the model have experts, and how
# many.
SINGLE: dict[str, tuple[str, tuple[str, ...], list[int], int]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), [0, 1], 4),
    "qwen moe, dense first": ("mlp", ("gate_proj", "up_proj", "down_proj"), [1], 4),
}
BLOCK = "model.layers.0.block_sparse_moe.experts"


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
    again = peft.PeftModel.from_pretrained(row.build(), tmp_path / "new")
    for reader in (model, again, merged_model(row.build(), path, tmp_path)):
        assert error(row.outputs(reader), due) < 2e-5


@needs_transformers_5
def test_a_stack_has_zeros_where_an_expert_has_no_adapter(tmp_path: Path) -> None:
    old = write_old(tmp_path / "old", [f"{BLOCK}.0.w1", f"{BLOCK}.2.w3"], ["w1", "w3"])
    sites = li.read_adapter(old).sites
    row = ARCHITECTURES["mixtral"]
    model, dense = li.load_adapter(row.build(), old), row.build()
    with torch.no_grad():
        stack = dense.model.layers[0].mlp.experts.gate_up_proj
        for expert, leaf, rows in ((0, "w1", slice(WIDTH)), (2, "w3", slice(WIDTH, None))):
            site = sites[f"{BLOCK}.{expert}.{leaf}"]
            stack[expert, rows] += 3 * site.B @ site.A
    assert error(row.outputs(model), row.outputs(dense)) < 2e-5


@needs_transformers_5
def test_experts_that_a_stack_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A magnitude of each expert has no place on a stack; without it, the model is another."""
    model = ARCHITECTURES["mixtral"].build()
    beyond = write_old(tmp_path / "beyond", [f"{BLOCK}.7.w1"], ["w1"])
    dora = edit_config(write_old(tmp_path / "dora", [f"{BLOCK}.1.w1"], ["w1"]), use_dora=True)
    file = dora / "adapter_model.safetensors"
    magnitude = {f"base_model.model.{BLOCK}.1.w1.lora_magnitude_vector": torch.ones(WIDTH)}
    save_file(load_file(file) | magnitude, file)
    for path, named in ((beyond, f"'{BLOCK}.7.w1'"), (dora, f"'{BLOCK}.1.w1'")):
        with refused(li.FormatError, named, model=model):
            li.load_adapter(model, path)


@needs_peft_reads_experts
def test_names_of_llava_before_4_52_are_the_class_s_names_now(tmp_path: Path) -> None:
    old = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(2)]
    old.append("vision_tower.vision_model.encoder.layers.0.self_attn.v_proj")
    path, row = write_old(tmp_path / "old", old, ["q_proj", "v_proj"]), ARCHITECTURES["llava"]
    model: Any = li.load_adapter(row.build(), path)
    name = "model.language_model.layers.1.self_attn.q_proj"
    assert {*li.adapter_state(model).sites} == {
        "model.language_model.layers.0.self_attn.q_proj", name,
        "model.vision_tower.encoder.layers.0.self_attn.v_proj",
    }  # fmt: skip
    site = li.read_adapter(path).sites[old[1]]
    dense = row.build().get_submodule(name).weight + 3 * site.B @ site.A
    assert error(model.get_submodule(name).weight, dense) < 1e-6


@needs_transformers_5
def test_two_names_of_one_site_and_names_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    names = ("language_model.model", "model.language_model")
    twice = [f"{start}.layers.0.self_attn.q_proj" for start in names]
    unknown = ["model.layers.0.attention.q"]
    for kind, modules, target in (("llava", twice, "q_proj"), ("mixtral", unknown, "q")):
        path, model = write_old(tmp_path / kind, modules, [target]), ARCHITECTURES[kind].build()
        with refused(li.FormatError, modules[-1], model=model):
            li.load_adapter(model, path)

"""Stacks of experts that PEFT 0.17 and 0.18 adapted, whose sides they took the other way round.

The references are the einsum of PEFT 0.18.1 (tuners/lora/layer.py, `ParamWrapper.get_delta_weight`)
and, for vLLM, what its own loader makes of a file (helpers/expert_loaders.py).
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.expert_loaders import as_sglang_loads_it, of_single_experts, of_stacks
from helpers.experts import SIZES, THREE, TURNED, experts
from helpers.merging import load_checkpoint, merge, merged
from helpers.quantized import quantized
from helpers.refusals import refused
from helpers.states import linear, parameter, state_of
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import lora_inject as li
from lora_inject.checkpoint.places import Places
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.sites import Slices

pytestmark = needs_transformers_5
RANK, SCALE = 2, 1.5
MODULE = "model.layers.0.mlp.experts"
STACKS = ("gate_up_proj", "down_proj")  # in the order of the class: the first one is inside


def of_peft_018(
    model: Any, folder: Path, block: str = MODULE, *, shared: bool = False
) -> dict[str, Tensor]:
    """Write an adapter on both stacks as PEFT 0.18.1 does; return its deltas of the stacks.

    `shared`: what meets the model's own width is one factor for all experts.
    """
    tensors, deltas, prefix = {}, {}, f"base_model.model.{block}"
    for wrapper, name in zip((".base_layer", ""), STACKS, strict=True):
        n, rows, columns = model.get_parameter(f"{block}.{name}").shape
        A, B = torch.randn(n * RANK, rows), torch.randn(columns, RANK * n)
        if shared and name == "gate_up_proj":
            B = B[:, ::n].repeat_interleave(n, dim=1)
        elif shared:
            A = A[:RANK].repeat(n, 1)
        tensors |= {f"{prefix}{wrapper}.lora_A.weight": A, f"{prefix}{wrapper}.lora_B.weight": B}
        of_expert = A.reshape(n, -1, rows), B.reshape(columns, -1, n)
        deltas[name] = SCALE * torch.einsum("o r e, e r i -> e i o", of_expert[1], of_expert[0])
    said = {"peft_type": "LORA", "peft_version": "0.18.1", "r": RANK, "lora_alpha": RANK * SCALE}
    said |= {"target_modules": [], "target_parameters": [f"{block}.{name}" for name in STACKS]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


def apart(deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The deltas of the matrices that the base's files keep apart, by their names there."""
    gate, up = deltas["gate_up_proj"].chunk(2, dim=1)
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": deltas["down_proj"]}
    return {
        f"{MODULE}.{expert}.{name}": delta
        for name, stack in parts.items()
        for expert, delta in enumerate(stack)
    }


def base_of(folder: Path, family: str = "olmoe", **sizes: int) -> tuple[Any, dict[str, Tensor]]:
    """Save a small base; at a width of 8 two matrices of an OLMoE are square together."""
    model = experts(family, **{"intermediate_size": 4, **sizes})[0]
    model.save_pretrained(folder)
    return model, load_checkpoint(folder)


# Matrices apart in the files, square together and not; and stacks as GPT-OSS's, of which every PEFT
# takes the same side for the input.
BASES = [("olmoe", {"hidden_size": 8}), ("olmoe", {"hidden_size": 12})]
BASES += [("gpt_oss", {"intermediate_size": 4}), ("gpt_oss", {"intermediate_size": 6})]


@pytest.mark.parametrize(("family", "sizes"), BASES)
def test_a_merge_on_disk_adds_what_peft_018_added(family, sizes, tmp_path: Path) -> None:
    model, before = base_of(tmp_path / "base", family, **sizes)
    deltas = of_peft_018(model, tmp_path / "adapter")
    due = {f"{MODULE}.{name}": delta for name, delta in deltas.items()}
    if family == "olmoe":
        due = {f"{name}.weight": delta for name, delta in apart(deltas).items()}
    li.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    for key, delta in due.items():
        torch.testing.assert_close(merged[key], before[key] + delta, rtol=0, atol=1e-5)


def test_a_square_stack_that_is_merged_the_wrong_way_round_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying that computes as merging does finds nothing: the defect is in both."""

    def of_shape(_: Any, spec: Any, name: str, matrix: tuple[int, int]) -> bool:
        return matrix != (spec.out_features, spec.in_features)

    model, _ = base_of(tmp_path / "base", hidden_size=8)
    of_peft_018(model, tmp_path / "adapter")
    monkeypatch.setattr(Places, "is_transposed", of_shape)
    with refused(li.CheckpointError, "verify", f"'{MODULE}.0.gate_proj.weight'", "formula"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")


def test_what_is_quantized_again_is_held_to_the_formula_before_it_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = quantized(torch.randn(64, 64), (32, 32))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    tensors = {"q.weight": codes, "q.weight_scale_inv": scales}
    how = {"config": config, "requantize": True}
    merged(tmp_path / "right", tensors, state_of(linear("q", 64, 64)), **how)
    monkeypatch.setattr(Places, "is_transposed", lambda *_: True)
    with refused(li.CheckpointError, "verify", "'q.weight'", "formula"):
        merged(tmp_path / "wrong", tensors, state_of(linear("q", 64, 64)), **how)


@pytest.mark.parametrize("hidden", [8, 12])
def test_vllm_adds_the_pairs_to_the_bases_matrices(hidden: int, tmp_path: Path) -> None:
    """Also by way of a value, which was read without the base."""
    model, _ = base_of(tmp_path / "base", hidden_size=hidden)
    due = of_peft_018(model, tmp_path / "adapter")
    value = li.read_adapter(tmp_path / "adapter", tensor_names=[*model.state_dict()])
    names = ("gate_proj", "down_proj", "up_proj")
    for n, adapter in enumerate((tmp_path / "adapter", value)):
        path = li.convert(adapter, tmp_path / f"{n}", "vllm", base=tmp_path / "base")
        assert li.check_adapter(path, "vllm", base=tmp_path / "base") == []
        added = of_single_experts(path, MODULE, names, 4, hidden, 4)
        torch.testing.assert_close(added, (*due.values(),), rtol=1e-5, atol=1e-5)
    (finding,) = li.check_adapter(tmp_path / "adapter", "vllm", base=tmp_path / "base")
    assert finding.stops
    assert "--to vllm" in finding.fix


def qwen3_vl(inner: int) -> Any:
    """A tiny Qwen3-VL-MoE, whose files hold stacks as (experts, out, in)."""
    text = SIZES | THREE | {"moe_intermediate_size": inner, "head_dim": 4}
    eye = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    eye |= {"out_hidden_size": 8, "num_position_embeddings": 4, "deepstack_visual_indexes": []}
    settings = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=eye)
    return AutoModelForImageTextToText.from_config(settings)


@pytest.mark.parametrize("inner", [4, 6])  # gate and up are square together, and not
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_vl_moe"])
def test_vllm_adds_stacks_to_a_base_whose_files_hold_them(
    family: str, inner: int, tmp_path: Path
) -> None:
    """It takes A for what meets the input, as PEFT 0.18 did for GPT-OSS alone."""
    turned = family in TURNED
    model = experts(family, intermediate_size=inner)[0] if turned else qwen3_vl(inner)
    block = MODULE if turned else MODULE.replace("model.", "model.language_model.")
    model.save_pretrained(tmp_path / "base")
    deltas = of_peft_018(model, tmp_path / "adapter", block)
    due = tuple(delta.mT if turned else delta for delta in deltas.values())
    paths = [li.convert(tmp_path / "adapter", tmp_path / "a", "peft", base=tmp_path / "base")]
    paths += [tmp_path / "adapter"] if turned else []
    for path in paths:
        assert li.check_adapter(path, "vllm", base=tmp_path / "base") == []
        added = of_stacks(path, block, 3, 8, inner)
        torch.testing.assert_close(added, due, rtol=1e-5, atol=1e-5)
    if not turned:
        for base, stops in ((tmp_path / "base", True), (None, False)):
            findings = li.check_adapter(tmp_path / "adapter", "vllm", base=base)
            (finding,) = [f for f in findings if "0.18" in f.problem]
            assert finding.stops == stops
            assert "--to peft" in finding.fix


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize(("family", "sizes"), BASES)
def test_todays_peft_takes_a_for_the_other_side_of_a_stack(family, sizes, tmp_path: Path) -> None:
    """Of a square one without a word; what is converted is what 0.18.1 computed."""
    model, _ = base_of(tmp_path / "base", family, **sizes)
    deltas = of_peft_018(model, tmp_path / "adapter")
    there = li.convert(tmp_path / "adapter", tmp_path / "there", "peft", base=tmp_path / "base")
    for path, stops in ((tmp_path / "adapter", family not in TURNED), (there, False)):
        findings = li.check_adapter(path, "peft", base=tmp_path / "base")
        assert ["0.18" in f.problem and "--to peft" in f.fix for f in findings] == [True] * stops
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), there)
    read.merge_adapter()
    merged = {name.replace(".base_layer", ""): p for name, p in read.named_parameters()}
    for name, delta in deltas.items():
        key = f"base_model.model.{MODULE}.{name}"
        torch.testing.assert_close(merged[key] - model.get_parameter(f"{MODULE}.{name}"), delta)


@pytest.mark.parametrize("hidden", [8, 12])
def test_sglang_adds_shared_factors_to_the_bases_matrices(hidden: int, tmp_path: Path) -> None:
    model, _ = base_of(tmp_path / "base", hidden_size=hidden)
    due = of_peft_018(model, tmp_path / "adapter", shared=True)
    path = li.convert(tmp_path / "adapter", tmp_path / "a", "sglang", base=tmp_path / "base")
    added = as_sglang_loads_it(load_file(path / "adapter_model.safetensors"), 4)
    torch.testing.assert_close(added, [*due.values()], rtol=1e-5, atol=1e-5)


def test_pairs_for_vllm_of_one_matrix_of_a_stack_are_refused_by_name(tmp_path: Path) -> None:
    """It ended in an error of zip."""
    model, _ = base_of(tmp_path / "base", hidden_size=8)
    n = len(model.get_parameter(f"{MODULE}.down_proj"))
    gates = [linear(f"{MODULE}.{expert}.gate_proj", 8, 4) for expert in range(n)]
    downs = [linear(f"{MODULE}.{expert}.down_proj", 4, 8) for expert in range(n)]
    state = li.adapter_state(li.install(model, state_of(*gates, *downs)))
    with refused(li.FormatError, f"'{MODULE}.0.up_proj' is not"):
        li.convert(state, tmp_path / "out", "vllm", base=tmp_path / "base")


def test_pairs_for_vllm_of_slices_across_the_matrices_are_refused(tmp_path: Path) -> None:
    """It ended in an error of torch."""
    base_of(tmp_path / "base", hidden_size=8)
    value = state_of(parameter(f"{MODULE}.gate_up_proj", 4, 8, 8, layout="in_out"))
    (site,) = value.sites.values()
    spec = replace(site.spec, slices=Slices((("0", 4), ("1", 4)), ("0", "1")))
    made = SiteState(spec, torch.randn(spec.a_shape), torch.randn(spec.b_shape))
    with refused(li.StateError, f"'{MODULE}.gate_up_proj'", "slices"):
        li.convert(
            li.AdapterState({spec.name: made}), tmp_path / "out", "vllm", base=tmp_path / "base"
        )

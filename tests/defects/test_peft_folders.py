"""PEFT's folders, edited or of other programs, against PEFT's own reading of the same file."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.architectures import ARCHITECTURES, IDS
from helpers.refusals import refused
from helpers.states import edit_config
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

MODEL = "adapter_model.safetensors"


def of_peft(plain: nn.Module, folder: Path, **options: Any) -> Path:
    """Save an adapter of PEFT, none of whose tensors is zero."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
        wrapped.save_pretrained(folder)
    return folder


def by_peft(plain: nn.Module, folder: Path) -> Tensor:
    """The outputs of PEFT with a folder."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()(IDS).logits


def here(plain: nn.Module, folder: Path, **options: Any) -> Tensor:
    with torch.no_grad():
        return li.load_adapter(copy.deepcopy(plain), folder, **options).eval()(IDS).logits


# Layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": [0]}, {"layers_to_transform": 1},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
])  # fmt: skip
def test_layers_that_an_edited_config_leaves_out_are_told(fields: Any, tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].build()
    of_peft(plain, tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, **fields)
    with refused(li.FormatError, "q_proj", "'layers_to_transform'", "target_modules", model=plain):
        li.load_adapter(plain, tmp_path)


# Ties -------------------------------------------------------------------------------------------


def test_rows_of_both_ends_of_a_tie_are_not_written_so_that_peft_uses_one_for_both(
    tmp_path: Path,
) -> None:
    plain = ARCHITECTURES["bert"].build()
    nn.init.zeros_(plain.cls.predictions.bias)  # which PEFT 0.21 leaves out where it trains rows
    rows = {"word_embeddings": [3], "decoder": [3]}
    of_peft(plain, tmp_path / "theirs", target_modules=["query"], trainable_token_indices=rows)
    due = by_peft(plain, tmp_path / "theirs")
    model = li.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    torch.testing.assert_close(model.eval()(IDS).logits, due)
    with refused(li.FormatError, "word_embeddings", "decoder", "native", model=model):
        li.save_adapter(model, tmp_path / "ours")
    path = li.save_adapter(model, tmp_path / "ours", format="native")
    torch.testing.assert_close(here(plain, path), due)


@pytest.mark.parametrize("end", ["word_embeddings", "decoder"])
def test_rows_of_a_head_with_a_bias_which_peft_leaves_out_are_not_written(
    end: str, tmp_path: Path
) -> None:
    """PEFT 0.21, tuners/trainable_tokens/layer.py: `F.linear(input=x, weight=W)`."""
    model = ARCHITECTURES["bert"].build().eval()
    li.inject(model, {"rank": 2, "targets": ["query"], "tokens": {end: [3]}})
    with refused(li.FormatError, "decoder", "bias", "native", model=model):
        li.save_adapter(model, tmp_path / "ours")


# unsloth ----------------------------------------------------------------------------------------

STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture
def both(tmp_path: Path) -> tuple[nn.Module, dict[str, Path]]:
    """A model, and one adapter of its stacks with the columns of B as PEFT orders them, and not."""
    plain = ARCHITECTURES["qwen moe"].build()
    paths = {way: tmp_path / way for way in ("rank_major", "grouped_by_expert")}
    for path in paths.values():
        torch.manual_seed(1)
        of_peft(plain, path, target_modules=["q_proj"], **STACKS)
    file, n = paths["grouped_by_expert"] / MODEL, plain.config.num_experts
    tensors = load_file(file)
    for name in [name for name in tensors if "experts" in name and "lora_B" in name]:
        B = tensors[name]  # PEFT: (out, r, E)
        tensors[name] = B.view(len(B), -1, n).transpose(1, 2).reshape(B.shape)
    save_file(tensors, file)
    return plain, paths


@needs_transformers_5
def test_the_layout_of_b_that_unsloth_states_is_the_one_that_is_read(both: Any, run: Any) -> None:
    plain, paths = both
    due, base = by_peft(plain, paths["rank_major"]), paths["rank_major"].parent / "base"
    plain.save_pretrained(base)
    for layout, path in paths.items():
        edit_config(path, lora_B_layout=layout, auto_mapping={"unsloth_fixed": True})
        torch.testing.assert_close(here(plain, path), due)
        out = base.parent / f"out {layout}"
        assert run("merge", base, path, "--output", out).code == 0
        torch.testing.assert_close(type(plain).from_pretrained(out).eval()(IDS).logits, due)


@needs_transformers_5
@pytest.mark.parametrize("sign", [
    {"auto_mapping": {"unsloth_fixed": True}}, {"base_model_name_or_path": "unsloth/Qwen3"},
])  # fmt: skip
def test_a_file_of_unsloth_that_does_not_state_it_asks(both: Any, sign: Any) -> None:
    plain, paths = both
    for path in paths.values():
        edit_config(path, **sign)
        with refused(li.FormatError, "unsloth", "'lora_B_layout'", "by_expert'", model=plain):
            li.load_adapter(plain, path)


@needs_transformers_5
@pytest.mark.parametrize("client", ["peft", "vllm"])
def test_a_program_that_would_read_columns_by_expert_by_rank_is_told(
    both: Any, client: str, tmp_path: Path
) -> None:
    plain, paths = both
    plain.save_pretrained(tmp_path / "base")
    for layout, path in paths.items():
        edit_config(path, lora_B_layout=layout)
        stops = [found.problem for found in li.check_adapter(path, client) if found.stops]
        assert any("lora_B_layout" in said for said in stops) == (layout == "grouped_by_expert")
    there = li.convert(paths["grouped_by_expert"], tmp_path / "c", "peft", base=tmp_path / "base")
    torch.testing.assert_close(by_peft(plain, there), by_peft(plain, paths["rank_major"]))


def test_an_unknown_layout_of_b_is_refused(tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].build()
    of_peft(plain, tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, lora_B_layout="by_column")
    with refused(li.FormatError, "lora_B_layout", "rank_major", "grouped_by_expert"):
        li.read_adapter(tmp_path)

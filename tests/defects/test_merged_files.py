"""Checkpoints on disk: what was merged, extracted or verified otherwise than it was said."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import fill
from helpers.experts import experts
from helpers.merging import (
    LLAMA,
    adapter_of,
    llama_tensors,
    load_checkpoint,
    merge,
    save_checkpoint,
)
from helpers.modules import tree
from helpers.quantized import quantized
from helpers.refusals import refused
from helpers.states import linear, state_of
from helpers.versions import needs_transformers_5
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject.checkpoint import WeightedAdapter, verify_checkpoint
from lora_inject.checkpoint.places import Places
from lora_inject.core.files.safetensors_file import read_header

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# Extracted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_no_plain_float_is_compared_too(
    dtype: torch.dtype, alone: bool, tmp_path: Path
) -> None:
    plain, ids = torch.randn(6, 4), torch.randint(0, 2, (5, 3))
    base = {"fc.weight": plain, "codes": ids.to(dtype).clone(), "same": ids.to(dtype).clone()}
    tuned = base | {"codes": (1 - ids).to(dtype)}
    if not alone:
        tuned["fc.weight"] = plain + torch.outer(torch.arange(6.0), torch.ones(4))
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    if alone:
        with refused(li.CheckpointError, "tuned"):
            li.extract_adapter(*files, tmp_path / "a", rank=1)
        return
    report = li.extract_adapter(*files, tmp_path / "a", rank=1)
    assert (report.left, report.n_equal) == (("codes",), 1)


def test_a_transposed_convolution_is_extracted_as_the_model_takes_it(tmp_path: Path) -> None:
    """It was extracted as a convolution, the other way round, and no model took the adapter."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 4, "image_size": 32, "fusion_hidden_size": 4}
    config = transformers.DPTConfig(
        **sizes, neck_hidden_sizes=[4] * 4, backbone_out_indices=[*range(4)]
    )
    model = transformers.DPTForDepthEstimation(config)
    name = "neck.reassemble_stage.layers.0.resize"
    said = config.to_dict() | {"architectures": ["DPTForDepthEstimation"]}
    weight = model.get_parameter(f"{name}.weight")
    base = save_checkpoint(tmp_path / "base", model.state_dict(), config=said)
    with torch.no_grad():
        weight += torch.outer(torch.randn(4), torch.randn(weight[0].numel())).view_as(weight)
    tuned = save_checkpoint(tmp_path / "tuned", model.state_dict(), config=said)
    li.extract_adapter(base, tuned, tmp_path / "a", rank=1, format="native")
    fresh = transformers.DPTForDepthEstimation.from_pretrained(base)
    li.load_adapter(fresh, tmp_path / "a.safetensors")
    merged = dict(li.merged_weights(fresh))[f"{name}.weight"]
    torch.testing.assert_close(merged, weight.detach(), rtol=0, atol=1e-5)
    with refused(li.FormatError, f"'{name}'", "conv_transpose"):
        li.extract_adapter(base, tuned, tmp_path / "b", rank=1)


def test_a_tensor_of_another_dtype_is_not_equal(tmp_path: Path) -> None:
    delta = torch.outer(torch.arange(6.0), torch.ones(4))
    base = {"fc.weight": torch.zeros(6, 4), "q": torch.ones(4, 4, dtype=torch.int8)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"fc.weight": delta, "q": torch.ones(4, 4)}, tmp_path / "tuned.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert li.extract_adapter(*files, tmp_path / "a", rank=1).left == ("q",)


@needs_transformers_5
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "jetmoe"])
def test_the_difference_of_routers_and_of_biases_of_experts_goes_onto_the_model(
    family: str, tmp_path: Path
) -> None:
    """A router is no linear layer, and no adapter holds low ranks of a bias, whatever its shape."""
    base, tuned = experts(family)[0], experts(family)[0]
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=8, full=True)
    ids = torch.arange(6)[None]
    found = li.load_adapter(base, tmp_path / "a")(ids).logits
    torch.testing.assert_close(found, tuned(ids).logits, rtol=1e-3, atol=1e-4)


def test_the_difference_of_a_tied_bias_is_under_each_of_its_names(tmp_path: Path) -> None:
    """The head of a BERT adds the one that the files lack."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    settings = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    base = transformers.BertForMaskedLM(settings).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.cls.predictions.bias.normal_()
        tuned.bert.embeddings.word_embeddings.weight.normal_()
    tuned.save_pretrained(tmp_path / "tuned")
    li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=8, full=True)
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    ids = torch.arange(6)[None]
    merged = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    for found in (merged, li.load_adapter(base, tmp_path / "a")):
        torch.testing.assert_close(found(ids).logits, tuned(ids).logits, rtol=1e-3, atol=1e-4)


# Grown ------------------------------------------------------------------------------------------


def grown(tmp_path: Path, config: Any, *weights: float) -> tuple[Path, list[WeightedAdapter]]:
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, config)
    parts = []
    for weight in weights:
        rows = torch.randn(35, 16)
        parts.append(WeightedAdapter(li.AdapterState({}, {EMBEDDING: rows, HEAD: rows}), weight))
    return base, parts


@pytest.mark.parametrize("weights", [(0.5,), (2.0,), (1.0, 1.0), (0.3, 0.3)])
def test_rows_that_the_base_lacks_have_no_weighted_change(
    weights: tuple[float, ...], tmp_path: Path
) -> None:
    base, parts = grown(tmp_path, LLAMA | {"vocab_size": 32}, *weights)
    with refused(li.CheckpointError, "weight"):
        li.merge_checkpoint(base, parts, tmp_path / "out")
    new = WeightedAdapter(li.AdapterState({}, {"score.weight": torch.randn(3, 16)}), weights[0])
    if weights[0] != 1:
        with refused(li.CheckpointError, "'score.weight'", "weight"):
            li.merge_checkpoint(base, [new], tmp_path / "out", options=options(allow_new=True))
    assert not (tmp_path / "out").exists()


def test_weights_that_add_up_to_1_mix_grown_rows(tmp_path: Path) -> None:
    base, parts = grown(tmp_path, LLAMA | {"vocab_size": 32}, 0.25, 0.75)
    li.merge_checkpoint(base, parts, tmp_path / "out")
    one, two = (part.state.trained[EMBEDDING].double() for part in parts)
    written = load_checkpoint(tmp_path / "out")
    due = (0.25 * one + 0.75 * two).bfloat16()
    torch.testing.assert_close(written[EMBEDDING], due, rtol=2**-7, atol=0)
    assert written[HEAD].shape == (35, 16)


def test_a_grown_vocabulary_leaves_other_vocabularies_of_the_config(tmp_path: Path) -> None:
    """As BLIP-2's: that of its qformer is another."""
    inner = {"text_config": {"vocab_size": 32, "pad": 1}, "qformer_config": {"vocab_size": 77}}
    base, parts = grown(tmp_path, inner, 1.0)
    li.merge_checkpoint(base, parts, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"vocab_size": 35, "pad": 1}
    assert written["qformer_config"] == {"vocab_size": 77}
    assert "vocab_size" not in written
    assert verify_checkpoint(base, parts, tmp_path / "out").problems == ()
    both, parts = grown(tmp_path / "2", {"vocab_size": 32, "other": {"vocab_size": 5}}, 1.0)
    li.merge_checkpoint(both, parts, tmp_path / "2" / "out")
    written = json.loads((tmp_path / "2" / "out" / "config.json").read_text())
    assert (written["vocab_size"], written["other"]) == (35, {"vocab_size": 5})


# What verifying has to find, and what several names have -----------------------------------------


def test_what_is_quantized_again_is_held_to_the_formula_before_it_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = quantized(torch.randn(64, 64), (32, 32))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    tensors = {"q.weight": codes, "q.weight_scale_inv": scales}
    base = save_checkpoint(tmp_path / "base", tensors, 1, config)
    state = state_of(linear("q", 64, 64))
    merge(base, [state], tmp_path / "right", requantize=True)
    monkeypatch.setattr(Places, "is_transposed", lambda *_: True)
    with refused(li.CheckpointError, "verify", "'q.weight'", "formula"):
        merge(base, [state], tmp_path / "wrong", requantize=True)


def test_unpacked_tensors_lie_in_the_order_of_their_codes_in_every_process(tmp_path: Path) -> None:
    """Else verifying in another process finds another header, and a rerun begins anew."""
    names, tensors = [f"{n}.up" for n in range(8)], {"q.weight": torch.randn(4, 4)}
    for name in names:
        codes = torch.randint(0, 256, (1, 4, 1, 16), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": torch.full((1, 4, 1), 120).byte()}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    base = save_checkpoint(tmp_path / "base", tensors, 1, config)
    merge(base, [state_of(linear("q", 4, 4))], tmp_path / "out", dequantize="bfloat16")
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert [name for name in header.tensors if name != "q.weight"] == names


def test_a_layer_of_two_names_gets_every_update_and_bias_under_both(tmp_path: Path) -> None:
    layer = nn.Linear(4, 6)
    model = tree({"one": layer, "two": layer})
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    base = save_checkpoint(tmp_path / "base", tensors)
    for name in "ab":
        rule = {"rank": 2, "targets": ["one"], "lora_bias": name == "a"}
        fill(li.inject(model, rule, name), name)
    li.activate(model, {"a": 1.0, "b": 1.0})
    merge(base, [li.adapter_state(model, name) for name in "ab"], tmp_path / "out")
    written = load_checkpoint(tmp_path / "out")
    for name, value in dict(li.merged_weights(model)).items():
        torch.testing.assert_close(written[name], value)
        assert torch.equal(written[name.replace("one", "two")], written[name])


@pytest.mark.parametrize("weight", [-1.0, 0.5])
def test_a_gain_is_neither_taken_away_nor_weighted(weight: float, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"q.weight": torch.randn(6, 4)})
    given = WeightedAdapter(state_of(linear("q", 4, 6, variant="dora")), weight)
    with refused(li.CheckpointError, "'q.weight'", "DoRA"):
        merge(base, [given], tmp_path / "out")


# Messages and places ----------------------------------------------------------------------------


def options(**given: Any) -> Any:
    return li.classes.MergeOptions(**given)


def test_rows_with_nan_are_told_without_their_thousands_of_numbers(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", llama_tensors(vocab=4096), 1, LLAMA)
    numbers = tuple(range(4000))
    rows = torch.full((4000, 16), torch.nan)
    state = li.AdapterState({}, {EMBEDDING: rows}, rows={EMBEDDING: numbers})
    with pytest.raises(li.CheckpointError) as raised:
        li.merge_checkpoint(base, [state], tmp_path / "out")
    assert f"'{EMBEDDING}' holds NaN or Inf" in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("folder", ["merged", "deep/er"])
def test_a_base_of_one_file_may_have_the_output_beside_it(folder: str, tmp_path: Path) -> None:
    tensors = llama_tensors()
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    adapter = adapter_of(tensors, "q_proj")
    base = tmp_path / "base.safetensors"
    for out in (tmp_path / folder, tmp_path / "again"):  # which takes nothing of the first one
        li.merge_checkpoint(base, [adapter], out)
        assert [path.name for path in out.iterdir()] == ["base.safetensors"]
        assert verify_checkpoint(base, [adapter], out).problems == ()
    with refused(li.CheckpointError, str(tmp_path)):
        li.merge_checkpoint(base, [adapter], tmp_path)
    with refused(li.CheckpointError, str(tmp_path)):
        li.merge_checkpoint(save_checkpoint(tmp_path / "b", tensors), [adapter], tmp_path / "b/c")


def test_verifying_a_merge_in_another_dtype_names_the_option(tmp_path: Path, run: Any) -> None:
    tensors = llama_tensors(dtype=torch.float32)
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    path = li.write_adapter(adapter_of(tensors, "q_proj"), tmp_path / "a", "native")
    out = tmp_path / "out"
    assert run("merge", base, path, "-o", out, "--dtype", "bfloat16").code == 0
    ran = run("verify", base, path, out)
    assert ran.code == 1
    assert "BF16 and not F32" in " ".join((ran.out + ran.err).split())
    assert "--dtype" in ran.out + ran.err
    assert run("verify", base, path, out, "--dtype", "bfloat16").code == 0

"""GGUF files: names are gguf's own, rows of q and k are where llama.cpp has them in the base."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter_states import KIND_SPECS, effect, make_state
from helpers.reference import adapted, llama
from torch import Tensor

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import gguf_file, read_adapter, write_adapter

gguf = pytest.importorskip("gguf", reason="pip install gguf")


@pytest.mark.parametrize("model_type", gguf_file.FAMILIES)
def test_names_are_those_of_llama_cpp(model_type: str) -> None:
    architecture, decoder = gguf_file.FAMILIES[model_type]
    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(archs[architecture], 3)
    for mine in decoder.names:
        full = mine if mine in ("model.embed_tokens", "lm_head") else f"model.layers.2.{mine}"
        due = names.get_name(f"{full}.weight", try_suffixes=(".weight",))
        assert due in {f"{decoder.theirs(full, '')}.weight", None}, full
        assert due is not None or (mine, model_type[:5]) == ("lm_head", "gemma")


def permuted(delta: Tensor, n_heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py, of the dense delta."""
    shape = (n_heads, 2, len(delta) // n_heads // 2, *delta.shape[1:])
    return delta.reshape(shape).swapaxes(1, 2).reshape(delta.shape)


def content(path: Path) -> tuple[float, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    return alpha, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def test_llama_cpp_adds_to_its_weights_what_we_add_to_ours(tmp_path: Path) -> None:
    """Its update is `alpha / rank * B @ A`, rank being the tensor's (src/llama-adapter.h)."""
    targets: list[Any] = [{"match": "q_proj", "rank": 3}, {"match": "k_proj", "alpha": 7}]
    targets += [{"match": "down_proj", "scaling": "rslora"}, "lm_head", "embed_tokens"]
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = llama(**sizes).float()
    model = adapted(plain, *targets)
    path = tmp_path / "a.gguf"
    li.save_adapter(model, path, format="gguf")
    alpha, tensors = content(path)
    state = li.adapter_state(model)
    for name, site in state.sites.items():
        key = gguf_file.FAMILIES["llama"][1].theirs(name, "") + ".weight"
        a, b = tensors.pop(f"{key}.lora_a"), tensors.pop(f"{key}.lora_b")
        a = a.T if name == "model.embed_tokens" else a  # as its loader wants it
        found, due = alpha / b.shape[1] * b @ a, effect(site).float()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        due = permuted(due, heads) if heads else due
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-5)
    assert not tensors
    back = li.load_adapter(llama(**sizes).float(), path)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
CONFIG |= {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 5, "head_dim": 4}


def at(name: str, kind: str = "linear") -> Any:
    return make_state(KIND_SPECS[kind].at(name, f"{name}.weight"))


@pytest.mark.parametrize(
    ("state", "config", "words"),
    [
        (at("model.layers.0.mlp.up_proj"), None, r"depends on the base.*--base BASE"),
        (at("model.layers.0.mlp.up_proj"), {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        (at("model.layers.0.mlp.fc"), CONFIG, "no name for this module"),
        (at("model.layers.0.self_attn.q_proj"), CONFIG, "7 rows, and the base has 1 heads of 4"),
        (at("model.embed_tokens", "embedding"), CONFIG, "as one tensor"),
        (at("lm_head"), CONFIG, "as one tensor"),
        (make_state(KIND_SPECS["conv"]), CONFIG, "cannot hold a site of kind 'conv'"),
        (at("model.layers.0.self_attn.q_proj"), {"model_type": "llama"}, "'num_attention_heads'"),
    ],
)
def test_what_llama_cpp_would_not_read_right_is_refused(
    state: Any, config: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=words):
        write_adapter(state, tmp_path / "a.gguf", "gguf", config=config)
    assert not list(tmp_path.iterdir())


def test_scales_are_folded_into_tensors_of_16_bits_with_one_rounding(tmp_path: Path) -> None:
    parts = {"mlp.up_proj": 4.0, "mlp.gate_proj": 3.0}
    fc = KIND_SPECS["linear"]
    specs = [replace(fc, name=f"model.layers.0.{p}", alpha=alpha) for p, alpha in parts.items()]
    state = make_state(*specs).to(torch.bfloat16)
    path = write_adapter(state, tmp_path / "a.gguf", "gguf", config={"model_type": "qwen2"})
    for name, site in read_adapter(path).sites.items():
        torch.testing.assert_close(effect(site), effect(state.sites[name]), rtol=1e-6, atol=1e-6)


def test_models_and_other_families_are_refused(tmp_path: Path) -> None:
    for architecture, kind, words in [
        ("llama", gguf.GGUFType.MODEL, "not a model"),
        ("gpt2", gguf.GGUFType.ADAPTER, "architecture is 'gpt2'"),
    ]:
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(kind)
        writer.add_string("adapter.type", "lora")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with warnings.catch_warnings(), pytest.raises(FormatError, match=words):
            read_adapter(path)


def test_fused_projections_of_phi3(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_up_proj"
    path = write_adapter(at(name), tmp_path / "a.gguf", "gguf", config={"model_type": "phi3"})
    assert set(content(path)[1]) == {"blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"}
    assert list(read_adapter(path).sites) == [name]


def test_the_config_of_a_base_is_enough(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    state = at("model.layers.0.mlp.gate_proj")
    path = li.convert(state, tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    (name,) = read_adapter(path).sites
    assert name == "model.layers.0.mlp.gate_proj"

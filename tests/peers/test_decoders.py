"""mlx-lm's and llama.cpp's files of decoders.

They are held to what mlx-lm computes, and to the formulas of llama.cpp's own layers.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.reference import IDS, adapted, llama, logits
from helpers.refusals import refused
from helpers.states import SITES, edit_config, effect, linear, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def base_model() -> Any:
    return llama(**SIZES).float()


def hold_read(path: Path, model: Any) -> None:
    """Hold what is read of a file to the model."""
    back = li.load_adapter(base_model(), path)
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-4)


def near(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-5)


# llama.cpp ----------------------------------------------------------------------------------------

PLAIN = [f"self_attn.{name}_proj" for name in "qkvo"]
PLAIN += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
FUSED = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
# Its architecture and the layers that it keeps as they are, by model_type.
FAMILIES = {
    "llama": ("llama", PLAIN), "mistral": ("llama", PLAIN), "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", PLAIN), "gemma": ("gemma", PLAIN), "gemma2": ("gemma2", PLAIN),
    "gemma3_text": ("gemma3", PLAIN), "phi3": ("phi3", FUSED),
}  # fmt: skip
NAMES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def content(path: Path) -> tuple[float, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    return alpha, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_of_llama_cpp(model_type: str, tmp_path: Path) -> None:
    architecture, layers = FAMILIES[model_type]
    names = [f"model.layers.2.{layer}" for layer in layers]
    known = gguf.get_tensor_name_map(NAMES[architecture], 3)
    due = {known.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in names}
    config = {"model_type": model_type, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"hidden_size": 8, "head_dim": 4, "num_hidden_layers": 3}
    state = state_of(*(linear(name, 8, 8) for name in names))
    path = li.write_adapter(state, tmp_path / "a.gguf", "gguf", config=config)
    assert {key.removesuffix(".lora_a") for key in content(path)[1] if key.endswith("a")} == due


def permuted(delta: Tensor, n_heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py, of the dense delta."""
    shape = (n_heads, 2, len(delta) // n_heads // 2, *delta.shape[1:])
    return delta.reshape(shape).swapaxes(1, 2).reshape(delta.shape)


def test_llama_cpp_adds_to_its_weights_what_we_add_to_ours(tmp_path: Path) -> None:
    """Its update is `alpha / rank * B @ A`, rank being the tensor's (src/llama-adapter.h)."""
    targets: list[Any] = [{"match": "q_proj", "rank": 3}, {"match": "k_proj", "alpha": 7}]
    targets += [{"match": "down_proj", "scaling": "rslora"}, "lm_head", "embed_tokens"]
    model = adapted(base_model(), *targets)
    path = li.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    alpha, tensors = content(path)
    known = gguf.get_tensor_name_map(NAMES["llama"], 2)
    for name, site in li.adapter_state(model).sites.items():
        key = known.get_name(f"{name}.weight", try_suffixes=(".weight",))
        a, b = tensors.pop(f"{key}.lora_a"), tensors.pop(f"{key}.lora_b")
        a = a.T if name == "model.embed_tokens" else a  # as its loader wants it
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        due = effect(site).float()
        near(alpha / b.shape[1] * b @ a, permuted(due, heads) if heads else due)
    assert not tensors


def test_scales_are_folded_into_tensors_of_16_bits_with_one_rounding(tmp_path: Path) -> None:
    rows = [linear("model.layers.0.mlp.up_proj"), linear("model.layers.0.mlp.gate_proj", alpha=3.0)]
    state = li.algebra.as_dtype(state_of(*rows), torch.bfloat16)
    path = li.write_adapter(state, tmp_path / "a.gguf", "gguf", config={"model_type": "qwen2"})
    alpha, tensors = content(path)
    for name, key in ("up_proj", "ffn_up"), ("gate_proj", "ffn_gate"):
        a, b = (tensors[f"blk.0.{key}.weight.lora_{end}"] for end in "ab")
        due = effect(state.sites[f"model.layers.0.mlp.{name}"]).float()
        near(alpha / b.shape[1] * b @ a, due)


# MLX ----------------------------------------------------------------------------------------------


def served_by_mlx(folder: Path, adapter: Path | None = None) -> Any:
    mx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_model(folder)[0]
    model = model if adapter is None else load_adapters(model, str(adapter))
    model.eval()
    return lambda ids: torch.tensor(model(mx.array(ids.numpy())).tolist())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "targets",
    [
        [{"match": "q_proj", "layers": 1}, "lm_head", "embed_tokens"],
        [{"match": "k_proj", "rank": 3, "scaling": "rslora"}, {"match": "down_proj", "alpha": 1}],
    ],
    ids=["one rank and scale", "unequal"],
)
def test_mlx_computes_the_same(targets: list[Any], tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model = adapted(base_model(), *targets)
    li.save_adapter(model, tmp_path / "a", format="mlx")
    due = served_by_mlx(tmp_path / "base", tmp_path / "a")(IDS)
    assert (due - logits(base_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(model), due, rtol=1e-4, atol=1e-4)
    hold_read(tmp_path / "a", model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fine_tune_type": "dora"}, ["'dora'"]),
        ({"lora_parameters": {"rank": 2, "alpha": 3}}, ["rank 2", "scale"]),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, ["rank 2", "3"]),
    ],
)
def test_configs_of_mlx_that_contradict_are_refused(change, named, tmp_path: Path) -> None:
    path = li.write_adapter(state_of(SITES["linear"]), tmp_path / "a", "mlx")
    with refused(li.FormatError, *named):
        li.read_adapter(edit_config(path, **change))


# What they would miss or misread ------------------------------------------------------------------

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 1}
CONFIG |= {"num_key_value_heads": 1, "hidden_size": 5, "head_dim": 4, "tie_word_embeddings": True}


def at(part: str) -> li.AdapterState:
    return state_of(*(linear(f"model.layers.{n}.{part}") for n in (0, 1)))


OUT, Q = at("self_attn.o_proj"), at("self_attn.q_proj")
EMBEDDING = state_of(SITES["embedding"].at("model.embed_tokens"))
HEAD, CONV = state_of(linear("lm_head")), state_of(SITES["conv"])
REFUSED: dict[str, tuple[str, li.AdapterState, Any, str]] = {
    "no config": ("gguf", OUT, None, "--base"),
    "another family": ("gguf", OUT, {"model_type": "gpt2"}, "'gpt2'"),
    "other heads": ("gguf", Q, CONFIG, "7 rows"),
    "no name": ("gguf", at("mlp.fc"), CONFIG, "mlp.fc"),
    "a convolution": ("gguf", CONV, CONFIG, "'conv'"),
    "a tied embedding": ("gguf mlx", EMBEDDING, CONFIG, "'model.embed_tokens'"),
    "an embedding, untold": ("mlx", EMBEDDING, None, "--base"),
    "a tied head": ("gguf mlx", HEAD, CONFIG, "'lm_head'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_they_would_miss_or_misread_is_refused(case: str, tmp_path: Path) -> None:
    layouts, state, config, named = REFUSED[case]
    for layout in layouts.split():
        with refused(li.FormatError, named):
            li.write_adapter(state, tmp_path / "a.gguf", layout, config=config)
    assert not list(tmp_path.iterdir())


def test_what_mlx_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    """An adapter of an embedding that it ties to the head is one of the head as well."""
    untied = {**CONFIG, "tie_word_embeddings": False}
    path = li.write_adapter(EMBEDDING, tmp_path / "a", "mlx", config=untied)
    assert list(li.read_adapter(path, config=untied).sites) == ["model.embed_tokens"]
    with refused(li.FormatError, "'model.embed_tokens'"):
        li.read_adapter(path, config=CONFIG)
    file = path / "adapters.safetensors"
    save_file({**load_file(file), "moe.lora_a": torch.ones(2, 2, 2)}, file)
    with refused(li.FormatError, "'moe.lora_a'", "(2, 2, 2)"):
        li.read_adapter(path)

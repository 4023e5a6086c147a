"""mlx-lm's, torchtune's, litgpt's and llama.cpp's files of decoders.

They are held to what mlx-lm computes, and to the formulas of the other programs' own layers.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from helpers.adapter_states import KIND_SPECS, edit_config, effect, make_state
from helpers.reference import IDS, adapted, llama, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li
from lora_inject.checkpoint import Checkpoint, merge_checkpoint, read_weighted
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import gguf_file, read_adapter, write_adapter

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
FILES = {"torchtune": "adapter_model.pt", "litgpt": "lit_model.pth.lora"}


def base_model() -> Any:
    return llama(**SIZES).float()


def held(layout: str, tmp_path: Path, *targets: Any) -> tuple[Any, AdapterState, dict[str, Tensor]]:
    """An adapted model, its adapter, and the tensors of its file."""
    model = adapted(base_model(), *targets)
    path = li.save_adapter(model, tmp_path / "a", format=layout)
    tensors = torch.load(path / FILES[layout], weights_only=True)
    return model, li.adapter_state(model), tensors.get("model", tensors)


def content(path: Path) -> tuple[float, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    return alpha, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def hold_read(path: Path, model: Any, pickled: bool = False) -> None:
    """Hold what is read of a file to the model, and that a pickle is not read unasked."""
    if pickled:
        with pytest.raises(FormatError, match=r"is a pickle\. Pass allow_pickle=True"):
            li.load_adapter(base_model(), path)
    back = li.load_adapter(base_model(), path, **({"allow_pickle": True} if pickled else {}))
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-4)


def hf_to_tune(delta: Tensor, n_heads: int) -> Tensor:
    """`hf_to_tune._permute` of torchtune/models/convert_weights.py, of the dense delta."""
    head_dim, dim = len(delta) // n_heads, delta.shape[1]
    turned = delta.view(n_heads, 2, head_dim // 2, dim).transpose(1, 2)
    return turned.reshape(head_dim * n_heads, dim)


def test_torchtune_adds_to_its_weights_what_we_add_to_ours(tmp_path: Path) -> None:
    targets = [{"match": "q_proj", "rank": 3}, "k_proj", {"match": "mlp.*", "alpha": 9}, "lm_head"]
    model, state, tensors = held("torchtune", tmp_path, *targets)
    assert '"target_modules": [' in (tmp_path / "a/adapter_config.json").read_text()
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "lm_head": "output"}
    for name, site in state.sites.items():
        end = name.rpartition(".")[2]
        key = name.removeprefix("model.").replace("self_attn", "attn").removesuffix(end)
        key += names.get(end, end)
        a, b = tensors.pop(f"{key}.lora_a.weight"), tensors.pop(f"{key}.lora_b.weight")
        due = effect(site).float()
        heads = {"q_proj": 4, "k_proj": 2}.get(end)
        due = hf_to_tune(due, heads) if heads else due
        torch.testing.assert_close(b @ a, due, rtol=1e-5, atol=1e-5)  # folded: alpha is the rank
    assert not tensors
    hold_read(tmp_path / "a", model, pickled=True)


def litgpt_delta(
    a: Tensor, b: Tensor, widths: dict[str, int], on: list[str], scale: float
) -> Tensor:
    """`LoRAQKVLinear.get_lora_AB` of litgpt/lora.py with grouped queries, and its `zero_pad`."""
    parts = zip(on, b.split([widths[part] for part in on]), a.chunk(len(on)), strict=True)
    updates = {part: scale * up @ down for part, up, down in parts}
    zeros = {part: a.new_zeros(width, a.shape[1]) for part, width in widths.items()}
    return torch.cat([*(zeros | updates).values()])


def test_litgpt_adds_to_its_fused_weight_what_we_add_to_ours(tmp_path: Path) -> None:
    model, state, tensors = held("litgpt", tmp_path, "q_proj", "v_proj", "o_proj", "lm_head")
    said = yaml.safe_load((tmp_path / "a/hyperparameters.yaml").read_text())
    assert (said["lora_query"], said["lora_key"], said["lora_projection"]) == (True, False, True)
    scale = said["lora_alpha"] / said["lora_r"]
    widths = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    for layer in range(2):
        key = f"transformer.h.{layer}.attn.qkv"
        a, b = tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"]
        due = [
            effect(state.sites[name]).float()
            if (name := f"model.layers.{layer}.self_attn.{part}") in state.sites
            else torch.zeros(width, 16)
            for part, width in widths.items()
        ]
        update = litgpt_delta(a, b, widths, ["q_proj", "v_proj"], scale)
        torch.testing.assert_close(update, torch.cat(due), rtol=1e-5, atol=1e-5)
    hold_read(tmp_path / "a", model, pickled=True)


@pytest.mark.parametrize("model_type", gguf_file.FAMILIES)
def test_names_are_those_of_llama_cpp(model_type: str) -> None:
    architecture, decoder = gguf_file.FAMILIES[model_type]
    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(archs[architecture], 3)
    for mine in decoder.names:
        full = mine if mine in ("model.embed_tokens", "lm_head") else f"model.layers.2.{mine}"
        due = names.get_name(f"{full}.weight", try_suffixes=(".weight",))
        assert due in {f"{decoder.theirs(full)}.weight", None}, full
        assert due is not None or (mine, model_type[:5]) == ("lm_head", "gemma")


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
    for name, site in li.adapter_state(model).sites.items():
        key = gguf_file.FAMILIES["llama"][1].theirs(name) + ".weight"
        a, b = tensors.pop(f"{key}.lora_a"), tensors.pop(f"{key}.lora_b")
        a = a.T if name == "model.embed_tokens" else a  # as its loader wants it
        due = effect(site).float()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        due = permuted(due, heads) if heads else due
        torch.testing.assert_close(alpha / b.shape[1] * b @ a, due, rtol=1e-5, atol=1e-5)
    assert not tensors
    hold_read(path, model)
    read = read_adapter(path, config=model.config.to_dict()).sites
    assert read["model.embed_tokens"].spec.kind == "embedding"  # as PEFT's files have to say


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
    mx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base_model().save_pretrained(tmp_path / "base")
    model = adapted(base_model(), *targets)
    li.save_adapter(model, tmp_path / "a", format="mlx")
    theirs = load_adapters(load_model(tmp_path / "base")[0], str(tmp_path / "a"))
    theirs.eval()
    due = torch.tensor(theirs(mx.array(IDS.numpy())).tolist())
    assert (due - logits(base_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(model), due, rtol=1e-4, atol=1e-4)
    hold_read(tmp_path / "a", model)


CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 1}
CONFIG |= {"num_key_value_heads": 1, "hidden_size": 5, "head_dim": 4, "tie_word_embeddings": True}


def at(*parts: str) -> AdapterState:
    names = [f"model.layers.{n}.{part}" for part in parts for n in (0, 1)]
    return make_state(*(KIND_SPECS["linear"].at(name, f"{name}.weight") for name in names))


EMBEDDING = make_state(
    KIND_SPECS["embedding"].at("model.embed_tokens", "model.embed_tokens.weight")
)
HEAD = make_state(KIND_SPECS["linear"].at("lm_head", "lm_head.weight"))


REFUSED: list[tuple[str, AdapterState, Any, str]] = [
    ("torchtune litgpt gguf", at("self_attn.o_proj"), None, r"base's config is not given.*--base"),
    ("torchtune litgpt gguf", at("self_attn.o_proj"), {"model_type": "gpt2"}, "type is 'gpt2'"),
    ("torchtune litgpt gguf", at("self_attn.q_proj"), CONFIG, "has 7 rows, and the base"),
    ("torchtune litgpt gguf", at("mlp.fc"), CONFIG, "adapts gate, up|no name for this module"),
    ("torchtune litgpt", at("self_attn.o_proj"), {**CONFIG, "num_hidden_layers": 3}, "'model.l.*2"),
    ("torchtune litgpt", at("mlp.up_proj"), CONFIG, "adapts gate, up and down of an MLP together"),
    ("torchtune litgpt gguf", make_state(KIND_SPECS["conv"]), CONFIG, "a site of kind 'conv'"),
    ("torchtune litgpt", EMBEDDING, CONFIG, "cannot hold a site of kind 'embedding'"),
    ("gguf mlx", EMBEDDING, CONFIG, "as one tensor"),
    ("mlx", EMBEDDING, None, r"base's config is not given.*--base"),
    ("gguf mlx torchtune", HEAD, CONFIG, "as one tensor"),
]


@pytest.mark.parametrize(
    ("layout", "state", "config", "words"),
    [(layout, *row) for layouts, *row in REFUSED for layout in layouts.split()],
)
def test_what_they_would_miss_or_misread_is_refused(layout, state, config, words, tmp_path) -> None:
    with pytest.raises(FormatError, match=words):
        write_adapter(state, tmp_path / "a.gguf", layout, config=config)
    assert not list(tmp_path.iterdir())


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    held("litgpt", tmp_path, "q_proj", "v_proj")
    config = base_model().config.to_dict()
    file = tmp_path / "a/hyperparameters.yaml"
    said = yaml.safe_load(file.read_text())
    for edit, words in [
        ({"lora_query": False}, "A has 4 rows and B 24, which are not"),
        ({"lora_r": 3}, "its rank is 2, hyperparameters.yaml says 3"),
    ]:
        file.write_text(yaml.safe_dump(said | edit))
        with pytest.raises(FormatError, match=words):
            read_adapter(tmp_path / "a", config=config, allow_pickle=True)


def test_torchtunes_alpha_is_asked_for_where_no_config_says_it(tmp_path: Path) -> None:
    _, state, _ = held("torchtune", tmp_path, "o_proj")
    (tmp_path / "a/adapter_config.json").unlink()
    options = {"config": base_model().config.to_dict(), "allow_pickle": True}
    with pytest.raises(FormatError, match="Pass alpha="):
        read_adapter(tmp_path / "a", **options)
    for name, site in read_adapter(tmp_path / "a", alpha=3.0, **options).sites.items():
        torch.testing.assert_close(effect(site), effect(state.sites[name]))


def test_a_folder_merges_on_disk_as_it_does_in_memory(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model = adapted(base_model(), "q_proj", "o_proj")
    path = li.save_adapter(model, tmp_path / "a", format="litgpt")
    base = Checkpoint.open(tmp_path / "base")
    merge_checkpoint(base, [read_weighted(path, base, allow_pickle=True)], tmp_path / "out")
    li.merge(model, eject=True)
    due = model.state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, due[name], rtol=1e-5, atol=1e-5)


def test_scales_are_folded_into_tensors_of_16_bits_with_one_rounding(tmp_path: Path) -> None:
    parts = {"mlp.up_proj": 4.0, "mlp.gate_proj": 3.0}
    fc = KIND_SPECS["linear"]
    specs = [replace(fc, name=f"model.layers.0.{p}", alpha=alpha) for p, alpha in parts.items()]
    state = li.as_dtype(make_state(*specs), torch.bfloat16)
    path = write_adapter(state, tmp_path / "a.gguf", "gguf", config={"model_type": "qwen2"})
    for name, site in read_adapter(path).sites.items():
        torch.testing.assert_close(effect(site), effect(state.sites[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("word", "other", "words"),
    [("adapter", "dataset", "not a model"), ("llama", "mamba", "architecture is 'mamba'")],
)
def test_models_and_other_families_are_refused(word, other, words, tmp_path) -> None:
    path = write_adapter(at("self_attn.o_proj"), tmp_path / "a.gguf", "gguf", config=CONFIG)
    length = len(word).to_bytes(8, "little")  # stands before each text of the file
    data = path.read_bytes().replace(length + word.encode(), length + other.encode())
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        read_adapter(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"lora_parameters": {"rank": 2, "alpha": 3}}, "gives rank 2 and scale None"),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, "rank 2, adapter_config.json says 3"),
    ],
)
def test_configs_of_mlx_that_contradict_are_refused(change, words, tmp_path) -> None:
    path = write_adapter(make_state(KIND_SPECS["linear"]), tmp_path / "a", "mlx")
    with pytest.raises(FormatError, match=words):
        read_adapter(edit_config(path, **change))


def test_what_mlx_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    """An adapter of an embedding that it ties to the head is one of the head as well."""
    untied = {**CONFIG, "tie_word_embeddings": False}
    path = write_adapter(EMBEDDING, tmp_path / "a", "mlx", config=untied)
    assert list(read_adapter(path, config=untied).sites) == ["model.embed_tokens"]
    with pytest.raises(FormatError, match="as one tensor"):
        read_adapter(path, config=CONFIG)
    file = path / "adapters.safetensors"
    save_file({**load_file(file), "moe.lora_a": torch.ones(2, 2, 2)}, file)
    with pytest.raises(FormatError, match=r"'moe.lora_a' of shape \(2, 2, 2\)"):
        read_adapter(path)

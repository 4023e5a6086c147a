"""torchtune's and litgpt's folders, against what their own layers compute with the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.adapter_states import KIND_SPECS, dense, effect, make_state
from helpers.reference import adapted, llama
from safetensors.torch import load_file
from torch import Tensor

import lora_inject as li
from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.checkpoint import Checkpoint, merge_checkpoint, read_weighted
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter
from lora_inject.spec.sites import SiteSpec, Slices

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.tensor([[1, 2, 3]])


def held(layout: str, tmp_path: Path, *targets: Any) -> tuple[Any, AdapterState, dict[str, Tensor]]:
    model = adapted(llama(**SIZES).float(), *targets)
    li.save_adapter(model, tmp_path / "a", format=layout)
    file = {"torchtune": "adapter_model.pt", "litgpt": "lit_model.pth.lora"}[layout]
    found = torch.load(tmp_path / "a" / file, weights_only=True)
    return model, li.adapter_state(model), found.get("model", found)


def hf_to_tune(delta: Tensor, n_heads: int) -> Tensor:
    """`hf_to_tune._permute` of torchtune/models/convert_weights.py, of the dense delta."""
    head_dim, dim = len(delta) // n_heads, delta.shape[1]
    turned = delta.view(n_heads, 2, head_dim // 2, dim).transpose(1, 2)
    return turned.reshape(head_dim * n_heads, dim)


def test_torchtune_adds_to_its_weights_what_we_add_to_ours(tmp_path: Path) -> None:
    targets = [{"match": "q_proj", "rank": 3}, "k_proj", {"match": "mlp.*", "alpha": 9}, "lm_head"]
    model, state, tensors = held("torchtune", tmp_path, *targets)
    said = (tmp_path / "a/adapter_config.json").read_text()
    assert '"target_modules": [' in said
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
    back = li.load_adapter(llama(**SIZES).float(), tmp_path / "a", allow_pickle=True)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def litgpt_delta(
    a: Tensor, b: Tensor, widths: dict[str, int], on: list[str], scale: float
) -> Tensor:
    """`LoRAQKVLinear.get_lora_AB` of litgpt/lora.py with grouped queries, and its `zero_pad`."""
    pieces = dict(
        zip(on, zip(a.chunk(len(on)), b.split([widths[p] for p in on]), strict=True), strict=True)
    )
    rows = [
        pieces[part][1] @ pieces[part][0] if part in pieces else a.new_zeros(width, a.shape[1])
        for part, width in widths.items()
    ]
    return scale * torch.cat(rows)


def test_litgpt_adds_to_its_fused_weight_what_we_add_to_ours(tmp_path: Path) -> None:
    model, state, tensors = held("litgpt", tmp_path, "q_proj", "v_proj", "o_proj", "lm_head")
    said = yaml.safe_load((tmp_path / "a/hyperparameters.yaml").read_text())
    assert (said["lora_query"], said["lora_key"], said["lora_projection"]) == (True, False, True)
    scale = said["lora_alpha"] / said["lora_r"]
    widths = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    for layer in range(2):
        key = f"transformer.h.{layer}.attn.qkv"
        a, b = tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"]
        found = litgpt_delta(a, b, widths, ["q_proj", "v_proj"], scale)
        due = [
            effect(state.sites[name])
            if (name := f"model.layers.{layer}.self_attn.{part}") in state.sites
            else torch.zeros(width, 16)
            for part, width in widths.items()
        ]
        torch.testing.assert_close(found, torch.cat(due).float(), rtol=1e-5, atol=1e-5)
        slices = Slices(tuple(widths.items()), ("q_proj", "v_proj"))
        spec = SiteSpec("qkv", "linear", 16, 32, (32, 16), 2, 2 * scale, slices=slices)
        torch.testing.assert_close(dense(SiteState(spec, a, b)).float(), found)  # one of our sites
    back = li.load_adapter(llama(**SIZES).float(), tmp_path / "a", allow_pickle=True)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 1}
CONFIG |= {"num_key_value_heads": 1, "hidden_size": 5, "head_dim": 4}


def at(*parts: str) -> AdapterState:
    names = [f"model.layers.{n}.{part}" for part in parts for n in (0, 1)]
    return make_state(*(KIND_SPECS["linear"].at(name, f"{name}.weight") for name in names))


@pytest.mark.parametrize("layout", ["torchtune", "litgpt"])
@pytest.mark.parametrize(
    ("state", "config", "words"),
    [
        (at("self_attn.o_proj"), None, r"depends on the base.*--base"),
        (at("self_attn.o_proj"), {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        (at("self_attn.o_proj"), {**CONFIG, "num_hidden_layers": 3}, "'model.layers.2.self_attn.o"),
        (at("mlp.up_proj"), CONFIG, "adapts gate, up and down of an MLP together"),
        (at("mlp.fc"), CONFIG, "adapts gate, up and down|no name for this module"),
        (at("self_attn.q_proj"), CONFIG, "B has 7 rows, and the base"),
        (make_state(KIND_SPECS["embedding"]), CONFIG, "cannot hold a site of kind 'embedding'"),
    ],
)
def test_what_they_would_miss_is_refused(
    state: AdapterState, config: Any, words: str, layout: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=words):
        write_adapter(state, tmp_path / "a", layout, config=config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["torchtune", "litgpt"])
def test_pickles_are_read_where_they_are_trusted(layout: str, tmp_path: Path) -> None:
    held(layout, tmp_path, "o_proj")
    config = llama(**SIZES).config.to_dict()
    with pytest.raises(FormatError, match=r"is a pickle\. Pass allow_pickle=True"):
        read_adapter(tmp_path / "a", config=config)
    assert len(read_adapter(tmp_path / "a", config=config, allow_pickle=True).sites) == 2


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    held("litgpt", tmp_path, "q_proj", "v_proj")
    config = llama(**SIZES).config.to_dict()
    file = tmp_path / "a/hyperparameters.yaml"
    said = yaml.safe_load(file.read_text())
    for change, words in [
        ({"lora_query": False}, "A has 4 rows and B 24, which are not those of"),
        ({"lora_r": 3}, "its rank is 2, hyperparameters.yaml says 3"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ]:
        file.write_text(yaml.safe_dump({**said, **change}))
        with pytest.raises(FormatError, match=words):
            read_adapter(tmp_path / "a", config=config, allow_pickle=True)
    file.write_text("a: [")
    with pytest.raises(FormatError, match="not valid YAML"):
        read_adapter(tmp_path / "a", config=config, allow_pickle=True)


def test_torchtunes_alpha_is_asked_for_where_no_config_says_it(tmp_path: Path) -> None:
    _, state, _ = held("torchtune", tmp_path, "o_proj")
    (tmp_path / "a/adapter_config.json").unlink()
    options = {"config": llama(**SIZES).config.to_dict(), "allow_pickle": True}
    with pytest.raises(FormatError, match="Pass alpha="):
        read_adapter(tmp_path / "a", **options)
    found = read_adapter(tmp_path / "a", alpha=3.0, **options)
    name = "model.layers.0.self_attn.o_proj"
    torch.testing.assert_close(effect(found.sites[name]), effect(state.sites[name]))


@pytest.mark.parametrize("layout", ["mlx", "torchtune", "litgpt"])
def test_a_folder_merges_on_disk_as_it_does_in_memory(layout: str, tmp_path: Path) -> None:
    llama(**SIZES).float().save_pretrained(tmp_path / "base")
    model = adapted(
        llama(**SIZES).float(), "q_proj", "o_proj", *["embed_tokens"] * (layout == "mlx")
    )
    li.save_adapter(model, tmp_path / "a", format=layout)
    base = Checkpoint.open(tmp_path / "base")
    allowed = {} if layout == "mlx" else {"allow_pickle": True}
    merge_checkpoint(base, [read_weighted(tmp_path / "a", base, **allowed)], tmp_path / "out")
    li.merge(model, eject=True)
    due, found = model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, due[name], rtol=1e-5, atol=1e-5)

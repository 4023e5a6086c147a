"""Experts that share a factor, for SGLang and vLLM: stacks `experts.w1`, `w2` and `w3`."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.adapter_states import effect
from helpers.experts import experts, moe
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li
from lora_inject.errors import FormatError

IDS = torch.tensor([[1, 2, 3]])
PREFIX = "base_model.model."
pytestmark = needs_transformers_5
GATE_UP = {"match": r"experts\.gate_up_proj", "rank": 2, "alpha": 3, "share": "A"}
OWN = {"match": GATE_UP["match"]}
DOWN = {"match": r"experts\.down_proj", "rank": 3, "share": "B"}


def adapted(targets: Any = (GATE_UP, DOWN, "q_proj", "v_proj")) -> Any:
    return fill(li.inject(moe(), {"rank": 3, "targets": [*targets]}))


def written(model: Any, folder: Path, to: str = "sglang") -> Path:
    moe().save_pretrained(folder / "base")
    return li.convert(li.adapter_state(model), folder / "a", to, base=folder / "base")


def as_sglang_loads_it(tensors: dict[str, Tensor], scaling: float, n_experts: int) -> Any:
    """Each expert's update of a block, by the steps of SGLang's loader.

    `_rename_expert_w_to_proj`, `normalize_gate_up_proj` (A and B one after the other along the
    rank, and along the outputs), `load_lora_weight_to_buffer` with `experts_shared_outer_loras`:
    the first slice of gate_up's A and of down's B.
    """
    called = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    weights = {
        re.sub(r"\.(w[123])\.", lambda m: f".{called[m[1]]}.", key): tensor
        for key, tensor in tensors.items()
    }
    parts = {
        key.split("experts.")[1]: tensor for key, tensor in weights.items() if "experts" in key
    }
    a = torch.cat([parts["gate_proj.lora_A.weight"], parts["up_proj.lora_A.weight"]], 1)
    b = torch.cat([parts["gate_proj.lora_B.weight"], parts["up_proj.lora_B.weight"]], 1)
    assert (a.dim(), len(a), len(b)) == (3, 1, n_experts)
    rank, width = b.shape[2], b.shape[1] // 2
    down_a, down_b = parts["down_proj.lora_A.weight"], parts["down_proj.lora_B.weight"]
    for expert in range(n_experts):
        gate = b[expert, :width] * scaling @ a[0, :rank]
        up = b[expert, width:] * scaling @ a[0, rank:]
        yield torch.cat([gate, up]), down_b[0] * scaling @ down_a[expert]


def as_vllm_loads_it(tensors: dict[str, Tensor], scaling: float, n_experts: int) -> Any:
    """The same by `pack_moe_stacked` and `FusedMoEWithLoRA.set_lora`."""
    tensors_read = {
        key.split("experts.")[1]: tensor for key, tensor in tensors.items() if "experts" in key
    }
    a = [tensors_read[f"w{n}.lora_A.weight"] for n in (1, 2, 3)]
    b = [tensors_read[f"w{n}.lora_B.weight"] * scaling for n in (1, 2, 3)]
    buffers = {"w13 A": 1, "w13 B": n_experts, "w2 A": n_experts, "w2 B": 1}
    assert [len(a[0]), len(a[2])] == [buffers["w13 A"]] * 2
    assert [len(b[0]), len(b[2])] == [buffers["w13 B"]] * 2
    assert [len(a[1]), len(b[1])] == [buffers["w2 A"], buffers["w2 B"]]
    w1, w2, w3 = (up @ down for up, down in zip(b, a, strict=True))
    for expert in range(n_experts):
        yield torch.cat([w1[expert], w3[expert]]), w2[expert]


@pytest.mark.parametrize("loads", [as_sglang_loads_it, as_vllm_loads_it])
def test_servers_compute_what_the_model_does(loads: Any, tmp_path: Path) -> None:
    model = adapted()
    path = written(model, tmp_path)
    tensors = load_file(path / "adapter_model.safetensors")
    block = f"{PREFIX}model.layers.0.mlp.experts"
    shapes = {key.removeprefix(block): t.shape for key, t in tensors.items() if block in key}
    assert shapes == {
        ".w1.lora_A.weight": (1, 3, 8),
        ".w1.lora_B.weight": (3, 8, 3),
        ".w2.lora_A.weight": (3, 3, 8),
        ".w2.lora_B.weight": (1, 8, 3),
        ".w3.lora_A.weight": (1, 3, 8),
        ".w3.lora_B.weight": (3, 8, 3),
    }
    sites = li.adapter_state(model).whole.sites
    gate_up = effect(sites["model.layers.0.mlp.experts.gate_up_proj"]).float()
    down = effect(sites["model.layers.0.mlp.experts.down_proj"]).float()
    for expert, (of_gate_up, of_down) in enumerate(loads(tensors, 1.0, 3)):
        torch.testing.assert_close(of_gate_up, gate_up[expert], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_down, down[expert], rtol=1e-5, atol=1e-5)
    config = li.read_adapter(path)
    assert config.fingerprint is None


def test_it_is_read_back_as_the_same_adapter(tmp_path: Path) -> None:
    model = adapted()
    back = li.load_adapter(moe(), written(model, tmp_path))
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_names_of_mixtral_are_those_of_its_files(tmp_path: Path) -> None:
    model, _ = experts("mixtral")
    model.save_pretrained(tmp_path / "base")
    fill(li.inject(model, {"rank": 2, "targets": [GATE_UP, DOWN]}))
    state = li.adapter_state(model)
    path = li.convert(state, tmp_path / "a", "sglang", base=tmp_path / "base")
    names = load_file(path / "adapter_model.safetensors")
    assert f"{PREFIX}model.layers.0.block_sparse_moe.experts.w1.lora_A.weight" in names
    again = li.convert(path, tmp_path / "b", "sglang", base=tmp_path / "base")
    other = load_file(again / "adapter_model.safetensors")
    assert {k: t.tolist() for k, t in names.items()} == {k: t.tolist() for k, t in other.items()}


def test_check_names_the_option_that_the_server_needs(tmp_path: Path) -> None:
    path = written(adapted(), tmp_path)
    for client, option in {
        "sglang": "--experts-shared-outer-loras",
        "vllm": "--enable-moe-shared-loras",
    }.items():
        (finding,) = li.check_adapter(path, client, base=tmp_path / "base")
        assert (finding.stops, finding.fix) == (False, f"Start it with {option}")
    for client in ("lorax", "peft", "llama.cpp", "diffusers"):
        assert li.check_adapter(path, client, base=tmp_path / "base")[0].stops


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([OWN, DOWN], r"w1'.*its own A, and the layout has one.*vllm"),
        ([GATE_UP, {"match": DOWN["match"]}], r"w2'.*its own B.*share: B on down"),
        ([GATE_UP | {"share": "B"}, DOWN], "its own A"),
        ([GATE_UP], "Adapt all stacks of the block"),
    ],
)
def test_other_experts_are_refused(targets: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=words):
        written(adapted(targets), tmp_path)
    assert not (tmp_path / "a").exists()


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = written(adapted(), tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"{PREFIX}model.layers.0.mlp.experts.w1.lora_B.weight"
    save_file({**tensors, key: tensors[key][:2].clone()}, file)
    with pytest.raises(FormatError, match="its stacks are of 2, 3 experts"):
        li.read_adapter(path)
    save_file({**tensors, key: tensors[key][0].clone()}, file)
    with pytest.raises(FormatError, match="it has 2 dimensions, and a stack has 3"):
        li.read_adapter(path)


def test_an_adapter_without_experts_is_the_portable_one(tmp_path: Path) -> None:
    model = adapted(["q_proj", "v_proj"])
    path = written(model, tmp_path)
    due = li.convert(li.adapter_state(model), tmp_path / "due", "portable")
    ours = load_file(path / "adapter_model.safetensors")
    assert {k: t.tolist() for k, t in ours.items()} == {
        k: t.tolist() for k, t in load_file(due / "adapter_model.safetensors").items()
    }

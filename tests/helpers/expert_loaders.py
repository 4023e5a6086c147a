"""How servers read an adapter of experts, step by step, as far as the weights that they add.

Source for vLLM: https://github.com/vllm-project/vllm, in `vllm/lora/`, each at the commit that was
read: `lora_model.py` (0306474e9d1f: `from_local_checkpoint`), `utils.py`
(`parse_fine_tuned_lora_name`, `process_packed_modules_mapping`), `model_manager.py` (01533aa8f9c0:
`_create_merged_loras_inplace`, `_stack_moe_lora_weights`), `lora_weights.py` (055e47c28003:
`pack_moe`, `optimize`), `layers/fused_moe.py` (0002540ca51c: the buffers and both `set_lora`). Its
kernels multiply with A and then with B of the buffers, for one expert after the other.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MAX_RANK = 16  # vLLM's default
Pairs = dict[str, dict[str, Tensor]]


def _read(folder: Path, expected: set[str]) -> tuple[Pairs, dict[str, Any]]:
    """Return A and B of each module, and the config, as `from_local_checkpoint` does.

    A module of experts is looked up by all that follows from `experts` on, and what `base_layer`
    is part of passes unseen.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("rank_pattern")  # which later versions read, and this does not
    assert not config.get("alpha_pattern")
    assert config["r"] <= MAX_RANK
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    pairs: Pairs = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        *module, role, weight = key.removeprefix("base_model.model.").split(".")
        assert (role in {"lora_A", "lora_B"}, weight) == (True, "weight")
        name = ".".join(module)
        if "base_layer" not in key:
            found = name[name.find(".experts") + 1 :] if ".experts" in name else module[-1]
            assert found in expected, f"{name} is unexpected"
        pairs.setdefault(name, {})[role] = tensor
    return pairs, config


def _put(buffer: Tensor, values: Tensor) -> None:
    """Copy into a corner of a buffer, which the values may not exceed."""
    buffer[:, : values.shape[1], : values.shape[2]].copy_(values)


def _added(n: int, n_in: int, n_out: int, A: Tensor, B: Tensor) -> Tensor:
    """Return what is added to the matrices of n experts, of which each is (n_out, n_in)."""
    buffers = torch.zeros(n, MAX_RANK, n_in), torch.zeros(n, n_out, MAX_RANK)
    for buffer, values in zip(buffers, (A, B), strict=True):
        assert len(values) == n
        _put(buffer, values)
    return buffers[1] @ buffers[0]


def of_single_experts(
    folder: Path, block: str, names: tuple[str, str, str], n: int, hidden: int, inner: int
) -> tuple[Tensor, Tensor]:
    """Return the updates of w13 `(n, 2 inner, hidden)` and of w2 `(n, hidden, inner)`.

    Args:
        folder: The adapter.
        block: The module of the experts.
        names: What the base's files call gate, down and up, as the model's `get_expert_mapping`.
        n: How many experts there are.
        hidden: The width of their inputs.
        inner: The width between their layers.
    """
    expected = [f"experts.{expert}.{name}" for expert in range(n) for name in names]
    pairs, config = _read(folder, set(expected))
    parent = block.rpartition(".")[0]
    of = [pairs.pop(f"{parent}.{name}") for name in expected]  # one that is missing is an assertion
    assert not pairs
    scale = config["lora_alpha"] / config["r"]  # of rank-stabilized LoRA, too
    w1, w2, w3 = (
        (torch.stack([p["lora_A"] for p in of[k::3]]), torch.stack([p["lora_B"] for p in of[k::3]]))
        for k in range(3)
    )
    gate, up = (_added(n, hidden, inner, A, B * scale) for A, B in (w1, w3))
    return torch.cat([gate, up], dim=1), _added(n, inner, hidden, w2[0], w2[1] * scale)


def of_stacks(folder: Path, block: str, n: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    """Return the same for a model whose files hold stacks (`is_3d_moe_weight`).

    Its first stack is `base_layer`, whatever its name is.
    """
    pairs, config = _read(folder, {"experts"})
    root = config["r"] if not config.get("use_rslora") else math.sqrt(config["r"])
    updates = []
    for module, n_in, n_out in (
        (f"{block}.base_layer", hidden, 2 * inner),
        (block, inner, hidden),
    ):
        pair = pairs.pop(module)
        A, B = pair["lora_A"], pair["lora_B"] * (config["lora_alpha"] / root)
        by_expert = B.reshape(len(B), -1, n).permute(2, 0, 1)
        updates.append(_added(n, n_in, n_out, A.reshape(n, -1, A.shape[-1]), by_expert))
    assert not pairs
    return updates[0], updates[1]


def as_sglang_loads_it(tensors: dict[str, Tensor], n_experts: int) -> list[Tensor]:
    """The experts' updates of a block, by the steps of SGLang's loader.

    `_rename_expert_w_to_proj`, `normalize_gate_up_proj` (A and B one after the other along the
    rank, and along the outputs), `load_lora_weight_to_buffer` with `experts_shared_outer_loras`:
    the first slice of gate_up's A and of down's B.
    """
    called = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    parts = {
        re.sub(r"^(w[123])", lambda m: called[m[1]], key.split("experts.")[1]): tensor
        for key, tensor in tensors.items()
        if "experts" in key
    }
    a = torch.cat([parts["gate_proj.lora_A.weight"], parts["up_proj.lora_A.weight"]], 1)
    b = torch.cat([parts["gate_proj.lora_B.weight"], parts["up_proj.lora_B.weight"]], 1)
    assert (a.dim(), len(a), len(b)) == (3, 1, n_experts)
    rank, width = b.shape[2], b.shape[1] // 2
    down_a, down_b = parts["down_proj.lora_A.weight"], parts["down_proj.lora_B.weight"]
    gate, up = b[:, :width] @ a[0, :rank], b[:, width:] @ a[0, rank:]
    return [torch.cat([gate, up], 1), down_b[0] @ down_a]


def as_vllm_loads_it(tensors: dict[str, Tensor], n_experts: int) -> list[Tensor]:
    """The same by `pack_moe_stacked` and `FusedMoEWithLoRA.set_lora`."""
    stacks = {key.split("experts.")[1]: t for key, t in tensors.items() if "experts" in key}
    a = [stacks[f"w{n}.lora_A.weight"] for n in (1, 2, 3)]
    b = [stacks[f"w{n}.lora_B.weight"] for n in (1, 2, 3)]
    assert [len(t) for t in a] == [1, n_experts, 1]
    assert [len(t) for t in b] == [n_experts, 1, n_experts]
    w1, w2, w3 = (up @ down for up, down in zip(b, a, strict=True))
    return [torch.cat([w1, w3], 1), w2]

"""A step of a mixture of experts: launches, bytes, and what waits for the backward, by adapter.

    python scripts/benchmarks/mixture_step.py [--tokens 4096]

One block of Qwen3-30B-A3B's sizes in bfloat16, experts in transformers' grouped products: 128
experts of 2048 to 768, 8 for each token. It is run on tensors without values, forward and backward,
so the numbers are exact and are the same on every machine. What waits for the backward are all
tensors that autograd keeps and that are no parameters, each memory once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launches import Counted
from benchmarks.models import quiet
from lora_inject import inject, plan

MIB = 2**20
NAMES = ("experts.gate_up_proj", "experts.down_proj")
EXPERTS = {"match": "all-experts"}
ACTIVE = EXPERTS | {"rank": {"active": 32}}
QUARTER = ACTIVE | {"only": list(range(0, 128, 4))}
# Row of the table: the rules of lora_inject, or the rank of PEFT's target_parameters.
ROWS: dict[str, list[dict[str, Any]] | int | None] = {
    "frozen": None,
    "all experts, rank 32": [EXPERTS],
    "all experts, rank {active: 32}, 4 each": [ACTIVE],
    "a quarter of them, rank 4": [QUARTER],
    "all, rank 4, share: A": [ACTIVE | {"share": "A"}],
    "PEFT, target_parameters, rank 32": 32,
    "PEFT, target_parameters, rank 4": 4,
}


class Largest(Counted):
    """Counts, and notes the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count it."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view:
            sizes = [_bytes(t) for t in tree_leaves(made) if isinstance(t, Tensor)]
            self.largest = max([self.largest, *sizes])
        return made


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def block() -> nn.Module:
    """Return the block, with the config that says how many experts a token meets."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=8)
    config._experts_implementation = "grouped_mm"
    return nn.ModuleDict({"mlp": Qwen3MoeSparseMoeBlock(config)}).bfloat16()


def adapted(row: list[dict[str, Any]] | int | None) -> tuple[nn.Module, int]:
    """Return a block with the adapter of a row, and the number of elements of A and B."""
    model = block().requires_grad_(False)
    if isinstance(row, list):
        config = {"rank": 32, "alpha": 32, "targets": row}
        count = plan(model, config).n_lora
        return inject(model, config)["mlp"], count  # type: ignore[index]
    if row is None:
        return model["mlp"], 0  # type: ignore[index]
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=row, lora_alpha=32, target_modules=[], target_parameters=list(NAMES))
    with quiet():
        peft: Any = get_peft_model(model["mlp"], config)  # type: ignore[index]
    return peft, sum(p.numel() for p in peft.parameters() if p.requires_grad)


def step(model: nn.Module, n_tokens: int) -> Mapping[str, float]:
    """Count one forward and backward."""
    x = torch.empty(1, n_tokens, 2048, dtype=torch.bfloat16, requires_grad=True)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), x)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counted = Largest()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counted:
        y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    waiting = sum(_bytes(t) for key, t in kept.items() if key not in own)
    kept.clear()
    g = torch.ones_like(y)
    with counted:
        y.backward(g)
    return {
        "launches": counted.total,
        "GiB moved": counted.moved / 2**30,
        "kept for backward, MiB": waiting / MIB,
        "largest tensor made, MiB": counted.largest / MIB,
        "waits for the device": len(counted.syncs),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    n_tokens = parser.parse_args().tokens
    print("| adapter | A and B | launches | GiB moved | kept, MiB | largest, MiB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, row in ROWS.items():
        # PEFT switches autocast off, which does not know this device and is off.
        with torch.device("meta"), patch("torch.autocast", lambda **_: nullcontext()):
            model, count = adapted(row)
            counts = step(model, n_tokens)
        launches, moved, kept, largest, waits = counts.values()
        cells = [f"{count:,}", f"{launches:,.0f}", f"{moved:.2f}", f"{kept:,.0f}"]
        note = f" (waits {waits:.0f} times)" if waits else ""
        print(f"| {name}{note} | {' | '.join(cells)} | {largest:,.0f} |")


if __name__ == "__main__":
    main()

"""Stacks of experts that share a factor, as servers load them: `experts.w1`, `w2` and `w3`.

The portable directory, but for the experts: w1 is gate, w3 up, w2 down, each with A `(experts,
rank, in)` and B `(experts, out, rank)`. The A of w1 and w3, and the B of w2, are one for all
experts: their first size is 1. SGLang reads it with `--experts-shared-outer-loras`, vLLM with
`--enable-moe-shared-loras`; Tinker exports it. PEFT does not know it.

Source: SGLang, 2026, srt/lora/lora.py (`_rename_expert_w_to_proj`, `normalize_gate_up_proj`),
srt/lora/mem_pool.py (`load_lora_weight_to_buffer`); vLLM 0.32, lora/lora_weights.py
(`pack_moe_stacked`), lora/layers/fused_moe.py (`set_lora`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import serialize
from lora_inject.core.spec.names import leaf
from lora_inject.errors import FormatError
from lora_inject.formats import peft, portable
from lora_inject.formats.format import Format
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.folder import CONFIG, MODEL, contents
from lora_inject.formats.peft.tensor_layout import PREFIX
from lora_inject.formats.single_experts import block_and_part

_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2"}
_SHARED = {"w1": "A", "w3": "A", "w2": "B"}
_Place = tuple[str, str]  # a block, and w1, w2 or w3
_Sites = dict[str, SiteState]


def write(
    state: AdapterState,
    _path: Path,
    facts: ModelFacts,
    *,
    dtype: str | None = None,
    rank: int | None = None,
) -> dict[str, bytes]:
    """Write an adapter whose experts share A of gate and up, and B of down.

    Options as for `portable`. `facts.separate` names a stack's matrices in the base's files;
    `li.convert(base=...)` gives it.

    Raises:
        FormatError: Experts have factors of their own where the layout has one for all.
    """
    plain = portable.plain_state(portable.single_experts(state, facts), dtype, rank)
    blocks, others = _by_block(plain)
    names = {leaf(name) for name in plain.sites.keys() - others.keys()}
    _, tensors, config, _ = contents(replace(plain, sites=others), portable.plain_facts(facts))
    for (block, part), experts in blocks.items():
        tensors |= _stacked(f"{block}.{part}", part, [experts[n] for n in sorted(experts)])
    config["target_modules"] = sorted({*(config["target_modules"] or ()), *names})
    if plain.sites:
        config["r"] = config["lora_alpha"] = next(iter(plain.sites.values())).spec.rank
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG: text.encode(), MODEL: serialize(tensors, {"format": "pt"})}


def _by_block(state: AdapterState) -> tuple[dict[_Place, dict[int, SiteState]], _Sites]:
    """Return the experts of each stack by their numbers, and the sites outside of blocks."""
    blocks: dict[_Place, dict[int, SiteState]] = defaultdict(dict)
    others: _Sites = {}
    for name, site in state.sites.items():
        place = block_and_part(name)
        if place is None:
            others[name] = site
            continue
        block, expert, part = place
        if part not in _PARTS:
            problem = f"servers know gate_proj, up_proj, down_proj (w1, w3, w2), and not {part!r}"
            raise FormatError(f"site '{name}'", problem, 'Write it with format="vllm"')
        blocks[block, _PARTS[part]][expert] = site
    return blocks, others


def _stacked(name: str, part: str, experts: list[SiteState]) -> dict[str, Tensor]:
    """Return A and B of a matrix of all experts, one of them once."""
    factors = {"A": [site.A for site in experts], "B": [site.B for site in experts]}
    shared = _SHARED[part]
    first, *rest = factors[shared]
    if not all(torch.equal(first, other) for other in rest):
        problem = f"each expert has its own {shared}, and the layout has one for all"
        remedy = "Train it with share: A on gate and up and share: B on down, or write a pair for "
        raise FormatError(f"experts '{name}'", problem, f'{remedy}each expert: format="vllm"')
    factors[shared] = [first]
    return {
        f"{PREFIX}{name}.lora_{role}.weight": torch.stack([*each]) for role, each in factors.items()
    }


FORMATS = {
    "sglang": Format(write, peft.read, portable.detects, frozenset(), check_save=peft.check_save),
}

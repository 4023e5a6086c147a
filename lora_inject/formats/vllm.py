"""A portable PEFT folder whose stacked experts are single matrices, as vLLM wants most models'.

vLLM names experts as the base's files do (`experts.0.gate_proj`) and reads A and B of each. It
reads PEFT's stacks correctly only for models whose files hold stacks (`is_3d_moe_weight`); for
other models it reads every second row of `gate_up_proj` as the gate. `format="peft"` writes stacks.

Source: vLLM 0.33, lora/model_manager.py (`_create_merged_loras_inplace`,
`_stack_moe_lora_weights`), lora/utils.py (`process_packed_modules_mapping`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_inject.adapter.reshape import renamed, split, split_experts
from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import portable
from lora_inject.formats.model_facts import ModelFacts


def write(
    state: AdapterState,
    path: Path,
    facts: ModelFacts,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
) -> Path:
    """Write a portable PEFT folder with a pair for each expert; options as for `portable.write`.

    `facts.separate` names a stack's matrices in the base's files; `li.convert(base=...)` gives it.
    """
    asked = f"write vLLM adapter to '{path}'"
    sites: dict[str, SiteState] = {}
    for name, site in state.sites.items():
        stacked = site.spec.experts is not None
        sites |= _matrices(site, facts, f"{asked}, site '{name}'") if stacked else {name: site}
    return portable.write(
        replace(state, sites=sites),
        path,
        replace(facts, expert_names=()),
        overwrite=overwrite,
        dtype=dtype,
        rank=rank,
    )


def _matrices(site: SiteState, facts: ModelFacts, where: str) -> Iterator[tuple[str, SiteState]]:
    """Yield sites on single experts' matrices with their names in the base's files."""
    if facts.separate is None:
        found = "the names of single experts depend on the base's files"
        raise FormatError(where, found, "Name the base: --base BASE, li.convert(base=...)")
    names, n_experts = facts.separate(site.spec.name), site.spec.experts
    if len(names) != n_experts:
        found = f"the base's files hold {len(names)} of its {n_experts} experts separately"
        raise FormatError(where, found, 'Write stacks as they are: format="peft"')
    for expert, parts in zip(split_experts(site).values(), names, strict=True):
        width, stray = divmod(expert.spec.out_features, len(parts))
        if stray:
            found = f"{expert.spec.out_features} rows are not those of {len(parts)} matrices"
            raise FormatError(where, found, "Name the adapter's own base")
        sizes = {str(number): width for number in range(len(parts))}
        pieces = [expert] if len(parts) == 1 else split(expert, sizes, where).values()
        for part, piece in zip(parts, pieces, strict=True):
            module = part.removesuffix(".weight")
            yield module, replace(piece, spec=renamed(piece.spec, module))

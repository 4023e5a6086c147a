"""PEFT's directory for programs that read little of its config: servers, converters.

Every site has the same rank (padded with zeros) and scale 1 (`lora_alpha = r`, scales are folded
into B), so programs that read one rank and one alpha, or neither, compute the same. There are no
patterns, no rsLoRA, no regular expression and no metadata of this package.

Source: the readers of vLLM 0.33 (lora/peft_helper.py), SGLang 0.5.23 (srt/lora/lora_config.py) and
llama.cpp (convert_lora_to_gguf.py).

For vLLM, stacked experts are single matrices: it names experts as the base's files do
(`experts.0.gate_proj`), reads A and B of each, and wants them of all. It reads PEFT's stacks only
for models whose files hold stacks (`is_3d_moe_weight`). `format="peft"` writes stacks.

Source: vLLM 0.33, lora/model_manager.py (`_create_merged_loras_inplace`,
`_stack_moe_lora_weights`), lora/utils.py (`process_packed_modules_mapping`).

For SGLang (and vLLM's `--enable-moe-shared-loras`; Tinker exports it) stacks of experts that share
a factor are `experts.w1`, `w2` and `w3`: w1 is gate, w3 up, w2 down, each with A `(experts, rank,
in)` and B `(experts, out, rank)`. The A of w1 and w3, and the B of w2, are one for all experts:
their first size is 1. PEFT does not know it.

Source: SGLang, 2026, srt/lora/lora.py (`_rename_expert_w_to_proj`, `normalize_gate_up_proj`),
srt/lora/mem_pool.py (`load_lora_weight_to_buffer`); vLLM 0.32, lora/lora_weights.py
(`pack_moe_stacked`), lora/layers/fused_moe.py (`set_lora`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lora_inject.core.adapter.reshape import matrices_of
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import serialize
from lora_inject.errors import FormatError
from lora_inject.formats.model_facts import CONVERT, ModelFacts
from lora_inject.formats.pairs import plain_sites
from lora_inject.formats.peft import folder
from lora_inject.formats.peft.folder import CONFIG, MODEL, contents
from lora_inject.formats.single_experts import (
    as_server_stacks,
    block_and_part,
    missing_matrices,
)

KINDS = ("linear", "conv1d", "embedding", "conv")


def write(
    state: AdapterState,
    path: Path,
    facts: ModelFacts,
    *,
    dtype: str | None = None,
    rank: int | None = None,
    proof: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Write an adapter of sites on modules as a PEFT directory with one rank and scale 1.

    `dtype` is by default each tensor's own, `rank` the largest: give that of a server which takes
    only some.
    """
    plain = plain_state(state, dtype, rank)
    return folder.write(plain, path, plain_facts(facts), metadata=False, proof=proof)


def plain_state(
    state: AdapterState, dtype: str | None = None, rank: int | None = None
) -> AdapterState:
    """Return an adapter with one rank and scale 1; options as for `write`."""
    client = "a portable PEFT file"
    return AdapterState(
        plain_sites(state, client, KINDS, dtype=dtype, one_rank=True, alpha="rank", rank=rank)
    )


def plain_facts(facts: ModelFacts) -> ModelFacts:
    """Return facts with which a config has names only; with all there may be an expression."""
    return replace(facts, module_names=None)


def write_experts(
    state: AdapterState,
    path: Path,
    facts: ModelFacts,
    *,
    dtype: str | None = None,
    rank: int | None = None,
    proof: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Write the directory with a pair for each expert; options as for `write`.

    `facts.separate` names a stack's matrices in the base's files; `li.convert(base=...)` gives it.
    """
    single = single_experts(state, facts)
    plain = replace(facts, expert_names=())
    return write(single, path, plain, dtype=dtype, rank=rank, proof=proof)


def single_experts(state: AdapterState, facts: ModelFacts) -> AdapterState:
    """Return an adapter with a site for each matrix of each expert, as the base's files have them.

    Raises:
        FormatError: The base's files are not known, or a block is adapted in part.
    """
    sites: dict[str, SiteState] = {}
    for name, site in state.sites.items():
        sites |= {name: site} if site.spec.experts is None else _matrices(site, facts)
    if lost := missing_matrices(sites, facts.modules_in_files() or ()):
        problem = f"vLLM wants every matrix of every expert adapted, and '{lost[0]}' is not"
        raise FormatError("single experts", problem, "Adapt all stacks of the block, or merge")
    return replace(state, sites=sites)


def _matrices(site: SiteState, facts: ModelFacts) -> dict[str, SiteState]:
    """Return sites on single experts' matrices by their names in the base's files."""
    where, n_experts = f"site '{site.spec.name}'", site.spec.experts
    if facts.separate is None:
        problem = "the names of single experts depend on the base's files"
        raise FormatError(where, problem, CONVERT)
    names = facts.separate(site.spec.name)
    if len(names) != n_experts:
        problem = f"the base's files hold {len(names)} of its {n_experts} experts separately"
        raise FormatError(where, problem, 'Write stacks as they are: format="peft"')
    n_rows = site.spec.matrix_shape[0] // n_experts
    if any(n_rows % len(parts) for parts in names):
        problem = f"{n_rows} rows are not those of {len(names[0])} matrices"
        raise FormatError(where, problem, "Name the adapter's own base")
    return {one.spec.name: one for one in matrices_of(site, names, where).values()}


def write_shared(
    state: AdapterState,
    _path: Path,
    facts: ModelFacts,
    *,
    dtype: str | None = None,
    rank: int | None = None,
) -> dict[str, bytes]:
    """Write an adapter whose experts share A of gate and up, and B of down.

    Options as for `write`. `facts.separate` names a stack's matrices in the base's files;
    `li.convert(base=...)` gives it.

    Raises:
        FormatError: Experts have factors of their own where the layout has one for all.
    """
    plain = plain_state(single_experts(state, facts), dtype, rank)
    _, tensors, config, _ = contents(plain, plain_facts(replace(facts, expert_names=())))
    places = ((name, block_and_part(name)) for name in config["target_modules"])
    config["target_modules"] = sorted({place[2] if place else name for name, place in places})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    content = serialize(as_server_stacks(tensors), {"format": "pt"})
    return {CONFIG: text.encode(), MODEL: content}


WRITERS: dict[str, Callable[..., dict[str, bytes]]] = {
    "portable": write,
    "vllm": write_experts,
    "sglang": write_shared,
}
"""The functions that write what PEFT's reader reads, by the name of the format."""

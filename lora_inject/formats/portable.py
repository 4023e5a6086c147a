"""PEFT's directory for programs that read little of its config: servers, converters.

Every site has the same rank (padded with zeros) and scale 1 (`lora_alpha = r`, scales are folded
into B), so programs that read one rank and one alpha, or neither, compute the same. There are no
patterns, no rsLoRA, no regular expression and no metadata of this package.

Source: the readers of vLLM 0.33 (lora/peft_helper.py), SGLang 0.5.23 (srt/lora/lora_config.py),
LoRAX (adapters/lora.py) and llama.cpp (convert_lora_to_gguf.py).

For vLLM, stacked experts are single matrices: it names experts as the base's files do
(`experts.0.gate_proj`), reads A and B of each, and wants them of all. It reads PEFT's stacks only
for models whose files hold stacks (`is_3d_moe_weight`). `format="peft"` writes stacks.

Source: vLLM 0.33, lora/model_manager.py (`_create_merged_loras_inplace`,
`_stack_moe_lora_weights`), lora/utils.py (`process_packed_modules_mapping`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_inject.core.adapter.reshape import renamed, split_site, split_stack, turned
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import parent
from lora_inject.errors import FormatError
from lora_inject.formats import peft
from lora_inject.formats.format import Format
from lora_inject.formats.model_facts import CONVERT, ModelFacts
from lora_inject.formats.plain import plain_sites
from lora_inject.formats.single_experts import missing_matrices

KINDS = ("linear", "conv1d", "embedding", "conv")


def detects(path: Path) -> bool:
    """Return False: these files are read as any PEFT directory."""
    del path
    return False


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
    return peft.write(plain, path, plain_facts(facts), metadata=False, proof=proof)


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
    _check_complete(sites, state, facts)
    return replace(state, sites=sites)


def _check_complete(sites: Mapping[str, SiteState], state: AdapterState, facts: ModelFacts) -> None:
    """Refuse an adapter of some matrices of a block of experts, at which vLLM stops."""
    blocks = {parent(name) for name, site in state.sites.items() if site.spec.experts is not None}
    stacks = [name for name in facts.tensor_names or () if parent(name) in blocks]
    inside = (part for stack in stacks for parts in _separate(facts, stack) for part in parts)
    lost = missing_matrices(sites, {part.removesuffix(".weight") for part in inside})
    if lost:
        problem = f"vLLM wants every matrix of every expert adapted, and '{lost[0]}' is not"
        raise FormatError("single experts", problem, "Adapt all stacks of the block, or merge")


def _separate(facts: ModelFacts, stack: str) -> Sequence[Sequence[str]]:
    return () if facts.separate is None else facts.separate(stack)


def _matrices(site: SiteState, facts: ModelFacts) -> Iterator[tuple[str, SiteState]]:
    """Yield sites on single experts' matrices with their names in the base's files."""
    where, n_experts = f"site '{site.spec.name}'", site.spec.experts
    if facts.separate is None:
        problem = "the names of single experts depend on the base's files"
        raise FormatError(where, problem, CONVERT)
    names = facts.separate(site.spec.name)
    if len(names) != n_experts:
        problem = f"the base's files hold {len(names)} of its {n_experts} experts separately"
        raise FormatError(where, problem, 'Write stacks as they are: format="peft"')
    # Files keep Linear layers' matrices, which lie as in the stack, whatever its adapter calls in.
    site = turned(site) if site.spec.transposed else site
    for expert, parts in zip(split_stack(site).values(), names, strict=True):
        width, stray = divmod(expert.spec.out_features, len(parts))
        if stray:
            problem = f"{expert.spec.out_features} rows are not those of {len(parts)} matrices"
            raise FormatError(where, problem, "Name the adapter's own base")
        sizes = {str(number): width for number in range(len(parts))}
        pieces = [expert] if len(parts) == 1 else split_site(expert, sizes, where).values()
        for part, piece in zip(parts, pieces, strict=True):
            module = part.removesuffix(".weight")
            yield module, replace(piece, spec=renamed(piece.spec, module))


FORMATS = {
    "portable": Format(write, peft.read, detects, frozenset(), check_save=peft.check_save),
    "vllm": Format(write_experts, peft.read, detects, frozenset(), check_save=peft.check_save),
}

"""A portable PEFT folder whose stacked experts are single matrices, as vLLM wants most models'.

vLLM names experts as the base's files do (`experts.0.gate_proj`), and takes A and B of each. It
reads PEFT's stacks correctly only for models whose files hold stacks (`is_3d_moe_weight`); for
others it takes every second row of `gate_up_proj` for the gate. `format="peft"` writes stacks.

Source: vLLM 0.33, lora/model_manager.py (`_create_merged_loras_inplace`,
`_stack_moe_lora_weights`), lora/utils.py (`process_packed_modules_mapping`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_inject.adapter.reshape import Site, renamed, split, split_experts
from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.errors import FormatError
from lora_inject.formats import portable

Separate = Callable[[str], Sequence[Sequence[str]]]
"""For each expert the names of its matrices in the base's files."""


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    separate: Separate | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    tensor_names: Sequence[str] | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write a portable PEFT folder with a pair for each expert.

    Args:
        state: The adapter: sites on modules and on stacks of experts, nothing trained in full.
        path: The directory.
        overwrite: Replace an adapter that is there already.
        separate: Names of a stack's matrices in the base's files, from `li.convert(base=...)` or
            `--base`.
        dtype: `float16`, `bfloat16` or `float32`; by default each tensor's own.
        rank: The rank of every site; the largest by default.
        tensor_names: All names of the model's state dict; see `formats.peft.write`.
        base_model: Name or path of the base, for the config and the model card.
        task_type: PEFT's task type.

    Returns:
        The directory that was written.

    Raises:
        FormatError: The base is not known or holds stacks, or such a folder cannot express
            something else.
    """
    asked = f"write vLLM adapter to '{path}'"
    sites: dict[str, SiteState] = {}
    for name, site in state.sites.items():
        if site.spec.experts is None:
            sites[name] = site
        else:
            sites |= _matrices(name, site, separate, asked)
    return portable.write(
        dataclasses.replace(state, sites=sites),
        path,
        overwrite=overwrite,
        dtype=dtype,
        rank=rank,
        tensor_names=tensor_names,
        base_model=base_model,
        task_type=task_type,
    )


def _matrices(
    name: str, site: SiteState, separate: Separate | None, asked: str
) -> dict[str, SiteState]:
    """Return sites on single experts' matrices with their names in the base's files."""
    where = f"{asked}, site '{name}'"
    if separate is None:
        found = "the names of single experts depend on the base's files"
        raise FormatError(where, found, "Name the base: --base BASE, li.convert(base=...)")
    names = separate(name)
    if len(names) != site.spec.experts:
        found = f"the base's files hold {len(names)} of its {site.spec.experts} experts separately"
        raise FormatError(where, found, 'Write stacks as they are: format="peft"')
    return dict(_named(split_experts(site), names, where))


def _named(
    experts: dict[str, Site], names: Sequence[Sequence[str]], where: str
) -> Iterator[tuple[str, SiteState]]:
    for expert, parts in zip(experts.values(), names, strict=True):
        modules = [part.removesuffix(".weight") for part in parts]
        width, stray = divmod(expert.spec.out_features, len(modules))
        if stray:
            found = f"{expert.spec.out_features} rows are not those of {len(modules)} matrices"
            raise FormatError(where, found, "Name the adapter's own base")
        if len(modules) == 1:
            made = {modules[0]: Site(renamed(expert.spec, modules[0]), expert.pairs)}
        else:
            pieces = split(expert, {str(n): width for n in range(len(modules))}, where)
            made = {
                module: Site(renamed(piece.spec, module), piece.pairs)
                for module, piece in zip(modules, pieces.values(), strict=True)
            }
        for module, of in made.items():
            (A, B, _), *start = of.pairs
            A0, B0 = start[0][:2] if start else (None, None)
            yield module, SiteState(of.spec, A, B, A0, B0)

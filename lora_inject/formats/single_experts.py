"""Adapters on single experts (`experts.0.gate_proj`): which matrices of a block they leave out.

vLLM packs the pairs of a block into stacks, and stops at a matrix without one by an assertion that
names nothing. Source: vLLM 0.32 and 0.33, lora/lora_weights.py (`pack_moe`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def is_single_expert(name: str) -> bool:
    """Return whether a name is that of a matrix of a single expert.

    Examples:
        >>> is_single_expert("mlp.experts.3.up_proj"), is_single_expert("mlp.experts")
        (True, False)
    """
    return _SINGLE.fullmatch(name) is not None


def block_and_part(name: str) -> tuple[str, int, str] | None:
    """Return the block, the number and the matrix of a single expert; None for another name.

    Examples:
        >>> block_and_part("mlp.experts.3.up_proj")
        ('mlp.experts', 3, 'up_proj')
    """
    match = _SINGLE.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def missing_matrices(names: Iterable[str], known: Collection[str] = ()) -> list[str]:
    """Return the matrices of adapted blocks that have no pair.

    Args:
        names: The adapted modules.
        known: The base's modules; without them a block has the experts up to the last adapted one,
            and each has what one of them has.

    Examples:
        >>> missing_matrices(["mlp.experts.0.up_proj", "mlp.experts.2.up_proj"])
        ['mlp.experts.1.up_proj']
    """
    adapted = {name for name in names if is_single_expert(name)}
    blocks = dict.fromkeys(match[1] for name in adapted if (match := _SINGLE.fullmatch(name)))
    there = {name for name in known if (m := _SINGLE.fullmatch(name)) and m[1] in blocks}
    due = there or {name for block in blocks for name in _of_block(block, adapted)}
    return sorted(due - adapted)


def _of_block(block: str, adapted: Iterable[str]) -> Iterable[str]:
    """Yield the names of all matrices of a block, as far as the adapted ones tell."""
    matches = [m for name in adapted if (m := _SINGLE.fullmatch(name)) and m[1] == block]
    n_experts = 1 + max(int(match[2]) for match in matches)
    for part in {match[3] for match in matches}:
        yield from (f"{block}.{expert}.{part}" for expert in range(n_experts))

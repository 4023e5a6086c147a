"""Names of modules of Llama-like decoders in other programs, and the order of rows of q and k.

Llama's rotary embedding rotates pairs of values. Transformers stores the first values of all pairs
of a head, then the second ones; Meta's code, and programs that follow it, store each pair side by
side. So the rows of q and k, and of their B, have another order there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.formats.base_config import Heads
from lora_inject.formats.metadata import one_line

_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
Q, K = "self_attn.q_proj", "self_attn.k_proj"


def to_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Return rows `(n, r)` of transformers in the order of Meta's code.

    Examples:
        >>> import torch
        >>> to_pairs(torch.arange(4)[:, None], 1).flatten().tolist()
        [0, 2, 1, 3]
        >>> from_pairs(torch.tensor([0, 2, 1, 3])[:, None], 1).flatten().tolist()
        [0, 1, 2, 3]
    """
    return rows.reshape(n_heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def from_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Return rows in the order of transformers; the inverse of `to_pairs`."""
    return rows.reshape(n_heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def theirs(name: str, table: Mapping[str, str], layer: str, asked: str) -> str:
    """Return another program's name of a module.

    `table` maps names within a layer, and full names of modules outside of layers; `layer` is the
    program's prefix of a layer, such as `blk.{}.`.
    """
    found = _LAYER.fullmatch(name)
    if name in table and found is None:
        return table[name]
    if found is None or found[2] not in table:
        raise FormatError(
            f"{asked}, site '{name}'",
            "the format has no name for this module",
            f"It names {one_line(table, 12)}; merge the adapter into its base instead",
        )
    return layer.format(found[1]) + table[found[2]]


def ours(name: str, table: Mapping[str, str], layer: str, where: str) -> str:
    """Return transformers' name of another program's module; see `theirs`."""
    names = {theirs: mine for mine, theirs in table.items()}
    pattern = re.escape(layer).replace(re.escape("{}"), r"(\d{1,4})") + r"(.+)"
    found = re.fullmatch(pattern, name)
    if found is not None and found[2] in names:
        return f"model.layers.{found[1]}.{names[found[2]]}"
    if found is None and name in names:
        return names[name]
    raise FormatError(
        where, f"the module '{name[:200]}' is not known", "Give an adapter of such a model"
    )


def part_of(name: str) -> str:
    """Return a module's name within its layer.

    Examples:
        >>> part_of("model.layers.3.self_attn.q_proj"), part_of("lm_head")
        ('self_attn.q_proj', 'lm_head')
    """
    found = _LAYER.fullmatch(name)
    return name if found is None else found[2]


def heads_of(name: str, sizes: Heads, n_rows: int, asked: str) -> int:
    """Return the number of heads of q or k, 0 for other modules."""
    if part_of(name) not in (Q, K):
        return 0
    n_heads = sizes.n_heads if part_of(name) == Q else sizes.n_kv_heads
    if n_rows != n_heads * sizes.head_dim or sizes.head_dim % 2:
        raise FormatError(
            f"{asked}, '{name}'",
            f"B has {n_rows} rows, and the base has {n_heads} heads of {sizes.head_dim}",
            "Name the base that the adapter was made for",
        )
    return n_heads


def check_every_layer(names: Collection[str], n_layers: int, asked: str, client: str) -> None:
    """Refuse an adapter that lacks a module in some layers, for a client that needs it in all."""
    parts = {part_of(name) for name in names if _LAYER.fullmatch(name)}
    due = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in sorted(parts)]
    missing = [name for name in due if name not in names]
    if missing:
        raise FormatError(
            asked,
            f"{client} adapts a module in all layers, and {one_line(missing)} have no update",
            "Merge the adapter into its base instead (lora-inject merge)",
        )


def check_whole_mlp(names: Collection[str], asked: str, client: str) -> None:
    """Refuse an adapter of a part of an MLP, for a client that adapts all matrices or none."""
    parts = {part for name in names if (part := part_of(name)).startswith("mlp.")}
    if len(parts) in (1, 2):
        raise FormatError(
            asked,
            f"{client} adapts gate, up and down of an MLP together, and there is {one_line(parts)}",
            "Merge the adapter into its base instead (lora-inject merge)",
        )

"""How other programs name the modules of Llama-like decoders and store their A and B.

Llama's rotary embedding rotates pairs of values. Transformers stores the first values of all pairs
of a head, then the second ones; Meta's code, and programs that follow it, store each pair side by
side. So these programs have the rows of q and k, and of their B, in another order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.errors import FormatError, within
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import matrices

_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
_MERGE = "Merge the adapter into its base instead (lora-inject merge)"
Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""A and B by transformers' name of their module."""


def in_pairs(rows: Tensor, n_heads: int, *, back: bool = False) -> Tensor:
    """Return rows `(n, r)` of transformers in the order of Meta's code; `back` is the inverse.

    Examples:
        >>> import torch
        >>> rows = in_pairs(torch.arange(4)[:, None], 1)
        >>> rows.flatten().tolist(), in_pairs(rows, 1, back=True).flatten().tolist()
        ([0, 2, 1, 3], [0, 1, 2, 3])
    """
    halves = (-1, 2) if back else (2, -1)
    return rows.reshape(n_heads, *halves, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


class Decoder(NamedTuple):
    """A program's keys of the A and B of a decoder's modules.

    Attributes:
        names: Transformers' name of a module (within its layer; outside of layers the full name)
            to the program's name.
        layer: The program's prefix of a layer, such as `blk.{}.`.
        ends: The ends of the program's keys of A and B.
        in_pairs: Whether the rows of q and k are in the order of Meta's code.
        turned: The module whose A is stored transposed, if any.
    """

    names: Mapping[str, str]
    layer: str
    ends: tuple[str, str]
    in_pairs: bool = False
    turned: str | None = None

    def stored(self, pairs: Pairs, facts: ModelFacts) -> dict[str, Tensor]:
        """Return the tensors of a file; the base's config says how many heads q and k have."""
        tensors = {}
        for name, (a, b) in pairs.items():
            with within(f"site '{name}'"):
                key, n_heads = self.theirs(name), self._n_heads(name, facts, len(b))
            tensors[key + self.ends[0]] = a.T if name == self.turned else a
            tensors[key + self.ends[1]] = in_pairs(b, n_heads) if n_heads else b
        return tensors

    def read(
        self, tensors: Mapping[str, Tensor], facts: ModelFacts, remedy: str
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pairs of a file by transformers' names; `remedy` is for any other tensor."""
        pairs = {}
        for key, (a, b) in matrices(tensors, self.ends, remedy).items():
            with within(f"'{key[:200]}'"):
                name = self.ours(key)
                n_heads = self._n_heads(name, facts, len(b))
            rows = in_pairs(b, n_heads, back=True) if n_heads else b
            pairs[name] = (a.T.contiguous() if name == self.turned else a), rows
        return pairs

    def theirs(self, name: str) -> str:
        """Return the program's name of a module."""
        match = _LAYER.fullmatch(name)
        part = name if match is None else match[2]
        if part not in self.names:
            known = one_line(self.names, 12)
            remedy = f"It names {known}; merge the adapter into its base instead"
            raise FormatError("", "the format has no name for this module", remedy)
        return (self.layer.format(match[1]) if match else "") + self.names[part]

    def ours(self, key: str) -> str:
        """Return transformers' name of a module of the program."""
        names = {theirs: mine for mine, theirs in self.names.items()}
        layer = re.escape(self.layer).replace(re.escape("{}"), r"(\d{1,4})")
        match = re.fullmatch(layer + "(.+)", key)
        part = key if match is None else match[2]
        if part not in names:
            raise FormatError("", "this module is not known", "Give an adapter of such a model")
        return (f"model.layers.{match[1]}." if match else "") + names[part]

    def _n_heads(self, name: str, facts: ModelFacts, n_rows: int) -> int:
        """Return the number of heads of q or k if their rows are in pairs, else 0."""
        part = part_of(name)
        if not self.in_pairs or part not in ("self_attn.q_proj", "self_attn.k_proj"):
            return 0
        sizes = facts.heads("how many heads q and k have")
        n_heads = sizes.n_heads if part == "self_attn.q_proj" else sizes.n_kv_heads
        if n_rows != n_heads * sizes.head_dim or sizes.head_dim % 2:
            problem = f"B has {n_rows} rows, and the base has {n_heads} heads of {sizes.head_dim}"
            raise FormatError("", problem, "Name the base that the adapter was made for")
        return n_heads


def part_of(name: str) -> str:
    """Return a module's name within its layer.

    Examples:
        >>> part_of("model.layers.3.self_attn.q_proj"), part_of("lm_head")
        ('self_attn.q_proj', 'lm_head')
    """
    match = _LAYER.fullmatch(name)
    return name if match is None else match[2]


def check_whole(names: Collection[str], n_layers: int, client: str) -> None:
    """Refuse an adapter of a module in some layers, or of a part of an MLP.

    This is for clients that adapt a module in all layers or none, and gate, up and down together.
    """
    parts = {part_of(name) for name in names if _LAYER.fullmatch(name)}
    due = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in sorted(parts)]
    mlp = {part for part in parts if part.startswith("mlp.")}
    if missing := [name for name in due if name not in names]:
        problem = f"{client} adapts a module in all layers, and {one_line(missing)} have no update"
        raise FormatError("", problem, _MERGE)
    if len(mlp) in (1, 2):
        problem = f"{client} adapts gate, up and down of an MLP together, and there is "
        raise FormatError("", problem + one_line(mlp), _MERGE)

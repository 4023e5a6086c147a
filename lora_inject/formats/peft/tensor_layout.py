"""Where a site lives in a PEFT file, and in what shape.

A PEFT file holds for each adapted module one plain pair of matrices under a key made from
its name. This file states both directions once, so that what is written is what is read: the key of
each site and of each fully trained tensor, and the plain pair that equals a site with slices
(block-diagonal B), with a frozen start (A0, B0 as further ranks) or with experts.

Source: peft 0.21.2, tuners/lora/layer.py (`Linear`, `Embedding`, `_ConvNd`, `ParamWrapper`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.errors import FormatError
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.tensors import contiguous

PREFIX = "base_model.model."
KINDS = ("linear", "conv1d", "embedding", "conv", "parameter")


FURTHER = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}
ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's names of the tensors of a variant, by role."""


class Slot(NamedTuple):
    """The keys of one site's pair, and of further tensors by role."""

    a: str
    b: str
    further: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """The keys of a file: of each site by its name, of each trained tensor by the base's name."""

    slots: Mapping[str, Slot]
    trained: Mapping[str, str]

    @property
    def keys(self) -> list[str]:
        """All keys; one that appears twice is a clash of names."""
        sites = [k for s in self.slots.values() for k in (s.a, s.b, *s.further.values())]
        return sites + list(self.trained.values())


class Packing(NamedTuple):
    """How a native site becomes a plain pair.

    Derived: A0 and B0 are further ranks of it. Turned: PEFT sees the weight the other way round, so
    that A and B have changed places: `(B A)^T = A^T B^T`.
    """

    derived: bool = False
    turned: bool = False


def is_turned(spec: SiteSpec, transposed_modules: Collection[str] | None = None) -> bool:
    """Whether PEFT sees a parameter the other way round than its spec.

    PEFT takes a matrix for (out, in), and a stack of matrices for (experts, out, in) unless the
    module that owns it has transformers' `is_transposed`. Where no names of such modules are given,
    the specs are right.
    """
    if spec.kind != "parameter":
        return False
    if spec.experts is None:
        return spec.transposed
    if transposed_modules is None:
        return False
    return spec.transposed != (owner(spec.name) in transposed_modules)


def owner(name: str) -> str:
    """The module that holds a tensor: `mlp.experts` of `mlp.experts.down_proj`."""
    return name.rpartition(".")[0]


def wrapped(spec: SiteSpec) -> str:
    """The module that PEFT wraps for a site."""
    return owner(spec.name) if spec.kind == "parameter" else spec.name


def plan(specs: Iterable[SiteSpec], trained: Iterable[str], rows: Collection[str] = ()) -> Layout:
    """Return the keys of an adapter's tensors in a PEFT file; specs in the order of the model.

    `rows` are the names among `trained` of which only rows are stored.

    PEFT wraps a module once for itself and once for each of its adapted parameters, the first of
    them innermost, and each wrapper adds `.base_layer` to the path of what is inside it.

    Examples:
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=2)
        >>> layout = plan([spec], ["h.0.fc.bias", "ln.weight"])
        >>> layout.slots["h.0.fc"].a
        'base_model.model.h.0.fc.lora_A.weight'
        >>> list(layout.trained.values())
        ['base_model.model.h.0.fc.base_layer.bias', 'base_model.model.ln.weight']
    """
    specs = list(specs)
    names_on: dict[str, list[str]] = {}
    for spec in specs:
        names_on.setdefault(wrapped(spec), []).append(spec.name)
    paths = _Paths({module: len(names) for module, names in names_on.items()})
    slots = {}
    for module, names in names_on.items():
        path = paths.outside(module)
        for outside, name in enumerate(reversed(names)):
            slots[name] = path + ".base_layer" * outside
    pairs = {spec.name: _slot(slots[spec.name], spec) for spec in specs}
    keys = {}
    for name in trained:
        module, _, tensor = name.rpartition(".")
        keys[name] = f"{paths.inside(module)}.{ROWS if name in rows else tensor}"
    return Layout(pairs, keys)


def _slot(path: str, spec: SiteSpec) -> Slot:
    further = {role: f"{path}.{FURTHER[role]}" for role in spec.shapes if role in FURTHER}
    if spec.kind == "embedding":
        return Slot(f"{path}.lora_embedding_A", f"{path}.lora_embedding_B", further)
    return Slot(f"{path}.lora_A.weight", f"{path}.lora_B.weight", further)


def further_shape(spec: SiteSpec, role: str) -> tuple[int, ...]:
    """Return the shape in the file of a further tensor: PEFT stores magnitudes broadcastable."""
    shape = spec.shapes[role]
    kernel = spec.weight_shape[2:] if spec.kind == "conv" else ()
    return (1, *shape, *(1 for _ in kernel)) if role == "m" and kernel else shape


class _Paths:
    """The paths of modules in the wrapped model; that of a parent is worked out once."""

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.depths = depths
        self._inside = {"": PREFIX.rstrip(".")}

    def outside(self, module: str) -> str:
        """Path of a module's outermost wrapper."""
        parent, _, last = module.rpartition(".")
        return f"{self.inside(parent)}.{last}"

    def inside(self, module: str) -> str:
        """Path of a module inside all of its wrappers."""
        found = self._inside.get(module)
        if found is None:
            found, name = self._inside[""], ""
            for part in module.split("."):
                name = f"{name}.{part}" if name else part
                found += f".{part}" + ".base_layer" * self.depths.get(name, 0)
            self._inside[module] = found
        return found


# Shapes -----------------------------------------------------------------------------------------


def file_rank(spec: SiteSpec, *, derived: bool) -> int:
    """Rank of the plain pair: `rank` times the adapted slices, doubled by a frozen start."""
    return spec.rank * len(spec.spans) * (2 if derived else 1)


def file_shapes(spec: SiteSpec, packing: Packing) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a site's two tensors in the file.

    Examples:
        >>> spec = SiteSpec("c", "conv", 18, 4, (4, 2, 3, 3), rank=2, alpha=2)
        >>> file_shapes(spec, Packing())
        ((2, 2, 3, 3), (4, 2, 1, 1))
    """
    if _is_plain(spec, packing):
        return spec.a_shape, spec.b_shape
    rank = file_rank(spec, derived=packing.derived)
    if spec.kind == "conv":
        kernel = spec.weight_shape[1:]
        return (rank, *kernel), (spec.out_features, rank, *(1 for _ in kernel[1:]))
    experts = spec.experts or 1
    n_in, n_out = spec.in_features, spec.out_features
    if packing.turned:
        n_in, n_out = n_out, n_in
    return (experts * rank, n_in), (n_out, rank * experts)


def _is_plain(spec: SiteSpec, packing: Packing) -> bool:
    """Whether the file holds a site's A and B as they are."""
    odd = packing.derived or packing.turned or spec.kind == "conv"
    return not odd and spec.slices is None and spec.experts is None


def pack(site: SiteState, *, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Return a site's pair as PEFT stores it, of `file_shapes`.

    Experts: A is stacked by expert, B's columns are ordered by rank first and expert second.
    """
    a, b = plain_pair(site)
    if turned:
        a, b = b.mT, a.mT
    shapes = file_shapes(site.spec, Packing(derived=site.A0 is not None, turned=turned))
    return a.reshape(shapes[0]), b.permute(1, 2, 0).reshape(shapes[1])


def plain_pair(site: SiteState) -> tuple[Tensor, Tensor]:
    """Return A `(experts, r', in)` and B `(experts, out, r')`: no slices, no frozen start."""
    (a, b), *start = [_plain(site.spec, A, B if sign == 1 else -B) for A, B, sign in site.pairs]
    for a0, b0 in start:  # W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
        a, b = torch.cat([a, a0], dim=1), torch.cat([b, b0], dim=2)
    return a, b


def unpack(
    spec: SiteSpec, a: Tensor, b: Tensor, asked: str, packing: Packing | None = None
) -> SiteState:
    """Return the native site of a pair of `file_shapes`; the inverse of `pack`.

    It is an error if B is not zero where the slices say that nothing is adapted.
    """
    packing = packing or Packing()
    if _is_plain(spec, packing) and (a.shape, b.shape) == (spec.a_shape, spec.b_shape):
        return SiteState(spec, a, b)
    experts, rank = spec.experts or 1, file_rank(spec, derived=packing.derived)
    a = a.reshape(experts, rank, -1)
    b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    if packing.turned:
        a, b = b.mT, a.mT
    if not packing.derived:
        return SiteState(spec, *_native(spec, a, b, asked))
    half = rank // 2
    pair = _native(spec, a[:, :half], b[:, :, :half], asked)
    start = _native(spec, a[:, half:], -b[:, :, half:], asked)
    return SiteState(spec, *pair, *start)


def _plain(spec: SiteSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Native to plain: `(experts, n * rank, in)` and `(experts, out, n * rank)`."""
    experts, n_parts = spec.experts or 1, len(spec.spans)
    a = a.detach().reshape(experts, n_parts * spec.rank, spec.in_features)
    b = b.detach().reshape(experts, -1, spec.rank)
    if spec.slices is None:
        return a, b
    full = b.new_zeros(experts, spec.out_features, n_parts * spec.rank)
    for source, rows, columns in _blocks(spec):
        full[:, rows, columns] = b[:, source]
    return a, full


def _native(spec: SiteSpec, a: Tensor, b: Tensor, asked: str) -> tuple[Tensor, Tensor]:
    """Plain to native; the zeros outside the blocks are checked, not believed."""
    if spec.slices is not None:
        full, parts = b.clone(), []
        for _, rows, columns in _blocks(spec):
            parts.append(b[:, rows, columns])
            full[:, rows, columns] = 0
        n_stray = int(torch.count_nonzero(full))
        if n_stray:
            raise FormatError(
                f"{asked}, site '{spec.name}'",
                f"{n_stray} values of B lie outside the adapted slices {list(spec.slices.adapt)}",
                'The file was changed after it was written; pass prefer="config" to read it as a '
                "plain adapter of the whole projection",
            )
        b = torch.cat(parts, dim=1)
    return contiguous(a.reshape(spec.a_shape)), contiguous(b.reshape(spec.b_shape))


def _blocks(spec: SiteSpec) -> Iterable[tuple[slice, slice, slice]]:
    """Rows of the native B, rows and columns of the plain B, of each adapted slice."""
    offset = 0
    for part, (start, stop) in enumerate(spec.spans):
        width = stop - start
        columns = slice(part * spec.rank, (part + 1) * spec.rank)
        yield slice(offset, offset + width), slice(start, stop), columns
        offset += width


def file_alpha(spec: SiteSpec, *, derived: bool, rslora: bool) -> float:
    """The alpha that gives the plain pair the site's scale.

    It is `scale * rank'`, rank' being the file's, or `scale * sqrt(rank')` for `use_rslora`.

    Examples:
        >>> file_alpha(SiteSpec("q", "linear", 4, 6, (6, 4), 2, 8.0), derived=True, rslora=False)
        16.0
    """
    rank = file_rank(spec, derived=derived)
    if rslora == (spec.scaling == "rslora"):
        factor = rank // spec.rank
        return spec.alpha * (math.sqrt(factor) if rslora else factor)
    return spec.scale * (math.sqrt(rank) if rslora else rank)

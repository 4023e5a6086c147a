"""Split sites and join sites: fused projections, stacked experts.

Values change only where ranks or scales differ: then A and B are padded with zeros, and B is
multiplied by the ratio of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.adapter.algebra import Update, check_alike, total
from lora_inject.errors import StateError
from lora_inject.spec.names import joined, parent
from lora_inject.spec.sites import SiteSpec, Slices


class Site(NamedTuple):
    """A site as plain values: an `algebra.Update`."""

    spec: SiteSpec
    pairs: tuple[tuple[Tensor, Tensor, float], ...]


def _axis(spec: SiteSpec) -> int:
    """Return the weight's axis of outputs."""
    axis = -1 if spec.transposed else 0 if spec.kind == "conv" else -2
    if spec.weight_shape[axis] != spec.out_features:
        found = f"its weight {list(spec.weight_shape)} has no axis for its outputs"
        raise StateError(f"split or join '{spec.name}'", found, "Leave it as it is")
    return axis


def _shape(spec: SiteSpec, width: int) -> tuple[int, ...]:
    shape = list(spec.weight_shape)
    shape[_axis(spec)] = width
    return tuple(shape)


def renamed(spec: SiteSpec, name: str) -> SiteSpec:
    """Return the site under another name, with its weight's name changed likewise."""
    return replace(spec, name=name, weight=name + spec.weight.removeprefix(spec.name), aliases=())


def split(site: Update, sizes: Mapping[str, int], asked: str) -> dict[str, Site]:
    """Return the adapted parts of a fused projection as separate sites with the same parent."""
    spec = site.spec
    asked = f"{asked}, site '{spec.name}'"
    if spec.slices is not None and (not sizes or tuple(sizes.items()) == spec.slices.sizes):
        sizes, adapted = dict(spec.slices.sizes), spec.slices.adapt
    elif spec.slices is not None or sum(sizes.values()) != spec.out_features:
        has = dict(spec.slices.sizes) if spec.slices else f"{spec.out_features} outputs"
        raise StateError(
            asked, f"it has {has}, and {dict(sizes)} is asked for", "Correct the sizes"
        )
    else:
        adapted = tuple(sizes)
    found: dict[str, Site] = {}
    row = 0
    for number, part in enumerate(adapted):
        width = sizes[part]
        a_part = number if spec.slices else 0
        pairs = tuple(
            (
                A[..., a_part * spec.rank : (a_part + 1) * spec.rank, :],
                B[..., row : row + width, :],
                sign,
            )
            for A, B, sign in site.pairs
        )
        row += width
        name = joined(parent(spec.name), part)
        made = replace(
            renamed(spec, name),
            out_features=width,
            weight_shape=_shape(spec, width),
            slices=None,
            rule=None,
        )
        found[name] = Site(made, pairs)
    return found


def join(name: str, members: Mapping[str, Update], sizes: Mapping[str, int], asked: str) -> Site:
    """Return one site on a fused projection from sites on some of its parts."""
    asked = f"{asked}, site '{name}'"
    for part, site in members.items():
        if site.spec.slices is not None or site.spec.out_features != sizes[part]:
            found = f"'{site.spec.name}' has {site.spec.out_features} outputs, not {sizes[part]}"
            raise StateError(asked, found, "Correct the sizes")
    first = next(iter(members.values())).spec
    width = first.out_features
    check_alike([replace(s.spec, out_features=width) for s in members.values()], asked)
    width = sum(sizes.values())
    fused = replace(
        renamed(first, name), out_features=width, weight_shape=_shape(first, width), rule=None
    )
    terms: list[tuple[Update, float]] = []
    for part, site in members.items():
        slices = Slices(tuple(sizes.items()), (part,))
        of = {"rank": site.spec.rank, "alpha": site.spec.alpha, "scaling": site.spec.scaling}
        terms.append((Site(replace(fused, slices=slices, **of), site.pairs), 1.0))  # type: ignore[arg-type]
    spec, A, B = total(terms, fused)
    return Site(spec, ((A, B, 1.0),))


def split_experts(site: Update) -> dict[str, Site]:
    """Return the experts of a stack as linear sites: `experts.up` as `experts.0.up` and so on."""
    spec = site.spec
    head, _, leaf = spec.name.rpartition(".")
    found = {}
    for expert in range(spec.experts or 0):
        name = joined(head, f"{expert}.{leaf}")
        made = replace(
            spec,
            name=name,
            weight=f"{name}.weight",
            kind="linear",
            weight_shape=(spec.out_features, spec.in_features),
            transposed=False,
            experts=None,
            update="forward",
            rule=None,
            aliases=(),
        )
        found[name] = Site(made, tuple((A[expert], B[expert], sign) for A, B, sign in site.pairs))
    return found


def join_experts(name: str, members: Mapping[int, Update], n: int, asked: str) -> Site:
    """Return one site on a stack of experts from the sites on them, zeros for missing ones."""
    asked = f"{asked}, site '{name}'"
    specs = [site.spec for site in members.values()]
    check_alike(specs, asked)
    first = specs[0]
    if first.kind != "linear" or len({spec.slices for spec in specs}) > 1:
        found = "its experts are not all plain linear layers with the same slices"
        raise StateError(asked, found, "Join the layers of each expert first")
    ratios = {number: site.spec.scale / first.scale for number, site in members.items()}
    plain = {number: _plain(site) for number, site in members.items()}
    rank = max(len(A) for A, _ in plain.values()) // len(first.spans)
    dtype = reduce(torch.promote_types, (A.dtype for A, _ in plain.values()))
    if set(ratios.values()) != {1.0}:
        dtype = torch.promote_types(dtype, torch.float32)
    stack = {}
    for number, (A, B) in plain.items():
        a = A.reshape(len(first.spans), -1, first.in_features)
        a = F.pad(a, (0, 0, 0, rank - a.shape[1])).flatten(0, 1)
        b = B if ratios[number] == 1 else B.double() * ratios[number]
        stack[number] = a.to(dtype), F.pad(b.to(dtype), (0, rank - b.shape[1]))
    a, b = next(iter(stack.values()))
    empty = torch.zeros_like(a), torch.zeros_like(b)
    found_a, found_b = zip(*(stack.get(number, empty) for number in range(n)), strict=True)
    made = replace(
        first,
        name=name,
        weight=name,
        kind="parameter",
        weight_shape=(n, first.out_features, first.in_features),
        experts=n,
        rank=rank,
        alpha=first.scale * rank,
        scaling="standard",
        init="kaiming",
        update="weight",
        rule=None,
        aliases=(),
    )
    return Site(made, ((torch.stack(found_a), torch.stack(found_b), 1.0),))


def _plain(site: Update) -> tuple[Tensor, Tensor]:
    """Return A and B, with a frozen start as further ranks."""
    if len(site.pairs) == 1:
        return site.pairs[0][:2]
    return total([(site, 1.0)], site.spec)[1:]

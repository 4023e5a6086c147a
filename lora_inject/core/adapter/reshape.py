"""Split sites and join sites: fused projections, stacked experts.

Values change only where ranks or scales differ: then A and B are padded with zeros, and B is
multiplied by the ratio of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from lora_inject.core.adapter.parts import check_alike, gathered, site_of, total
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.names import joined, leaf, parent
from lora_inject.core.spec.sites import SiteSpec, Slices, adapted_parts
from lora_inject.errors import StateError


def renamed(spec: SiteSpec, name: str) -> SiteSpec:
    """Return the site under another name, its weight and the layer's further names likewise.

    What is new at the end of its name is new at the end of the others.
    """
    old, new = spec.name.split("."), name.split(".")
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    further = [alias.split(".") for alias in spec.aliases]
    heads = [parts[: -len(old)] for parts in further if old and parts[-len(old) :] == old]
    aliases = tuple(".".join([*head, *new]) for head in heads)
    return spec.at(name, name + spec.weight.removeprefix(spec.name), aliases)


def _further_names(specs: Sequence[SiteSpec], name: str) -> tuple[str, ...]:
    """Return the further names of what sites are joined to: those that all of them have."""
    each = [renamed(spec, name).aliases for spec in specs]
    return tuple(alias for alias in each[0] if all(alias in other for other in each))


def _resized(spec: SiteSpec, name: str, width: int) -> SiteSpec:
    """Return a plain site under another name, with another number of outputs."""
    axis = -1 if spec.transposed else 0 if spec.kind == "conv" else -2
    shape = list(spec.weight_shape)
    if shape[axis] != spec.out_features:
        problem = f"its weight {shape} has no axis for its outputs"
        raise StateError(f"split or join '{spec.name}'", problem, "Leave it as it is")
    shape[axis] = width
    of = renamed(spec, name)
    return replace(of, out_features=width, weight_shape=tuple(shape), slices=None)


def split_site(site: SiteState, sizes: Mapping[str, int], asked: str) -> dict[str, SiteState]:
    """Return the adapted parts of a fused projection as separate sites with the same parent."""
    spec = site.spec
    if spec.slices is not None and (not sizes or tuple(sizes.items()) == spec.slices.sizes):
        sizes, adapted = dict(spec.slices.sizes), spec.slices.adapt
    elif spec.slices is not None or sum(sizes.values()) != spec.out_features:
        has = dict(spec.slices.sizes) if spec.slices else f"{spec.out_features} outputs"
        problem = f"it has {has}, and {dict(sizes)} is asked for"
        raise StateError(f"{asked}, site '{spec.name}'", problem, "Correct the sizes")
    else:
        adapted = tuple(sizes)
    made: dict[str, SiteState] = {}
    spans = Slices(tuple(sizes.items()), adapted).spans
    for part, (_, _, ranks, of_b) in zip(adapted, adapted_parts(spans, spec.rank), strict=True):
        rows = {"A": ranks if spec.slices else slice(spec.rank), "B": of_b}
        tensors = {role: t[..., rows[role[0]], :] for role, t in site.tensors.items()}
        name = joined(parent(spec.name), part)
        made[name] = SiteState.of(_resized(spec, name, sizes[part]), tensors)
    return made


def join_sites(
    name: str, members: Mapping[str, SiteState], sizes: Mapping[str, int], asked: str
) -> SiteState:
    """Return one site on a fused projection from sites on some of its parts."""
    asked = f"{asked}, site '{name}'"
    for part, site in members.items():
        if site.spec.slices is not None or site.spec.out_features != sizes[part]:
            problem = f"'{site.spec.name}' has {site.spec.out_features} outputs, not {sizes[part]}"
            raise StateError(asked, problem, "Correct the sizes")
    parts = [part for part in sizes if part in members]
    first = members[parts[0]].spec
    width = first.out_features
    specs = [replace(members[part].spec, out_features=width) for part in parts]
    check_alike(specs, [repr(spec.name) for spec in specs], asked)
    fused = _resized(first, name, sum(sizes.values()))
    fused = fused.at(name, fused.weight, _further_names(specs, name))
    terms = []
    for part in parts:
        spec, slices = members[part].spec, Slices(tuple(sizes.items()), (part,))
        numbers = {"rank": spec.rank, "alpha": spec.alpha, "scaling": spec.scaling}
        whole = replace(fused, slices=slices, **numbers)  # type: ignore[arg-type]
        terms.append((SiteState.of(whole, members[part].tensors), 1.0))
    return total(terms, fused)


def turned(site: SiteState) -> SiteState:
    """Return the same update of the same tensor, seen the other way round."""
    spec = site.spec
    if spec.slices is not None:
        problem = "its slices would be some of its inputs"
        raise StateError(f"turn site '{spec.name}'", problem, "Split its slices first")
    n_in, n_out = spec.out_features, spec.in_features
    made = replace(spec, in_features=n_in, out_features=n_out, transposed=not spec.transposed)
    a0, b0 = (None if t is None else t.mT for t in (site.B0, site.A0))
    return SiteState(made, site.B.mT, site.A.mT, a0, b0)


def split_stack(site: SiteState) -> dict[str, SiteState]:
    """Return the experts of a stack as sites on layers: `experts.up` as `experts.0.up` and so on.

    The matrix of each lies as in the stack: as a linear layer has it, or, `(in, out)`, a Conv1D.
    """
    spec = site.spec
    sites = {}
    for place, expert in enumerate(_chosen(spec)):
        name = joined(parent(spec.name), f"{expert}.{leaf(spec.name)}")
        made = replace(
            renamed(spec, name),
            weight=f"{name}.weight",
            kind="conv1d" if spec.transposed else "linear",
            weight_shape=spec.weight_shape[1:],
            experts=None,
            only=None,
            share="",
            update="forward",
        )
        own = {r: t[0 if spec.share == r[0] else place] for r, t in site.tensors.items()}
        sites[name] = SiteState.of(made, own)
    return sites


def _chosen(spec: SiteSpec) -> Sequence[int]:
    """Return the numbers of the experts of a stack that are adapted."""
    return spec.only or range(spec.experts or 0)


def matrices_of(
    site: SiteState, names: Sequence[Sequence[str]], asked: str
) -> dict[str, SiteState]:
    """Return sites on the matrices of a stack that files keep apart, by the names of their weights.

    `names` has for each expert those that lie one above the other in the stack. They are Linear
    layers' matrices, which lie as in the stack, whatever its adapter calls in.
    """
    site = turned(site) if site.spec.transposed else site
    made: dict[str, SiteState] = {}
    for number, expert in zip(_chosen(site.spec), split_stack(site).values(), strict=True):
        width = expert.spec.out_features // len(names[number])
        sizes = {str(part): width for part in range(len(names[number]))}
        parts = split_site(expert, sizes, asked) if len(sizes) > 1 else {"0": expert}
        for part, one in parts.items():
            weight = names[number][int(leaf(part))]
            spec = one.spec.at(weight.removesuffix(".weight"), weight)
            made[weight] = one.at(spec)
    return made


def join_stack(name: str, members: Mapping[int, SiteState], n: int, asked: str) -> SiteState:
    """Return one site on a stack of experts from the sites on them, zeros for missing ones.

    The new site has the scale of the first member; the B of others is multiplied to fit it.
    """
    specs = [site.spec for site in members.values()]
    first = specs[0]
    _check_members(specs, f"{asked}, site '{name}'")
    dtype = reduce(torch.promote_types, (site.A.dtype for site in members.values()))
    if any(spec.scale != first.scale for spec in specs):
        dtype = torch.promote_types(dtype, torch.float32)
    like = replace(
        first,
        name=name,
        weight=name,
        kind="parameter",
        weight_shape=(n, *first.weight_shape),
        experts=n,
        scaling="standard",
        update="weight",
        aliases=_further_names(specs, name),
    )
    of_each = {e: gathered([(site, 1.0)], dtype, first.scale) for e, site in members.items()}
    rank = max(left.shape[2] for parts in of_each.values() for _, left, _ in parts)
    parts = []
    for i, (span, left, right) in enumerate(next(iter(of_each.values()))):
        lefts = left.new_zeros(n, left.shape[1], rank)
        rights = right.new_zeros(n, rank, right.shape[2])
        for expert, its in of_each.items():
            _, (b,), (a,) = its[i]
            lefts[expert, :, : b.shape[1]], rights[expert, : a.shape[0]] = b, a
        parts.append((span, lefts, rights))
    return site_of(parts, like, first.scale)


def _check_members(specs: Sequence[SiteSpec], asked: str) -> None:
    check_alike(specs, [repr(spec.name) for spec in specs], asked)
    alike = len({(spec.kind, spec.slices) for spec in specs}) == 1
    if not alike or specs[0].kind not in {"linear", "conv1d"}:
        problem = "its experts are not all plain linear layers with the same slices"
        raise StateError(asked, problem, "Join the layers of each expert first")

"""Make the site of a rule: its orientation, slices and rank, and notes for the user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lora_inject.core.spec.config import HYPER, Active, Axes, Normal, Rule
from lora_inject.core.spec.inventory import Candidate
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import FROM_WEIGHT, ROLES, Geometry, SiteSpec, Slices
from lora_inject.errors import MatchError, article

BIASED_KINDS = ("linear", "conv1d", "conv")
SLICED_KINDS = ("linear", "conv1d", "parameter")


def site_of_rule(candidate: Candidate, rule: Rule, i: int, asked: str) -> SiteSpec:
    """Make the site that rule `i` asks for, or refuse a layout, slices or rank that do not fit.

    `rule` has the config's values filled in.
    """
    numbers = {key: getattr(rule, key) for key in HYPER}
    if isinstance(rule.init, Normal):
        numbers["init"] = ("normal", rule.init.normal)
    if isinstance(rule.rank, Active):
        numbers["rank"] = room("mixtures").rank_of_each(candidate, rule.rank.active, asked)
    if rule.only is not None or rule.share is not None:
        numbers |= room("mixtures").part_of_stack(candidate, rule, asked)
    shape = _oriented(candidate, rule, asked)
    slices = _sliced(candidate, shape, rule, asked)
    site = SiteSpec(
        name=candidate.name,
        kind=candidate.kind,
        slices=slices,
        rule=i,
        weight=candidate.weight,
        update=candidate.update,
        aliases=candidate.aliases,
        **shape._asdict(),
        **numbers,
    )
    for reason in _why_not(site):
        raise MatchError(asked, *reason)
    return site


def _why_not(site: SiteSpec) -> Iterator[tuple[str, str]]:
    """Yield which of a rule's values a site cannot have, and what to give instead."""
    if site.update == "weight" and site.dropout:
        problem = f"dropout {site.dropout:g} on a weight that is read, not called with inputs"
        yield problem, "Give the rule dropout: 0"
    if site.lora_bias and (site.slices or site.variant != "lora" or site.kind not in BIASED_KINDS):
        what = f"variant {site.variant}" if site.variant != "lora" else article(site.kind)
        yield f"lora_bias on {'slices' if site.slices else what}", "Give the rule lora_bias: false"
    if ROLES[site.variant].gained and site.why_no_gain:
        yield f"variant {site.variant} on {site.why_no_gain}", "Give the rule variant: lora"
    if site.init in FROM_WEIGHT and site.rank > (most := _limit(site)):
        problem = f"init {site.init} with rank {site.rank}, but W has a rank of at most {most}"
        yield problem, f"Give the rule rank: {most}, or another init"


def _limit(site: SiteSpec) -> int:
    """Return the smallest side of the matrices that B @ A updates."""
    return min(site.in_features, *(stop - start for start, stop in site.spans))


def _oriented(candidate: Candidate, rule: Rule, asked: str) -> Geometry:
    """Return which dimensions are the input; a rule may say it of a parameter."""
    known, dims = candidate.geometry, candidate.weight_shape
    if rule.layout is None:
        if candidate.needs_layout:
            problem = f"a stack of {known.experts:,} matrices, {dims[-2]:,} x {dims[-1]:,}"
            remedy = (
                "Say with layout: out_in (x @ W.T, as Mixtral) or in_out (x @ W, as Llama 4) which "
                "side is the input; or give the axes of one matrix, such as {in: [0], out: [1, 2]}"
            )
            raise MatchError(asked, problem, remedy)
        return known
    if candidate.kind != "parameter" or (len(dims) > 2 and candidate.experts is None):
        problem = f"a layout, but a {candidate.kind} of shape {dims} has its own"
        raise MatchError(asked, problem, "Remove layout; it is for parameters")
    shape = _laid_out(dims, rule, asked)
    if candidate.experts is not None and not candidate.needs_layout and shape != known:
        stated = "in_out" if known.transposed else "out_in"
        problem = f"a layout other than {stated}, which is the one that its class states"
        raise MatchError(asked, problem, "Remove layout")
    return shape


def _laid_out(dims: tuple[int, ...], rule: Rule, asked: str) -> Geometry:
    """Return the matrices that a rule's layout makes of a shape, in memory order."""
    n, layout = len(dims), rule.layout
    if isinstance(layout, Axes):
        n_in, n_out = layout.in_, layout.out
    else:
        n_in, n_out = ((n - 2,), (n - 1,)) if layout == "in_out" else ((n - 1,), (n - 2,))
    stack = tuple(axis for axis in range(n) if axis not in (*n_in, *n_out))
    order = tuple(range(n))
    if order not in ((*stack, *n_out, *n_in), (*stack, *n_in, *n_out)):
        problem = f"a layout of in {[*n_in]} and out {[*n_out]}, but the shape is {dims}"
        remedy = "Give each axis once, in order: first what counts matrices, then in and out"
        raise MatchError(asked, problem, remedy)

    def size(axes: tuple[int, ...]) -> int:
        return math.prod(dims[axis] for axis in axes)

    transposed = order == (*stack, *n_in, *n_out)
    return Geometry(size(n_in), size(n_out), dims, transposed, size(stack) if stack else None)


def _sliced(candidate: Candidate, shape: Geometry, rule: Rule, asked: str) -> Slices | None:
    """Return the slices of a site, with their widths."""
    if rule.slices is None or rule.adapt is None:
        return None
    if candidate.kind not in SLICED_KINDS or shape.experts is not None:
        what = "a stack of matrices" if shape.experts else f"of kind {candidate.kind}"
        remedy = "Slices are for linear layers, Conv1D and 2-d parameters"
        raise MatchError(asked, f"slices, but it is {what}", remedy)
    names, sizes, width = rule.slice_names, rule.slice_widths, shape.out_features
    if not sizes:
        if width % len(names):
            problem = f"{len(names)} equal slices, but {width:,} outputs do not divide"
            raise MatchError(asked, problem, f"Give the widths: {{{names[0]}: ..., ...}}")
        sizes = tuple((name, width // len(names)) for name in names)
    total = sum(size for _, size in sizes)
    if total != width:
        listed = " + ".join(f"{size:,}" for _, size in sizes)
        problem = f"slices of {listed} = {total:,}, but it has {width:,} outputs"
        raise MatchError(asked, problem, "Give the widths along its output")
    return Slices(sizes, tuple(name for name in names if name in rule.adapt))


def notes(candidates: Sequence[Candidate], sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield notes about the sites for the user, in sentences."""
    wide = [site for site in sites if site.rank > _limit(site)]
    if wide:
        yield (
            f"the rank is above the smaller side of {_several(wide)}; a rank of that side can "
            "express every update"
        )
    above = [site for site in sites if site.n_parameters > math.prod(site.weight_shape)]
    if full := [site for site in above if site.rank <= _limit(site)]:
        yield f"A and B have more elements than W at {_several(full)}"
    pairs = zip(candidates, sites, strict=True)
    read = (c for c, site in pairs if site.update == "weight" and site.compute == "base")
    if rounded := [c.dtype for c in read if c.dtype in ("bfloat16", "float16")]:
        yield (
            f"{counted(len(rounded), 'weight update')} over {rounded[0]}: W + delta is rounded on "
            "every read; compute: float32 keeps small deltas"
        )


def _several(sites: Sequence[SiteSpec]) -> str:
    first = f"'{sites[0].name}' ({sites[0].in_features:,} -> {sites[0].out_features:,})"
    return first if len(sites) == 1 else f"{len(sites):,} sites, first {first}"

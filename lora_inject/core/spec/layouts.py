"""What a rule makes of one weight: its sides, parts and experts; and what it may not ask of it."""

from __future__ import annotations

import math
from typing import Any

from lora_inject.core.spec.config import Axes, Rule
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import quoted, templates
from lora_inject.core.spec.sites import FROM_WEIGHT, Geometry, SiteSpec, Slices
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import MatchError, article

SLICED_KINDS = ("linear", "conv1d", "parameter")


def oriented(candidate: Candidate, rule: Rule, asked: str) -> Geometry:
    """Return which dimensions are the input; a rule may say it of a parameter."""
    known = candidate.geometry
    dims = candidate.weight_shape
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
    n = len(dims)
    layout = rule.layout
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


def sliced(candidate: Candidate, shape: Geometry, rule: Rule, asked: str) -> Slices | None:
    """Return the slices of a site, with their widths.

    1. Only one matrix is cut, along its output.
    2. Where a rule names no widths, the parts are equal.
    3. The parts fill the output.
    """
    if rule.slices is None or rule.adapt is None:
        return None
    if candidate.kind not in SLICED_KINDS or shape.experts is not None:
        what = "a stack of matrices" if shape.experts else f"of kind {candidate.kind}"
        remedy = "Slices are for linear layers, Conv1D and 2-d parameters"
        raise MatchError(asked, f"slices, but it is {what}", remedy)
    sizes, width = rule.widths, shape.out_features
    if not all(sizes.values()):
        each, rest = divmod(width, len(sizes))
        if rest:
            problem = f"{len(sizes)} equal slices, but {width:,} outputs do not divide"
            raise MatchError(asked, problem, f"Give the widths: {{{next(iter(sizes))}: ..., ...}}")
        sizes = dict.fromkeys(sizes, each)
    total = sum(sizes.values())
    if total != width:
        listed = " + ".join(f"{size:,}" for size in sizes.values())
        problem = f"slices of {listed} = {total:,}, but it has {width:,} outputs"
        raise MatchError(asked, problem, "Give the widths along its output")
    return Slices(tuple(sizes.items()), tuple(name for name in sizes if name in rule.adapt))


# ----------------------------------------------------------------------------------------- experts


def rank_of_each(candidate: Candidate, together: int, asked: str) -> int:
    """Return the rank of an expert, where those that a token goes to have one together.

    It is the whole part, as Megatron-Bridge and NeMo Automodel divide.

    Raises:
        MatchError: Nobody says to how many a token goes, or the rank is less than that.
    """
    wanted = f"rank: {{active: {together}}}"
    if candidate.active is None:
        problem = f"{wanted}, but the model does not say to how many experts its tokens go"
        remedy = "Give the rule a rank; {active: ...} is for experts beside a router with top_k"
        raise MatchError(asked, problem, remedy)
    if together < candidate.active:
        problem = f"{wanted}, but a token goes to {candidate.active} experts"
        remedy = f"Give active: {candidate.active} or more: it is divided by that"
        raise MatchError(asked, problem, remedy)
    return together // candidate.active


def part_of_stack(candidate: Candidate, rule: Rule, asked: str) -> dict[str, Any]:
    """Return which experts of a stack a rule adapts, and what they share.

    Raises:
        MatchError: It is no stack, or has no such expert.
    """
    n = candidate.experts
    wanted = "share" if rule.only is None else "only"
    if n is None:
        problem = f"{wanted}, but it is {article(candidate.kind)} of its own"
        remedy = r"It is for stacks; match single experts by name, such as experts\.(0|3)\..*"
        raise MatchError(asked, problem, remedy)
    if rule.share is not None and rule.init in FROM_WEIGHT:
        problem = f"share, and init {rule.init}, which starts each expert from its own weight"
        raise MatchError(asked, problem, "Give the rule another init")
    if rule.only is not None and max(rule.only) >= n:
        problem = f"only: {max(rule.only)}, but it has {n:,} experts, 0 to {n - 1:,}"
        raise MatchError(asked, problem, "Leave that number out")
    return {"only": rule.only and tuple(sorted(rule.only)), "share": rule.share or ""}


def why_no_experts(inventory: Inventory) -> tuple[str, str]:
    """Return what was found, and what to do, where `all-experts` means nothing."""
    stacks = [c.name for c in inventory.candidates if c.experts is not None]
    there = f"; it has {quoted([*templates(stacks)][:3])}" if stacks else ""
    problem = f"the model has no experts that a router chooses among{there}"
    remedy = (
        "Name the stack by a pattern. Experts are known by transformers' class, or by a router "
        "beside them with an output for each, in a block that states top_k"
    )
    return problem, remedy


# ------------------------------------------------------------------------- what a site cannot have


def why_no_gain(site: SiteSpec) -> str:
    """Return why the outputs of a site cannot have a gain, or ""."""
    if site.experts is not None:
        return f"a stack of {site.experts:,} matrices"
    if site.kind == "conv_transpose":
        return "a transposed convolution, whose outputs are not rows or columns of its weight"
    return ""


def check_allowed(site: SiteSpec, asked: str) -> None:
    """Refuse a value of a rule that a site cannot have."""
    if site.update == "weight" and site.dropout:
        problem = f"dropout {site.dropout:g} on a weight that is read, not called with inputs"
        raise MatchError(asked, problem, "Give the rule dropout: 0")
    if VARIANTS[site.variant].gained and (why := why_no_gain(site)):
        problem = f"variant {site.variant} on {why}"
        raise MatchError(asked, problem, "Give the rule variant: lora")
    if site.init in FROM_WEIGHT and site.rank > (most := narrow_side(site)):
        problem = f"init {site.init} with rank {site.rank}, but W has a rank of at most {most}"
        raise MatchError(asked, problem, f"Give the rule rank: {most}, or another init")


def narrow_side(site: SiteSpec) -> int:
    """Return the smallest side of the matrices that B @ A updates."""
    return min(site.in_features, *(stop - start for start, stop in site.spans))

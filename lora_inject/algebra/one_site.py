"""Truncate the update of one site, compare two, and refuse one that is not a product of A and B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch

from lora_inject.algebra.svd import thin_svd
from lora_inject.core.adapter.parts import Term, gathered, site_of
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.tables import Figures
from lora_inject.errors import StateError

_ROUNDED = 1e-13  # relative distance of two equal updates by rounding


class Cut(NamedTuple):
    """What truncation did to one site.

    Attributes:
        before: Its rank before.
        rank: Its rank now.
        error: `|D - D_truncated| / |D|` in Frobenius norm, before rounding to the adapter's dtype.
    """

    before: int
    rank: int
    error: float


def truncated(
    site: SiteState,
    rank: int | None,
    energy: float | None,
    asked: str,
    dtype: torch.dtype | None = None,
) -> tuple[SiteState, Cut]:
    """Return the best site of a lower rank, by a QR of the thin factors and an SVD of k by k.

    All parts of a site get one rank: the smallest that keeps `energy` of the site's sum of squares,
    at most `rank`, and at most the rank of the update. `dtype` is by default that of A.
    """
    plain(site, asked, bias=True)
    parts = gathered([(site, 1.0)])
    svds = [thin_svd(left, right) for _, left, right in parts]
    largest = max(S.shape[-1] for _, S, _ in svds)
    squares = torch.zeros(largest, dtype=torch.float64, device="cpu")
    for _, S, _ in svds:
        squares[: S.shape[-1]] += S.square().sum(0).cpu()
    rest = squares.flip(0).cumsum(0).flip(0)  # what a cut in front of each leaves out
    whole = float(rest[0])
    best = max(1, int(squares.count_nonzero()))
    if rank is not None:
        best = min(best, rank)
    if energy is not None and whole:
        # What is below the rounding of A and B is no part of the update.
        noise = (4 * torch.finfo(torch.promote_types(site.A.dtype, torch.float32)).eps) ** 2
        enough = (rest <= (1 - energy + noise) * whole).nonzero()
        best = min(best, max(1, int(enough[0])) if len(enough) else best)
    error = math.sqrt(float(squares[best:].sum()) / whole) if whole else 0.0
    thin = []
    for (span, _, _), (U, S, V) in zip(parts, svds, strict=True):
        root = S[:, None, :best].sqrt()
        left, right = ((m[..., :best] * root).to(dtype or site.A.dtype) for m in (U, V))
        thin.append((span, left, right.mT))
    made = site_of(thin, replace(site.spec, scaling="standard"), 1.0, [(site, 1.0)])
    return made, Cut(site.spec.rank, best, error)


@dataclass(frozen=True)
class SiteDifference(Figures):
    """One site in two adapters: ranks and Frobenius norms, 0 where an adapter lacks it.

    `distance` is the norm of the difference, `cosine` that of the angle, None where one is zero.
    """

    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float | None


def compared(one: SiteState | None, two: SiteState | None) -> SiteDifference:
    """Compare two sites, None for no update, in float64 and also where they nearly cancel."""
    ours, theirs = ([(site, 1.0)] if site is not None else [] for site in (one, two))
    first, second = _norm(ours), _norm(theirs)
    apart = _norm([*ours, *((site, -weight) for site, weight in theirs)])
    if apart <= _ROUNDED * max(first, second):
        apart = 0.0
    cosine = None
    if first and second:
        cosine = max(-1.0, min(1.0, _inner(ours, theirs) / (first * second)))
    ranks = one.spec.rank if one else 0, two.spec.rank if two else 0
    return SiteDifference(ranks, (first, second), apart, cosine)


def _norm(terms: Sequence[Term]) -> float:
    """Return the Frobenius norm of a sum of updates.

    A QR of the thin factors gives orthonormal bases in which the update is k by k.
    """
    square = 0.0
    for _, left, right in gathered(terms) if terms else ():
        R_l, R_r = (torch.linalg.qr(m, mode="r").R for m in (left, right.mT))
        square += float((R_l @ R_r.mT).square().sum())
    return math.sqrt(square)


def _inner(one: Sequence[Term], two: Sequence[Term]) -> float:
    """Return `<D1, D2>` of two updates, the sum over all elements.

    In bases that both have in common each is k by k, and rounded by its own size alone.
    """
    dot = 0.0
    for (span, left, right), (other, b, a) in product(gathered(one), gathered(two)):
        start, stop = max(span[0], other[0]), min(span[1], other[1])
        if start >= stop:
            continue
        mine, k = left[:, start - span[0] : stop - span[0]], left.shape[2]
        theirs = b[:, start - other[0] : stop - other[0]].to(left.device)
        R_l = torch.linalg.qr(torch.cat([mine, theirs], 2), mode="r").R
        R_r = torch.linalg.qr(torch.cat([right, a.to(left.device)], 1).mT, mode="r").R
        first = R_l[..., :k] @ R_r[..., :k].mT
        second = R_l[..., k:] @ R_r[..., k:].mT
        dot += float((first * second).sum())
    return dot


def plain(site: SiteState, asked: str, *, bias: bool = False) -> SiteState:
    """Refuse a site whose update is not a product of A and B alone, as DoRA's is not.

    A bias of B is accepted where the caller asks for it, if the site has no slices.
    """
    allowed = {"A", "B", "A0", "B0"} | ({"b"} if bias and site.spec.slices is None else set())
    further = sorted(set(site.tensors) - allowed)
    if further or site.spec.variant != "lora":
        raise StateError(
            f"{asked}, site '{site.spec.name}'",
            f"its update is not B @ A alone (variant {site.spec.variant}, with {further})",
            "Merge it into the base instead: merge(model), or `lora-inject merge`",
        )
    return site

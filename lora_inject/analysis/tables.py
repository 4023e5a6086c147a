"""The rows of an analysis: what the terminal prints and what the report shows, written once."""

from __future__ import annotations

import math
from operator import attrgetter
from statistics import median

from lora_inject.analysis.blocks import SHARES, Place, by_kind
from lora_inject.analysis.figures import Analysis
from lora_inject.analysis.subspaces import Comparison
from lora_inject.core.spec.tables import Listing, number, span


def percent(share: float) -> str:
    """Return a share in percent: `0.99` as `99%`."""
    return f"{share * 100:.3g}%" if math.isfinite(share) else number(share)


def kind_rows(analysis: Analysis) -> Listing:
    """Return the needed ranks of each kind of site: the median, and the largest."""
    rows = []
    for kind, blocks in by_kind(analysis.blocks).items():
        spectra = [block.spectrum for block in blocks]
        needed = zip(*(s.needed.values() for s in spectra), strict=True)
        ranks = (f"{median(each):g} (max {max(each)})" for each in needed)
        means = median(s.stable_rank for s in spectra), median(s.effective_rank for s in spectra)
        rows.append((kind, len(blocks), span(b.rank for b in blocks), *ranks, *means))
    heads = ("kind", "blocks", "rank", *map(percent, SHARES), "stable", "effective")
    return Listing(heads, tuple(rows))


def block_rows(analysis: Analysis) -> Listing:
    """Return the size and the needed ranks of the delta of each block."""
    figures = attrgetter("norm", "first_share", "stable_rank", "effective_rank")
    blocks = ((b.name, b.rank, b.spectrum) for b in analysis.blocks)
    rows = ((n, rank, *figures(s), *map(float, s.needed.values())) for n, rank, s in blocks)
    heads = ("block", "rank", "|D|", "first", "stable", "effective", *map(percent, SHARES))
    return Listing(heads, tuple(rows))


def weight_rows(analysis: Analysis) -> Listing:
    """Return how each block compares with the weight that it updates."""
    of_w = "of_delta", "of_weight", "of_random_expected", "factor"
    figures = attrgetter("weight_norm", "relative", "rank", *of_w)
    rows = ((Place(b.tensor, b.label).name, *figures(b.norms)) for b in analysis.on_weight())
    heads = ("tensor", "|W|", "|D|/|W|", "r", "|U'WV|", "W's own", "random", "amplification")
    return Listing(heads, tuple(rows))


def rounding_rows(analysis: Analysis) -> Listing:
    """Return the part of each delta that each format keeps, and the error."""
    sites = analysis.weights
    formats = next(iter(sites.values())).rounded if sites else ()
    rows = tuple(
        (name, site.stored, *((r.kept, r.error) for r in site.rounded.values()))
        for name, site in sites.items()
    )
    return Listing(("kept (error) after merging in", "stored", *formats), rows)


def comparison_rows(compared: Comparison) -> Listing:
    """Return how far the subspaces of two adapters agree, for each block."""
    rows = []
    for pair in compared.pairs:
        sides = ((s.first, s.whole, s.whole_by_chance) for s in (pair.right, pair.left))
        ranks = ", ".join(map(str, pair.ranks))
        rows.append((pair.name, ranks, *(value for side in sides for value in side)))
    heads = (f"{side}: {what}" for side in "AB" for what in ("phi(1,1)", "whole", "chance"))
    return Listing(("block", "ranks", *heads), tuple(rows))

"""The rows of an analysis: what the terminal prints and what the report shows, written once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

from lora_inject.analysis.blocks import Place, by_kind
from lora_inject.analysis.comparison import Comparison
from lora_inject.analysis.figures import Analysis
from lora_inject.analysis.spectra import SHARES
from lora_inject.spec.columns import Rows, number


def percent(share: float) -> str:
    """Return a share in percent: `0.99` as `99%`."""
    return f"{share * 100:.3g}%" if math.isfinite(share) else number(share)


def span(values: Iterable[float]) -> str:
    """Return the range of some numbers: `8`, or `4 to 16`."""
    ends = sorted(set(values))
    return "-" if not ends else f"{ends[0]:g}" + (f" to {ends[-1]:g}" if len(ends) > 1 else "")


def kind_rows(analysis: Analysis) -> Rows:
    """Say for each kind of site what rank it needed: the median, and the largest."""
    rows: list[tuple[Any, ...]] = []
    for kind, blocks in by_kind(analysis.blocks).items():
        needed = zip(*(b.spectrum.needed.values() for b in blocks), strict=True)
        rows.append(
            (
                kind,
                len(blocks),
                span(b.rank for b in blocks),
                *(f"{median(each):g} (max {max(each)})" for each in needed),
                median(b.spectrum.stable_rank for b in blocks),
                median(b.spectrum.effective_rank for b in blocks),
            )
        )
    heads = ("kind", "blocks", "rank", *map(percent, SHARES), "stable", "effective")
    return Rows(heads, tuple(rows))


def block_rows(analysis: Analysis) -> Rows:
    """Say for each block how large its delta is and what rank it needed."""
    rows = tuple(
        (
            b.name,
            b.rank,
            b.spectrum.norm,
            b.spectrum.first_share,
            b.spectrum.stable_rank,
            b.spectrum.effective_rank,
            *map(float, b.spectrum.needed.values()),
        )
        for b in analysis.blocks
    )
    heads = ("block", "rank", "|D|", "first", "stable", "effective", *map(percent, SHARES))
    return Rows(heads, rows)


def weight_rows(analysis: Analysis) -> Rows:
    """Say for each block how it compares with the weight that it updates."""
    rows = tuple(
        (
            Place(block.tensor, block.label).name,
            block.norms.weight_norm,
            block.norms.relative,
            block.norms.rank,
            block.norms.of_delta,
            block.norms.of_weight,
            block.norms.of_random_expected,
            block.norms.factor,
        )
        for block in analysis.on_weight()
    )
    heads = ("tensor", "|W|", "|D|/|W|", "r", "|U'WV|", "W's own", "random", "amplification")
    return Rows(heads, rows)


def rounding_rows(analysis: Analysis) -> Rows:
    """Say for each site what each format keeps of the delta, and its error."""
    found = analysis.weights
    formats = next(iter(found.values())).rounded if found else ()
    rows = tuple(
        (site, beside.stored, *((r.kept, r.error) for r in beside.rounded.values()))
        for site, beside in found.items()
    )
    return Rows(("kept (error) after merging in", "stored", *formats), rows)


def comparison_rows(compared: Comparison) -> Rows:
    """Say for each block of two adapters how far their subspaces agree."""
    rows = tuple(
        (
            pair.name,
            f"{pair.ranks[0]}, {pair.ranks[1]}",
            *(
                value
                for side in (pair.right, pair.left)
                for value in (side.first, side.whole, side.whole_by_chance)
            ),
        )
        for pair in compared.pairs
    )
    sides = (f"{side}: {what}" for side in "AB" for what in ("phi(1,1)", "whole", "chance"))
    return Rows(("block", "ranks", *sides), rows)

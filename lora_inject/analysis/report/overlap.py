"""The report's sections on subspaces: layers of one adapter, and two adapters.

Phi is drawn as a picture of one pixel for each number, on the paper's scale from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lora_inject.analysis.comparison import Comparison, Overlap, Pair
from lora_inject.analysis.gallery import spread
from lora_inject.analysis.report.heat import Cell, heat_map, kind_label
from lora_inject.analysis.report.page import Html, element, folded, grid, section, table
from lora_inject.analysis.report.png import data_uri
from lora_inject.analysis.report.wording import number

Across = Mapping[str, tuple[list[str], Tensor]]
"""What `comparison.across_layers` returns."""


def layers_section(across: Across) -> Html:
    """Return the section that compares the layers of one adapter."""
    cards = [
        element(
            "div", kind_label(kind), _image(phi, f"phi between layers of {kind}"), class_="card"
        )
        for kind, (_, phi) in across.items()
    ]
    about = (
        "Phi between the whole spans of A, layer by layer: dark is 0, light is 1. A light "
        "diagonal on a dark ground says that every layer reads directions of its own."
    )
    return section("Across layers", about, grid(cards, "small"))


def comparison_section(comparison: Comparison, other: str) -> Html:
    """Return the section that compares the adapter with another one."""
    pairs = comparison.pairs
    measures: list[tuple[str, Callable[[Pair], float]]] = [
        ("Side of A: phi(1, 1)", lambda p: p.right.first),
        ("Side of A: phi of the whole spans", lambda p: p.right.whole),
        ("Side of B: phi(1, 1)", lambda p: p.left.first),
        ("Side of B: phi of the whole spans", lambda p: p.left.whole),
    ]
    maps = [
        heat_map(title, [Cell(p.place, value(p), p.name) for p in pairs], number, 0.0, 1.0)
        for title, value in measures
    ]
    drawn = [
        element(
            "div",
            element("div", pair.name, class_="kind"),
            _image(pair.right.phi, f"phi of {pair.name}, side of A"),
            element("div", _said(pair.right), class_="caption"),
            class_="card",
        )
        for pair in _spread(pairs)
    ]
    rows = [
        (p.name, f"{p.ranks[0]}, {p.ranks[1]}", *_numbers(p.right), *_numbers(p.left))
        for p in pairs
    ]
    sides = [f"{side}: {what}" for side in "AB" for what in ("phi(1, 1)", "whole", "by chance")]
    shown = table(["block", "ranks", *sides], rows)
    about = (
        f"Phi(i, j) with {other}: i of this adapter's directions downwards, j of the other's to "
        "the right; dark is 0, light is 1. Random directions would give max(i, j) / d."
    )
    return section(
        "Beside another adapter",
        about,
        grid(maps),
        element("h3", "Phi on the side of A"),
        grid(drawn, "small"),
        folded(f"{len(rows):,} blocks", shown),
    )


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Take up to four pairs of each kind, evenly spaced from the first layer to the last."""
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.right.phi.numel():
            kinds.setdefault(pair.place.kind, []).append(pair)
    return [pair for row in kinds.values() for pair in spread(row)]


def _image(phi: Tensor, about: str) -> Html:
    return element("img", class_="phi", src=data_uri(phi), alt=about) if phi.numel() else Html("")


def _said(overlap: Overlap) -> str:
    chance = number(overlap.whole_by_chance)
    return f"(1, 1): {number(overlap.first)}, whole: {number(overlap.whole)}, chance: {chance}"


def _numbers(overlap: Overlap) -> tuple[str, ...]:
    found = (overlap.first, overlap.whole, overlap.whole_by_chance)
    return tuple(number(value) for value in found)

"""The pictures of an adapter, as files in a folder: which ones, and of which layers.

As in the paper, a picture shows one kind of site at up to four layers from the first to
the last. One adapter gives its spectra and its layers compared; a second one figure 3 or 6
where the ranks differ, figure 4 or 7 where they do not; a base figure 8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis.comparison import Comparison, Pair, across_layers
from lora_inject.analysis.pictures import (
    Panel,
    draw_panels,
    figure_ranks,
    figure_seeds,
    figure_spectra,
    figure_weight,
)
from lora_inject.analysis.places import full_name, place_of
from lora_inject.analysis.spectra import spectrum_of
from lora_inject.analysis.subspaces import gaussian_similarity, similarity
from lora_inject.analysis.thin import site_blocks
from lora_inject.analysis.weights import Weights

MOST_LAYERS = 4
WEIGHT_DIRECTIONS = 128
MOST_BLOCKS = 4
T = TypeVar("T")


def draw_gallery(
    folder: str | os.PathLike[str],
    state: AdapterState,
    *,
    comparison: Comparison | None = None,
    weights: Weights | None = None,
) -> list[Path]:
    """Draw all pictures that the adapter gives.

    Args:
        folder: Where to; made as needed, files of the same names are replaced.
        state: The adapter.
        comparison: It compared with another one, from `compare`.
        weights: Its base.

    Returns:
        The files.

    Raises:
        StateError: matplotlib is not installed, or the adapter has no directions at all.
    """
    place = Path(folder)
    drawn = [_spectra(place, state)]
    drawn += _layers(place, state)
    if comparison is not None:
        drawn += _pairs(place, comparison)
    if weights is not None:
        drawn += _weights(place, state, weights)
    return drawn


def spread(items: Sequence[T], most: int = MOST_LAYERS) -> list[T]:
    """Take up to `most` items, evenly spaced from the first to the last.

    Examples:
        >>> spread(range(96)), spread("ab")
        ([0, 31, 63, 95], ['a', 'b'])
    """
    n = min(most, len(items))
    return [items[i * (len(items) - 1) // max(1, n - 1)] for i in range(n)]


def _spectra(place: Path, state: AdapterState) -> Path:
    """Draw the middle layer of each kind."""
    kinds: dict[str, list[tuple[str, Tensor]]] = {}
    for name, site in state.sites.items():
        for block in site_blocks(site):
            values = spectrum_of(block.delta).values
            row = kinds.setdefault(place_of(name, block.label).kind, [])
            row.append((full_name(name, block.label), values))
    middle = dict(row[len(row) // 2] for row in kinds.values())
    return figure_spectra(middle, place / "spectra.png")


def _layers(place: Path, state: AdapterState) -> list[Path]:
    """Draw phi between the layers of each kind."""
    drawn = []
    for kind, (_, phi) in across_layers(state).items():
        panel = Panel(phi, "", "layer, from 1", "layer, from 1")
        drawn.append(draw_panels([[panel]], place / f"layers-{_slug(kind)}.png", kind))
    return drawn


def _pairs(place: Path, comparison: Comparison) -> list[Path]:
    kinds: dict[str, list[Pair]] = {}
    for pair in comparison.pairs:
        if pair.right.phi.numel():
            kinds.setdefault(pair.place.kind, []).append(pair)
    return [_pair_figure(place, kind, spread(row)) for kind, row in kinds.items()]


def _pair_figure(place: Path, kind: str, pairs: Sequence[Pair]) -> Path:
    grids = {_title(pair): pair.right.phi for pair in pairs}
    first, second = pairs[0].ranks
    if any(one != two for one, two in (pair.ranks for pair in pairs)):
        mixed = len({pair.ranks for pair in pairs}) > 1
        labels = ("i", "j") if mixed else (f"i (r={first})", f"j (r={second})")
        return figure_ranks(grids, place / f"ranks-{_slug(kind)}.png", labels, title=kind)
    baseline = gaussian_similarity(first, second, pairs[0].right.dim)
    return figure_seeds(grids, place / f"seeds-{_slug(kind)}.png", baseline, title=kind)


def _weights(place: Path, state: AdapterState, weights: Weights) -> list[Path]:
    """Draw the middle layer of each kind compared with its W."""
    kinds: dict[str, list[str]] = {}
    for name in state.sites:
        kinds.setdefault(place_of(name).kind, []).append(name)
    drawn = []
    for kind, names in kinds.items():
        site = names[len(names) // 2]
        grids, rank = {}, 0
        for block, own in weights.directions(site, WEIGHT_DIRECTIONS)[:MOST_BLOCKS]:
            _, _, V = block.delta.svd()
            if V.shape[1]:
                grids[block.label or "delta"] = similarity(own, V)
                rank, n, dim = V.shape[1], own.shape[1], own.shape[0]
        if grids:
            baseline = gaussian_similarity(n, rank, dim)
            path = place / f"weight-{_slug(kind)}.png"
            drawn.append(figure_weight(grids, path, baseline, title=site))
    return drawn


def _title(pair: Pair) -> str:
    expert = f", {pair.label}" if pair.label.startswith("expert") else ""
    return f"layer {pair.place.at}{expert}"


def _slug(kind: str) -> str:
    """Return a kind as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", kind.replace("*", "")).strip("-") or "site"

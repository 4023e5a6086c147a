"""The pictures of an adapter, as files in a folder: which ones, and of which layers.

As in the paper, a picture shows one kind of site at up to four layers from the first to the last.
One adapter gives its spectra and its layers compared; a second one figure 3 or 6 where the ranks
differ, figure 4 or 7 where they do not; a base figure 8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_inject.analysis.blocks import Place, by_kind, site_blocks, spectrum
from lora_inject.analysis.drawings import (
    draw_similarity,
    draw_spectra,
    evenly_spaced,
    png,
    similarity_figure,
)
from lora_inject.analysis.subspaces import (
    Comparison,
    Pair,
    across_layers,
    gaussian_similarity,
    similarity,
)
from lora_inject.analysis.weights import Weights
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import user_path

WEIGHT_DIRECTIONS = 128
MOST_BLOCKS = 4
LAYERS = ("layer", "layer")  # what rows and columns of layers compared are


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
    place = user_path("draw gallery, folder", folder)
    kinds = by_kind(b for site in state.sites.values() for b in site_blocks(site))
    middle = (blocks[len(blocks) // 2] for blocks in kinds.values())
    spectra = {block.name: spectrum(block.delta).values for block in middle}
    drawn = [draw_spectra(spectra, place / "spectra.png")]
    for kind, (names, phi) in across_layers(state).items():
        figure = similarity_figure([("", phi)], LAYERS, title=kind, counted=layer_names(names))
        drawn.append(png(figure, place / f"layers-{_slug(kind)}.png"))
    if comparison is not None:
        for kind, pairs in comparable(comparison).items():
            name, options = _pair_figure(pairs)
            grids = {_title(pair): pair.right.phi for pair in pairs}
            path = place / f"{name}-{_slug(kind)}.png"
            drawn.append(draw_similarity(grids, path, title=kind, **options))
    if weights is not None:
        drawn += _on_weight(place, state, weights)
    return drawn


def layer_names(names: Iterable[str]) -> list[str]:
    """Return the layer of each block, by its name."""
    return [Place(name.partition(" [")[0], "").at for name in names]


def comparable(comparison: Comparison) -> dict[str, list[Pair]]:
    """Return kind to its pairs of up to four layers; blocks without directions are left out."""
    kinds = by_kind(pair for pair in comparison.pairs if pair.right.phi.numel())
    return {kind: evenly_spaced(pairs) for kind, pairs in kinds.items()}


def _pair_figure(pairs: Sequence[Pair]) -> tuple[str, dict[str, Any]]:
    """Choose between the figure of two ranks and that of two seeds."""
    ranks = {pair.ranks for pair in pairs}
    first, second = pairs[0].ranks
    if all(one == two for one, two in ranks):
        return "seeds", {"baseline": gaussian_similarity(first, second, pairs[0].right.dim)}
    labels = ("i", "j") if len(ranks) > 1 else (f"i (r={first})", f"j (r={second})")
    return "ranks", {"labels": labels, "zoom": True}


def _on_weight(place: Path, state: AdapterState, weights: Weights) -> Iterator[Path]:
    """Draw the middle layer of each kind compared with its W."""
    for kind, sites in by_kind(Place(name, "") for name in state.sites).items():
        site = sites[len(sites) // 2].site
        grids, chance = {}, None
        for block, own in weights.directions(site, WEIGHT_DIRECTIONS)[:MOST_BLOCKS]:
            _, _, V = block.delta.svd()
            if V.shape[1]:
                grids[block.label or "delta"] = similarity(own, V)
                chance = gaussian_similarity(own.shape[1], V.shape[1], own.shape[0])
        if grids:
            path = place / f"weight-{_slug(kind)}.png"
            labels = ("i (W)", "j (delta)")
            yield draw_similarity(grids, path, labels=labels, baseline=chance, title=site)


def _title(pair: Pair) -> str:
    expert = f", {pair.label}" if pair.label.startswith("expert") else ""
    return f"layer {pair.at}{expert}"


def _slug(kind: str) -> str:
    """Return a kind as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", kind.replace("*", "")).strip("-") or "site"

"""Puts the figures of an adapter, its drawings and its tables into the page's template."""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from lora_inject.analysis import tables
from lora_inject.analysis.blocks import Place, by_kind
from lora_inject.analysis.drawings import (
    heat_map,
    lines_figure,
    need_matplotlib,
    ranks_figure,
    shared_prefix,
    similarity_figure,
    spectra_figure,
    svg,
)
from lora_inject.analysis.figures import Analysis, findings
from lora_inject.analysis.gallery import LAYERS, comparable, layer_names
from lora_inject.analysis.subspaces import Comparison, across_layers
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import write_file
from lora_inject.core.spec.names import templates
from lora_inject.core.spec.tables import number, span
from lora_inject.core.spec.words import printable
from lora_inject.errors import StateError, user_path
from lora_inject.version import __version__


def report(
    analysis: Analysis,
    state: AdapterState,
    title: str,
    *,
    comparison: Comparison | None = None,
    other: str = "the other adapter",
    date: dt.date | None = None,
) -> str:
    """Write the page about an adapter.

    Args:
        analysis: Its figures.
        state: The adapter itself.
        title: What to call it.
        comparison: The adapter compared with another one.
        other: What to call that one.
        date: The date at the top; today by default.

    Returns:
        HTML that loads nothing; every name in it is escaped.

    Raises:
        StateError: jinja2 or matplotlib is not installed.

    Examples:
        >>> import torch
        >>> from lora_inject.analysis.figures import analyze
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> state = AdapterState({"h.0.fc": SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))})
        >>> "<h1>mine &amp; yours</h1>" in report(analyze(state), state, "mine & yours")
        True
    """
    parts = {
        "title": title,
        "facts": _facts(analysis, state, date or dt.date.today()),
        "tiles": _tiles(analysis),
        "findings": [(f.serious, f, list(templates(f.names))) for f in findings(analysis)],
        "maps": list(_maps(analysis)),
        "kinds": tables.kind_rows(analysis),
        "rounding": list(_rounding(analysis)),
        "across": _across(state),
        "other": other,
        "blocks": tables.block_rows(analysis),
        "weights": tables.weight_rows(analysis) if analysis.weights else None,
        "rounded": tables.rounding_rows(analysis) if analysis.weights else None,
        "version": __version__,
    }
    parts |= _by_kind_and_depth(analysis)
    parts |= _comparison_parts(comparison)
    return str(template("page.html.j2").render(**parts))


def _by_kind_and_depth(analysis: Analysis) -> dict[str, Any]:
    """Return the figures of ranks, norms and singular values of the kinds of block."""
    kinds = by_kind(analysis.blocks)
    prefix = shared_prefix(kinds)
    ranks = ranks_figure([block.spectrum.rank_for(0.99) for block in analysis.blocks])
    norms = {
        kind.removeprefix(prefix): list(enumerate(block.spectrum.norm for block in blocks))
        for kind, blocks in kinds.items()
    }
    by_depth = lines_figure(norms, "blocks of a kind, in the order of the model", "|D|", bottom=0)
    spectra = []
    for kind, blocks in kinds.items():
        figure = spectra_figure([(b.at, b.spectrum.values) for b in blocks], "layer")
        spectra.append((kind, svg(figure, f"singular values of {kind}")))
    return {
        "prefix": prefix,
        "needed": svg(ranks, "number of blocks by the rank that holds 99%"),
        "norms": svg(by_depth, "norm of each delta by depth"),
        "spectra": spectra,
    }


def _across(state: AdapterState) -> list[Any]:
    return [
        _phi(kind, [("", phi)], f"phi between layers of {kind}", LAYERS, layer_names(names))
        for kind, (names, phi) in across_layers(state).items()
    ]


def _comparison_parts(comparison: Comparison | None) -> dict[str, Any]:
    """Return what the page says about another adapter; None and an empty list without one."""
    if comparison is None:
        return {"compared": None, "overlaps": [], "pairs": None}
    overlaps = []
    for kind, pairs in comparable(comparison).items():
        panels = [(f"layer {pair.at} {pair.label}".strip(), pair.right.phi) for pair in pairs]
        overlaps.append(_phi(kind, panels, f"phi of {kind}, side of A"))
    return {
        "compared": list(_compared(comparison)),
        "overlaps": overlaps,
        "pairs": tables.comparison_rows(comparison),
    }


def write_report(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page in one step; one that is there is replaced.

    Args:
        path: The file.
        text: From `report`.

    Returns:
        The file, symbolic links resolved.

    Raises:
        FormatError: The path is a directory.
    """
    return write_file(user_path("write report", path), text.encode(), overwrite=True)


def template(name: str) -> Any:
    """Return a template of this folder; a StateError says what is not installed."""
    need_matplotlib()
    try:
        import jinja2
    except ImportError:
        remedy = "Run pip install jinja2"
        raise StateError("write a report", "jinja2 is not installed", remedy) from None

    def finalize(value: Any) -> Any:
        return printable(value) if type(value) is str else value  # not what is HTML already

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _facts(analysis: Analysis, state: AdapterState, date: dt.date) -> list[tuple[str, str]]:
    """What the adapter is, at the top of the page."""
    sites = state.sites.values()
    n_lora = sum(site.A.numel() + site.B.numel() for site in sites)
    dtypes = sorted({str(site.A.dtype).removeprefix("torch.") for site in sites})
    trained = f"{len(state.trained):,} tensors"
    return [
        *((key, span(getattr(s.spec, key) for s in sites)) for key in ("rank", "alpha")),
        ("scale", span(site.scale for site in sites)),
        ("parameters", f"{n_lora:,} in A and B, {', '.join(dtypes)}"),
        *([("trained in full", trained)] if state.trained else ()),
        ("base", Path(analysis.base).name if analysis.base else "not given: the adapter alone"),
        ("date", date.isoformat()),
        ("targets", "\n".join(f"{name} \u00d7{n}" for name, n in templates(state.sites).items())),
    ]


def _tiles(analysis: Analysis) -> list[tuple[str, str]]:
    spectra = [block.spectrum for block in analysis.blocks]
    tiles = [
        (f"{analysis.n_sites:,}", "sites"),
        (f"{len(spectra):,}", "low-rank blocks"),
        (f"{median(s.rank_for(0.99) for s in spectra):g}", "rank that holds 99% (median)"),
        (number(median(s.effective_rank for s in spectra)), "effective rank (median)"),
    ]
    if analysis.weights:
        norms = [block.norms for block in analysis.on_weight()]
        tiles += [
            (tables.percent(_median(n.relative for n in norms)), "|D| / |W| (median)"),
            (number(_median(n.factor for n in norms)), "amplification (median)"),
        ]
    return tiles


def _median(values: Iterable[float]) -> float:
    finite = list(filter(math.isfinite, values))
    return median(finite) if finite else math.nan


def _maps(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Yield title and drawing of what differs by layer and kind."""
    blocks = [(block, block.spectrum) for block in analysis.blocks]
    if analysis.weights:
        on_weight = analysis.on_weight()
        yield _map("Size of the delta, |D| / |W|", [(b, b.norms.relative) for b in on_weight])
        yield _map("Amplification, |D| / |U'WV|", [(b, b.norms.factor) for b in on_weight])
    else:
        yield _map("Size of the delta, |D|", [(b, s.norm) for b, s in blocks])
    share = [(b, s.rank_for(0.99) / b.rank) for b, s in blocks]
    yield _map("Rank that holds 99%, over the configured rank", share, 1.0)
    yield _map("Effective rank", [(b, s.effective_rank) for b, s in blocks])
    first = [(b, s.first_share) for b, s in blocks]
    yield _map("Share of the energy in the first direction", first, 1.0)


def _rounding(analysis: Analysis) -> Iterator[tuple[str, str]]:
    for form in next(iter(analysis.weights.values())).rounded if analysis.weights else ():
        cells = [
            (Place(site, ""), of_site.rounded[form].likeness if of_site.changed else math.nan)
            for site, of_site in analysis.weights.items()
        ]
        yield _map(f"Likeness in {form}", cells, 1.0)


def _compared(comparison: Comparison) -> Iterator[tuple[str, str]]:
    for side, name in (("A", "right"), ("B", "left")):
        overlaps = [(pair, getattr(pair, name)) for pair in comparison.pairs]
        yield _map(f"Side of {side}: phi(1, 1)", [(p, o.first) for p, o in overlaps], 1.0)
        yield _map(
            f"Side of {side}: phi of the whole spans", [(p, o.whole) for p, o in overlaps], 1.0
        )


def _map(
    title: str, cells: Sequence[tuple[Place, float]], high: float | None = None
) -> tuple[str, str]:
    return title, svg(heat_map(cells, high), f"{title}, by kind of site and layer")


def _phi(
    kind: str,
    panels: Sequence[tuple[str, Tensor]],
    about: str,
    labels: tuple[str, str] = ("i", "j"),
    counted: Sequence[str] = (),
) -> tuple[str, str]:
    side = 2.3 if len(panels) > 1 else 3.0  # inches, so that two panels are as wide as the page
    figure = similarity_figure(panels, labels, columns=2, side=side, counted=counted)
    return kind, svg(figure, about)

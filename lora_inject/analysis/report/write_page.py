"""Puts the figures of an adapter, its drawings and its tables into the page's template."""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis import tables
from lora_inject.analysis.comparison import Comparison, Pair, across_layers
from lora_inject.analysis.figures import Analysis, BlockFigures
from lora_inject.analysis.findings import findings
from lora_inject.analysis.gallery import spread
from lora_inject.analysis.pictures import need_matplotlib
from lora_inject.analysis.places import place_of
from lora_inject.analysis.report import drawings
from lora_inject.analysis.report.drawings import Cell
from lora_inject.errors import StateError
from lora_inject.spec.names import printable, templates
from lora_inject.storage.atomic import write_file
from lora_inject.version import __version__

SERIOUS = frozenset({"inert", "loud", "overflow", "lost"})


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
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.state import SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> state = AdapterState({"h.0.fc": SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))})
        >>> "<h1>mine &amp; yours</h1>" in report(analyze(state), state, "mine & yours")
        True
    """
    need_matplotlib()
    across = across_layers(state)
    pairs = () if comparison is None else comparison.pairs
    return str(
        _template().render(
            title=title,
            facts=_facts(analysis, state, date or dt.date.today()),
            tiles=_tiles(analysis),
            findings=[(f.code in SERIOUS, f, list(templates(f.names))) for f in findings(analysis)],
            prefix=drawings.shared_prefix(list(tables.blocks_by_kind(analysis))),
            maps=list(_maps(analysis)),
            kinds=tables.kind_rows(analysis),
            needed=drawings.needed_ranks([b.spectrum.rank_for(0.99) for b in analysis.blocks]),
            spectra=list(_spectra(analysis)),
            norms=_norms(analysis),
            rounding=list(_rounding(analysis)),
            across=[
                (kind, drawings.overlaps(f"phi between layers of {kind}", {"": phi},
                                         "layer, from 1", "layer, from 1"))
                for kind, (_, phi) in across.items()
            ],
            compared=list(_compared(pairs)),
            overlaps=list(_overlaps(pairs)),
            other=other,
            blocks=tables.block_rows(analysis),
            weights=tables.weight_rows(analysis) if analysis.weights else None,
            rounded=tables.rounding_rows(analysis) if analysis.weights else None,
            pairs=None if comparison is None else tables.comparison_rows(comparison),
            version=__version__,
        )
    )  # fmt: skip


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
    return write_file(path, text.encode(), overwrite=True)


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise StateError(
            "write a report", "jinja2 is not installed", "Install it: pip install jinja2"
        ) from None

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
    return environment.get_template("page.html.j2")


def _facts(analysis: Analysis, state: AdapterState, date: dt.date) -> list[tuple[str, str]]:
    """What the adapter is, at the top of the page."""
    specs = [site.spec for site in state.sites.values()]
    n_lora = sum(site.A.numel() + site.B.numel() for site in state.sites.values())
    dtypes = sorted({str(site.A.dtype).removeprefix("torch.") for site in state.sites.values()})
    facts = [
        ("rank", tables.span(spec.rank for spec in specs)),
        ("alpha", tables.span(spec.alpha for spec in specs)),
        ("scale", tables.span(spec.scale for spec in specs)),
        ("parameters", f"{n_lora:,} in A and B, {', '.join(dtypes)}"),
        ("base", Path(analysis.base).name if analysis.base else "not given: the adapter alone"),
        ("date", date.isoformat()),
    ]
    if state.trained:
        facts.insert(4, ("trained in full", f"{len(state.trained):,} tensors"))
    targets = [f"{name} \u00d7{n}" for name, n in templates(state.sites).items()]
    return [*facts, ("targets", "\n".join(targets))]


def _tiles(analysis: Analysis) -> list[tuple[str, str]]:
    blocks = analysis.blocks
    tiles = [
        (f"{len({block.site for block in blocks}):,}", "sites"),
        (f"{len(blocks):,}", "low-rank blocks"),
        (f"{median(b.spectrum.rank_for(0.99) for b in blocks):g}", "rank that holds 99% (median)"),
        (
            tables.number(median(b.spectrum.effective_rank for b in blocks)),
            "effective rank (median)",
        ),
    ]
    if analysis.weights:
        norms = [block.norms for _, _, block in analysis.on_weight]
        tiles += [
            (tables.percent(_median(n.relative for n in norms)), "|D| / |W| (median)"),
            (tables.number(_median(n.factor for n in norms)), "amplification (median)"),
        ]
    return tiles


def _median(values: Iterator[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def _maps(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Yield title and drawing of what differs by layer and kind."""

    def of(value: Callable[[BlockFigures], float]) -> list[Cell]:
        return [Cell(block.place, value(block)) for block in analysis.blocks]

    if analysis.weights:
        beside = analysis.on_weight
        yield _map(
            "Size of the delta, |D| / |W|", [Cell(p, b.norms.relative) for _, p, b in beside]
        )
        yield _map("Amplification, |D| / |U'WV|", [Cell(p, b.norms.factor) for _, p, b in beside])
    else:
        yield _map("Size of the delta, |D|", of(lambda b: b.spectrum.norm))
    share = of(lambda b: b.spectrum.rank_for(0.99) / b.rank)
    yield _map("Rank that holds 99%, over the configured rank", share, 1.0)
    yield _map("Effective rank", of(lambda b: b.spectrum.effective_rank))
    yield _map("Share of the energy in the first direction", of(lambda b: b.first_share), 1.0)


def _map(title: str, cells: Sequence[Cell], high: float | None = None) -> tuple[str, str]:
    return title, drawings.heat_map(title, cells, 0.0, high)


def _spectra(analysis: Analysis) -> Iterator[tuple[str, str]]:
    for kind, blocks in tables.blocks_by_kind(analysis).items():
        lines = [(b.spectrum.values[: b.spectrum.rank].tolist(), b.place.at) for b in blocks]
        yield kind, drawings.spectra(kind, lines)


def _norms(analysis: Analysis) -> str:
    return drawings.norms(
        {
            kind: [(i, block.spectrum.norm) for i, block in enumerate(blocks)]
            for kind, blocks in tables.blocks_by_kind(analysis).items()
        }
    )


def _rounding(analysis: Analysis) -> Iterator[tuple[str, str]]:
    for form in next(iter(analysis.weights.values())).rounded if analysis.weights else ():
        cells = [
            Cell(place_of(site), found.rounded[form].likeness if found.changed else math.nan)
            for site, found in analysis.weights.items()
        ]
        yield _map(f"Likeness in {form}", cells, 1.0)


def _compared(pairs: Sequence[Pair]) -> Iterator[tuple[str, str]]:
    measures: dict[str, Callable[[Pair], float]] = {
        "Side of A: phi(1, 1)": lambda pair: pair.right.first,
        "Side of A: phi of the whole spans": lambda pair: pair.right.whole,
        "Side of B: phi(1, 1)": lambda pair: pair.left.first,
        "Side of B: phi of the whole spans": lambda pair: pair.left.whole,
    }
    for title, value in measures.items() if pairs else ():
        yield _map(title, [Cell(pair.place, value(pair)) for pair in pairs], 1.0)


def _overlaps(pairs: Sequence[Pair]) -> Iterator[tuple[str, str]]:
    """Yield kind and phi of up to four layers, evenly spaced from the first to the last."""
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.right.phi.numel():
            kinds.setdefault(pair.place.kind, []).append(pair)
    for kind, row in kinds.items():
        grids = {f"layer {pair.place.at} {pair.label}".strip(): pair.right.phi
                 for pair in spread(row)}  # fmt: skip
        yield kind, drawings.overlaps(f"phi of {kind}, side of A", grids, "i", "j")

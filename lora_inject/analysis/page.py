"""The page about an adapter: figures, pictures and tables in one HTML file that loads nothing."""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from lora_inject.analysis.figures import Analysis, needed_rank, percent
from lora_inject.analysis.numbers import by_kind
from lora_inject.analysis.pictures import need_matplotlib, pictures, shared_prefix, svg
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import write_file
from lora_inject.core.spec.names import printable, templates
from lora_inject.core.spec.tables import number, span
from lora_inject.errors import StateError, user_path
from lora_inject.version import __version__


def report(analysis: Analysis, state: AdapterState, title: str) -> str:
    """Write the page about an adapter.

    Args:
        analysis: Its figures.
        state: The adapter itself.
        title: What to call it.

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
    drawn = {
        section: [(name, svg(figure, name)) for name, figure in figures]
        for section, figures in pictures(analysis).items()
    }
    page = environment.get_template("page.html.j2").render(
        title=title,
        facts=_facts(analysis, state),
        targets=[f"{name} \u00d7{n}" for name, n in templates(state.sites).items()],
        tiles=_tiles(analysis),
        findings=[(finding, list(templates(finding.names))) for finding in analysis.findings],
        prefix=shared_prefix(by_kind(analysis.blocks)),
        kinds=analysis.block_rows().by_kind(),
        blocks=analysis.block_rows(),
        weights=analysis.weight_rows() if analysis.weights else None,
        rounded=analysis.rounding_rows() if analysis.weights else None,
        drawn=drawn,
        version=__version__,
    )
    return str(page)


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


def _facts(analysis: Analysis, state: AdapterState) -> list[tuple[str, str]]:
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
        ("date", dt.date.today().isoformat()),
    ]


def _tiles(analysis: Analysis) -> list[tuple[str, str]]:
    spectra = [block.spectrum for block in analysis.blocks]
    tiles = [
        (f"{analysis.n_sites:,}", "sites"),
        (f"{len(spectra):,}", "low-rank blocks"),
        (f"{needed_rank(analysis.blocks):g}", "rank that holds 99% (median)"),
        (number(median(s.effective_rank for s in spectra)), "effective rank (median)"),
    ]
    if beside := analysis.on_weight():
        tiles.append((percent(_median(b.relative for b in beside)), "|D| / |W| (median)"))
    return tiles


def _median(values: Iterable[float]) -> float:
    finite = list(filter(math.isfinite, values))
    return median(finite) if finite else math.nan

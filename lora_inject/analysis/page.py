"""The page about an adapter: figures, pictures and tables in one HTML file that loads nothing.

Names come from files of others. All text goes through `_text`, which escapes it; what is HTML
already is made in this file alone.
"""

from __future__ import annotations

import datetime as dt
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from string import Template

from lora_inject.analysis.figures import Analysis, needed_rank
from lora_inject.analysis.pictures import need_matplotlib, spectra
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import printable, templates
from lora_inject.core.spec.tables import Listing, number, span
from lora_inject.version import __version__

FEW = 24  # rows of a table that is not folded


def report(analysis: Analysis, state: AdapterState, title: str) -> str:
    """Return the page about an adapter.

    Args:
        analysis: Its figures.
        state: The adapter itself.
        title: What to call it.

    Returns:
        HTML that loads nothing; every name in it is escaped.

    Raises:
        StateError: matplotlib is not installed.

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
    tables = [("The deltas", analysis.block_rows())]
    if analysis.weights:
        tables += [("Compared with W", analysis.weight_rows())]
        tables += [("What each site keeps after rounding", analysis.rounding_rows())]
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=_text(title),
        facts="\n".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
            for name, value in _facts(analysis, state)
        ),
        targets=_lines(f"{name} \u00d7{n}" for name, n in templates(state.sites).items()),
        findings=_findings(analysis),
        kinds=_table(analysis.block_rows().by_kind()),
        spectra="\n".join(
            f'<figure><figcaption class="name">{_text(kind)}</figcaption>'
            f'<img alt="Spectra of {_text(kind)}" '
            f'src="data:image/png;base64,{b64encode(png).decode()}"></figure>'
            for kind, png in spectra(analysis)
        ),
        tables="\n".join(
            f"<details{' open' * (len(rows.cells) <= FEW)}><summary>{_text(head)}</summary>"
            f"{_table(rows)}</details>"
            for head, rows in tables
        ),
        version=_text(__version__),
    )


def _text(value: str) -> str:
    """Return text as HTML, for elements and for attributes in double quotes."""
    return escape(printable(value))


def _lines(names: Iterable[str]) -> str:
    return "".join(f'<div class="name">{_text(name)}</div>' for name in names)


def _table(rows: Listing) -> str:
    head = "".join(f'<th scope="col">{_text(head)}</th>' for head in rows.heads)
    body = "\n".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows.text()
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _findings(analysis: Analysis) -> str:
    found = "\n".join(
        f'<div class="finding{" bad" * finding.serious}"><p>{_text(finding.text)}</p>'
        f"<details{' open' * (len(finding.names) <= FEW)}>"
        f"<summary>{len(finding.names):,} of them</summary>"
        f"{_lines(templates(finding.names))}</details></div>"
        for finding in analysis.findings
    )
    return found or '<div class="finding">Nothing stands out.</div>'


def _facts(analysis: Analysis, state: AdapterState) -> list[tuple[str, str]]:
    """What the adapter is, at the top of the page."""
    sites = state.sites.values()
    n_lora = sum(site.A.numel() + site.B.numel() for site in sites)
    dtypes = sorted({str(site.A.dtype).removeprefix("torch.") for site in sites})
    effective = median(block.spectrum.effective_rank for block in analysis.blocks)
    return [
        *((key, span(getattr(s.spec, key) for s in sites)) for key in ("rank", "alpha")),
        ("scale", span(site.scale for site in sites)),
        ("parameters", f"{n_lora:,} in A and B, {', '.join(dtypes)}"),
        ("trained in full", f"{len(state.trained):,} tensors"),
        ("sites, blocks", f"{analysis.n_sites:,}, {len(analysis.blocks):,}"),
        ("rank that holds 99% (median)", f"{needed_rank(analysis.blocks):g}"),
        ("effective rank (median)", number(effective)),
        ("base", Path(analysis.base).name if analysis.base else "not given: the adapter alone"),
        ("date", dt.date.today().isoformat()),
    ]

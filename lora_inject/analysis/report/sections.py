"""One page about one adapter: what it changed, what it needed, and what to look at.

The page is a list of sections, each a function from figures to HTML. It holds everything
itself, so it can be mailed, archived and opened without a network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from lora_inject.analysis.comparison import Comparison
from lora_inject.analysis.figures import Analysis, BlockFigures
from lora_inject.analysis.findings import Finding, findings
from lora_inject.analysis.places import full_name, place_of
from lora_inject.analysis.report.heat import Cell, heat_map, kind_label
from lora_inject.analysis.report.overlap import Across, comparison_section, layers_section
from lora_inject.analysis.report.page import Html, card, element, folded, grid, page, section, table
from lora_inject.analysis.report.svg import bars, curves
from lora_inject.analysis.report.wording import median_of, number, percent, span
from lora_inject.analysis.spectra import SHARES
from lora_inject.spec.names import templates
from lora_inject.storage.atomic import write_file
from lora_inject.version import __version__

SERIOUS = {"inert", "loud", "overflow", "lost"}
MOST_NAMES = 12


def report(
    analysis: Analysis,
    title: str,
    *,
    across: Across | None = None,
    comparison: Comparison | None = None,
    other: str = "the other adapter",
) -> str:
    """Write the page about an adapter.

    Args:
        analysis: Its figures.
        title: What to call it.
        across: Its layers compared with each other, from `across_layers`.
        comparison: The adapter beside another one.
        other: What to call that one.

    Returns:
        HTML that loads nothing; every name in it is escaped.

    Example:
        >>> import torch
        >>> from lora_inject.analysis.figures import analyse
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.state import AdapterState, SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))
        >>> "<h1>mine &amp; yours</h1>" in report(
        ...     analyse(AdapterState({"h.0.fc": site})), "mine & yours")
        True
    """
    parts = [
        _head(analysis, title),
        _findings(findings(analysis)),
        _maps(analysis),
        _needed(analysis),
        _spectra(analysis),
        _norms(analysis),
        _rounding(analysis) if analysis.weights else "",
        layers_section(across) if across else "",
        comparison_section(comparison, other) if comparison is not None else "",
        _everything(analysis),
        _words(analysis),
        element("footer", f"lora_inject {__version__}"),
    ]
    return page(title, *parts)


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


# ----------------------------------------------------------------------------------- head, findings


def _head(analysis: Analysis, title: str) -> Html:
    blocks = analysis.blocks
    needed = [block.spectrum.rank_for(0.99) for block in blocks]
    ranks = sorted({block.rank for block in blocks})
    tiles = [
        (f"{len({block.site for block in blocks}):,}", "sites"),
        (f"{len(blocks):,}", "low-rank blocks"),
        (span(ranks), "rank"),
        (f"{median(needed):g}", "rank that holds 99 % (median)"),
        (number(median(b.spectrum.effective_rank for b in blocks)), "effective rank (median)"),
    ]
    if analysis.weights:
        norms = [block.norms for _, _, block in analysis.on_weight]
        relative = median_of(n.relative for n in norms)
        tiles.append((percent(relative), "|D| / |W| (median)"))
        tiles.append((number(median_of(n.factor for n in norms)), "amplification (median)"))
    beside = (
        f"beside the base '{Path(analysis.base).name}'" if analysis.base else "without its base"
    )
    boxes = [element("div", element("b", value), element("span", what), class_="tile")
             for value, what in tiles]  # fmt: skip
    return element(
        "header",
        element("h1", title),
        element("p", f"A LoRA adapter in numbers, {beside}.", class_="about"),
        element("div", *boxes, class_="tiles"),
    )


def _findings(found: Sequence[Finding]) -> Html:
    boxes = [
        element(
            "div",
            element("p", finding.text),
            element("div", f"{len(finding.names):,}: {_names(finding.names)}", class_="names"),
            class_="finding bad" if finding.code in SERIOUS else "finding",
        )
        for finding in found
    ]
    if not boxes:
        nothing = element("p", "Nothing stands out.")
        boxes = [element("div", nothing, class_="finding good")]
    return section("What to look at", "Red marks what makes sites useless or wrong.", *boxes)


def _names(names: Sequence[str]) -> str:
    shown = list(templates(names))
    more = f", and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more


# ---------------------------------------------------------------------- heat maps by layer and kind


def _maps(analysis: Analysis) -> Html:
    needed = _of(analysis, lambda b: b.spectrum.rank_for(0.99) / b.rank)
    effective = _of(analysis, lambda b: b.spectrum.effective_rank)
    first = _of(analysis, lambda b: b.first_share)
    maps = [
        heat_map("Rank that holds 99 %, of the rank configured", needed, percent, 0, 1),
        heat_map("Effective rank", effective, number, 0),
        heat_map("Share of the first direction", first, percent, 0, 1),
    ]
    if analysis.weights:
        relative = [Cell(p, b.norms.relative, full_name(s, b.label))
                    for s, p, b in analysis.on_weight]  # fmt: skip
        factor = [Cell(p, b.norms.factor, full_name(s, b.label))
                  for s, p, b in analysis.on_weight]  # fmt: skip
        maps.insert(0, heat_map("|D| / |W|: how large the delta is", relative, percent, 0))
        maps.insert(1, heat_map("Amplification |D| / |U'WV|", factor, number, 0))
    else:
        sizes = _of(analysis, lambda b: b.spectrum.norm)
        maps.insert(0, heat_map("|D|: how large the delta is", sizes, number, 0))
    about = (
        "A row for each kind of site, a cell for each layer. Point at a cell for its value, or see "
        "the tables below."
    )
    return section("By layer and kind", about, grid(maps))


def _of(analysis: Analysis, value: Callable[[BlockFigures], float]) -> list[Cell]:
    return [Cell(block.place, value(block), block.name) for block in analysis.blocks]


# ------------------------------------------------------------------------ rank, spectra, and norms


def _by_kind(analysis: Analysis) -> dict[str, list[BlockFigures]]:
    kinds: dict[str, list[BlockFigures]] = {}
    for block in analysis.blocks:
        kinds.setdefault(block.place.kind, []).append(block)
    return kinds


def _needed(analysis: Analysis) -> Html:
    rows = []
    for kind, blocks in _by_kind(analysis).items():
        needed = [[b.spectrum.rank_for(share) for b in blocks] for share in SHARES]
        rows.append(
            (
                kind,
                f"{len(blocks):,}",
                span(sorted({b.rank for b in blocks})),
                *(f"{median(each):g} (up to {max(each)})" for each in needed),
                number(median(b.spectrum.stable_rank for b in blocks)),
                number(median(b.spectrum.effective_rank for b in blocks)),
            )
        )
    heads = ["kind", "blocks", "rank", *map(percent, SHARES)]
    shown = table([*heads, "stable", "effective"], rows)
    ranks = [block.spectrum.rank_for(0.99) for block in analysis.blocks]
    counts = [(float(ranks.count(r)), str(r), f"{ranks.count(r)} blocks need rank {r}")
              for r in range(max(ranks) + 1)]  # fmt: skip
    chart = card("Blocks by the rank that holds 99 %", Html(bars(counts, "blocks by needed rank")))
    about = (
        "The smallest rank that holds 90, 95 and 99 % of a delta's energy (its sum of squares): "
        "the median of a kind, and the largest."
    )
    return section("The rank it really needed", about, shown, element("p"), grid([chart]))


def _spectra(analysis: Analysis) -> Html:
    cards = []
    for kind, blocks in _by_kind(analysis).items():
        lines = [(_relative(block), block.name) for block in blocks]
        drawn = curves(lines, f"singular values of {kind}")
        cards.append(element("div", kind_label(kind), Html(drawn), class_="card"))
    about = (
        "Singular values of each delta over its largest, on a logarithmic scale, by number. One "
        "curve for each layer, the deeper the stronger. A curve that falls fast needs few of them."
    )
    return section("Spectra", about, grid(cards))


def _relative(block: BlockFigures) -> list[float]:
    values: list[float] = block.spectrum.values[: block.spectrum.rank].tolist()
    return [value / values[0] for value in values]


def _norms(analysis: Analysis) -> Html:
    cards = []
    for kind, blocks in _by_kind(analysis).items():
        sizes = [(b.spectrum.norm, b.place.at, f"{b.name}: {number(b.spectrum.norm)}")
                 for b in blocks]  # fmt: skip
        drawn = bars(sizes, f"norms of {kind} by layer")
        cards.append(element("div", kind_label(kind), Html(drawn), class_="card"))
    return section("Norms by depth", "|D|, the Frobenius norm of each delta.", grid(cards))


# --------------------------------------------------------------- rounding, and all of it in tables


def _rounding(analysis: Analysis) -> Html:
    formats = list(next(iter(analysis.weights.values())).rounded)
    rows = []
    for site, found in analysis.weights.items():
        numbers = [f"{number(r.kept)} ({number(r.error)})" for r in found.rounded.values()]
        rows.append((site, found.stored, *numbers))
    about = (
        "What each format leaves of the delta after merging. Likeness is the cosine between what "
        "the weights got and the delta. The table has kept (error): kept is 1 where the delta "
        "survives and 0 where it is rounded away; an error above 1 is noise larger than the delta."
    )
    maps = [
        heat_map(f"Likeness in {name}", _likeness(analysis, name), number, 0, 1) for name in formats
    ]
    shown = folded(f"{len(rows):,} sites", table(["site", "stored as", *formats], rows))
    return section("After rounding", about, grid(maps), shown)


def _likeness(analysis: Analysis, form: str) -> list[Cell]:
    return [
        Cell(place_of(site), beside.rounded[form].likeness if beside.changed else math.nan, site)
        for site, beside in analysis.weights.items()
    ]


def _everything(analysis: Analysis) -> Html:
    heads = ["block", "shape", "rank", "|D|", "first", "stable", "effective"]
    heads += map(percent, SHARES)
    rows = [
        (
            b.name,
            f"{b.shape[1]:,} -> {b.shape[0]:,}",
            str(b.rank),
            number(b.spectrum.norm),
            percent(b.first_share),
            number(b.spectrum.stable_rank),
            number(b.spectrum.effective_rank),
            *(str(b.spectrum.rank_for(share)) for share in SHARES),
        )
        for b in analysis.blocks
    ]
    shown = [folded(f"{len(rows):,} blocks", table(heads, rows))]
    if analysis.weights:
        heads = ["block", "tensor", "|W|", "|D| / |W|", "r", "|U'WV|", "of W's own", "of random"]
        beside = [
            (
                full_name(site, b.label),
                b.tensor,
                number(b.norms.weight_norm),
                percent(b.norms.relative),
                str(b.norms.rank),
                number(b.norms.of_delta),
                "-" if b.norms.of_weight is None else number(b.norms.of_weight),
                number(b.norms.of_random_expected),
                number(b.norms.factor),
            )
            for site, _, b in analysis.on_weight
        ]
        shown.append(folded("beside W", table([*heads, "amplification"], beside)))
    return section("Every block", "All figures behind the drawings.", *shown)


def _words(analysis: Analysis) -> Html:
    words = {
        "delta, D": "scale B A, less the frozen start of PiSSA and OLoRA: what merging adds to W.",
        "energy": "Sum of squares of singular values; that of the first k over that of all.",
        "stable rank": "|D|_F^2 / |D|_2^2: 1 for one direction, r for r equal ones.",
        "effective rank": "exp of the entropy of the singular values over their sum.",
        "phi(i, j)": "|U1_i' U2_j|_F^2 / min(i, j), the top i and j singular directions compared: "
        "1 where the smaller span lies in the larger, max(i, j) / d by chance.",
    }
    if analysis.weights:
        words["amplification"] = (
            "|D|_F / |U'WV|_F, U and V the delta's directions: how much it adds where it acts."
        )
        words["kept, error, likeness"] = (
            "<Q(W+D) - Q(W), D> / <D, D>; |Q(W+D) - Q(W) - D| / |D|; the cosine of Q(W+D) - Q(W) "
            "and D. int8: a scale for each row; int4: one for each 64 values of a row."
        )
    pairs = [element("dt", word) + element("dd", text) for word, text in words.items()]
    source = "arXiv:2106.09685, sections 7.2 and 7.3."
    return section("Words", source, element("dl", *map(Html, pairs)))

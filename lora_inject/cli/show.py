"""How results are printed: tables for people, JSON for machines, a progress bar.

Only the result goes to stdout, so it can be piped; progress and remarks go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

from lora_inject.core.spec.names import counted as count
from lora_inject.core.spec.names import nearest, templates
from lora_inject.core.spec.sites import ROLES
from lora_inject.core.spec.tables import Listing, columns, sides, span
from lora_inject.core.spec.words import printable

if TYPE_CHECKING:
    from lora_inject.analysis import Analysis, Comparison
    from lora_inject.analysis.inspection import Inspection, SiteFigures
    from lora_inject.checkpoint import ExtractReport, MergePlan, VerifyReport
    from lora_inject.checkpoint.merge_plan import MergedFiles
    from lora_inject.core.spec.plan import Plan

WIDTH = 80  # where stdout is not a terminal
MOST_NAMES = 6
GOOD = "green"
BAD = "red"


def say(text: str = "", *, err: bool = False, color: str | None = None) -> None:
    """Print text, with escape sequences and other unprintable characters escaped.

    Every line of this program is printed here, and names come from untrusted files. The text before
    the first colon gets the color, if it is printed on a terminal and NO_COLOR is not set.
    """
    head, colon, rest = printable(text, keep="\n").partition(":")
    if color is not None and colon and not os.environ.get("NO_COLOR"):
        head = typer.style(head, fg=color, bold=True)  # which echo leaves out where no terminal is
    _write(f"{head}{colon}{rest}", err=err)


def _write(text: str, *, err: bool = False) -> None:
    """Write text; if its reader has closed the pipe, the command goes on without output."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        stream = sys.stderr if err else sys.stdout
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def note(text: str, *, color: str | None = None) -> None:
    """Print a remark on stderr."""
    say(text, err=True, color=color)


def say_words(text: str, color: str | None = None) -> None:
    """Print a sentence in lines that fit; words, which may be paths, are not broken."""
    text = printable(text)
    lines = textwrap.wrap(text, width(), break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        say(line, color=None if number else color)


def not_one_of(value: str, names: Sequence[str]) -> str:
    """Return that a value is none of some names, the nearest of them, and all of them."""
    near = nearest(value, names, 1)
    meant = f", did you mean {near[0]}?" if near else "."
    known = ", ".join(name or "''" for name in names)
    return f"{value!r} is not known{meant} Known are {known}"


def natural(text: str) -> list[str | int]:
    """Return what a text is sorted by, so that layer 2 comes before layer 10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def say_list(head: str, names: Iterable[str], *, everything: bool) -> None:
    """Print names, if any, in lines that fit; only a few unless `everything`."""
    shown = [printable(name) for name in names]
    if not shown:
        return
    if not everything and len(shown) > MOST_NAMES:
        shown[MOST_NAMES:] = [f"and {len(shown) - MOST_NAMES:,} more (--all)"]
    line = head
    for i, name in enumerate(shown):
        item = name + "," * (i + 1 < len(shown))
        if len(line) + len(item) >= width() and line != head:
            say(line)
            line = " " * len(head)
        line += f" {item}"
    say(line)


def print_json(data: Any) -> None:
    """Print plain data as JSON, with null for numbers that are not finite."""
    _write(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def is_live() -> bool:
    """Return whether stderr is a terminal, or rich is told to treat it as one."""
    forced = os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE") == "1"
    return sys.stderr is not None and bool(sys.stderr.isatty() or forced)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on stderr while the body runs, if stderr is a terminal.

    Yields a function of bytes done and bytes in all, for any thread.
    """
    if not is_live():
        yield lambda *_: None
        return
    from rich import progress as bars  # only now: commands start sooner
    from rich.console import Console

    columns = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    shown = (bars.TextColumn("{task.description}"), bars.BarColumn(), *columns)
    with bars.Progress(*shown, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def print_rows(rows: Listing, *, everything: bool = False, joined: str = "") -> None:
    """Print a table of sites, if there are any, grouped by kind unless `everything`.

    `joined` states how figures of several sites are summarized.
    """
    if not rows.cells:
        return
    table = rows if everything else rows.by_kind()
    n_left = 1 + sum(isinstance(cell, str) for cell in table.cells[0][1:])
    shown = [[printable(cell) for cell in row] for row in (table.heads, *table.text())]
    for line in columns(shown, n_left, width(), ""):
        say(line)
    if joined and len(table.cells) < len(rows.cells):
        say_words(joined)


def width() -> int:
    """Return the columns of the terminal."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def _size(n_bytes: int) -> str:
    """Return bytes with a unit: `512 bytes`, `538.1 MB`."""
    from rich.filesize import decimal  # only now: commands start sooner

    return decimal(n_bytes)


# ------------------------------------------------------------------------------------------ inspect


def print_inspection(inspection: Inspection, *, everything: bool) -> None:
    """Print what is in an adapter, by kind of site unless `everything`."""
    if inspection.sites:
        _print_sites(inspection, everything=everything)
    tensors = {name: ("trained", figures) for name, figures in inspection.trained.items()}
    copies = inspection.base_copies.items()
    tensors |= {name: ("copy of the base", figures) for name, figures in copies}
    if tensors:
        cells = tuple(
            (name, what, sides(figures.shape), figures.dtype, figures.norm)
            for name, (what, figures) in tensors.items()
        )
        rows = Listing(("tensor", "", "shape", "dtype", "norm"), cells)
        print_rows(rows, everything=everything)
        say()
    nonfinite = {site.spec.name: site.n_nonfinite for site in inspection.sites}
    nonfinite |= {name: figures.n_nonfinite for name, (_, figures) in tensors.items()}
    bad = (f"{name} ({n:,})" for name, n in nonfinite.items() if n)
    say_list("NaN or Inf in", bad, everything=everything)
    say_words(_inspection_totals(inspection))


def _print_sites(inspection: Inspection, *, everything: bool) -> None:
    further = tuple(inspection.n_further)
    norms = ("|A|", "|B|", "|delta|", *(f"|{role}|" for role in further))
    cells = tuple(_site_row(site, further) for site in inspection.sites)
    rows = Listing(("site", "kind", "shape", "rank", "scale", *norms), cells)
    summarized = "Norms of several sites are medians; --all lists each site."
    print_rows(rows, everything=everything, joined=summarized)
    if any(ROLES[site.spec.variant].gained for site in inspection.sites):
        say_words("Of DoRA |delta| is |scale B A|, without the gain by m.")
    say()


def _site_row(site: SiteFigures, further: Sequence[str]) -> tuple[Any, ...]:
    spec, variants = site.spec, "" if site.spec.variant == "lora" else f", {site.spec.variant}"
    slices = f" [{', '.join(site.slices)}]" if site.slices else ""
    return (
        spec.name,
        spec.kind + (" - start" if site.frozen_start else "") + variants,
        f"{spec.in_features:,} -> {spec.out_features:,}{slices}",
        f"{spec.rank}",
        f"{spec.scale:g}",
        site.A.norm,
        site.B.norm,
        site.delta_norm,
        *(site.further[role].norm if role in site.further else None for role in further),
    )


def _inspection_totals(inspection: Inspection) -> str:
    parts = [f"{count(len(inspection.sites), 'site')}: {inspection.n_lora:,} in A and B"]
    parts[0] += "".join(f", {n:,} in {role}" for role, n in inspection.n_further.items())
    if inspection.trained:
        parts.append(
            f"{inspection.n_trained:,} in {count(len(inspection.trained), 'trained tensor')}"
        )
    known, bad = inspection.n_fingerprinted, inspection.n_nonfinite
    parts.append(f"base known by {count(known, 'tensor')}" if known else "base not named")
    parts.append(f"{count(bad, 'value')} NaN or Inf" if bad else "finite")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------ analyze


def print_analysis(analysis: Analysis, compared: Comparison | None, *, everything: bool) -> None:
    """Print the figures of an adapter, grouped by kind of site unless `everything`."""
    from lora_inject.analysis import findings, tables

    shown = [tables.block_rows(analysis)]
    if analysis.weights:
        shown += [tables.weight_rows(analysis), tables.rounding_rows(analysis)]
    if compared is not None:
        shown.append(tables.comparison_rows(compared))
    for rows in shown:
        print_rows(rows, everything=everything)
        say()
    if not everything and len(analysis.blocks) > len(shown[0].by_kind().cells):
        say("Numbers of several blocks are medians; --all lists each block.")
    if compared is not None:
        for which, names in (("first", compared.only_first), ("second", compared.only_second)):
            say_list(f"only in the {which}:", templates(names), everything=everything)
    for finding in findings(analysis):
        say_words(f"{finding.code}: {finding.text}")
        head = f"  {len(finding.names):,}:"
        say_list(head, templates(finding.names), everything=everything)
    needed = median(block.spectrum.rank_for(0.99) for block in analysis.blocks)
    blocks = count(len(analysis.blocks), "block")
    say(f"{count(analysis.n_sites, 'site')}, {blocks}; rank {needed:g} holds 99% (median)")


# -------------------------------------------------------------------------------- merge and verify


def print_merge_plan(plan: MergePlan, where: Path, free_bytes: int, *, everything: bool) -> None:
    """Print what a merge would do, and whether the disk of `where` has room for it."""
    cells = tuple((job.name, job.action, job.dtype, sides(job.shape)) for job in plan.jobs)
    print_rows(Listing(("tensor", "action", "dtype", "shape"), cells), everything=everything)
    for adapter, rule in zip(plan.adapters, plan.rules, strict=True):
        n_sites = len(adapter.state.sites)
        say_words(f"{adapter.label} x {adapter.weight:g}: {count(n_sites, 'site')}, {rule}")
    for key, value in plan.config_changes.items():
        new = next(iter(value.values())) if isinstance(value, dict) else value
        say(f"config.json: {key} becomes {json.dumps(new)}")
    for text in plan.notes:
        say_words(f"note: {text}")
    n_copied = sum(copy.n_bytes for shard in plan.shards for copy in shard.copies)
    say_words(
        f"would write {_size(plan.n_bytes)} in {count(len(plan.shards), 'file')}: "
        f"{_size(n_copied)} copied as they are, {count(len(plan.jobs), 'tensor')} changed"
    )
    room = "free" if free_bytes >= plan.n_bytes else "free, which is NOT enough,"
    say_words(f"{_size(free_bytes)} {room} on the disk of '{where}'; nothing was written")


def print_merge(report: MergedFiles, *, everything: bool) -> None:
    """Print what a merge left of each delta, the worst of each kind, and the totals."""
    heads = ("tensor", "action", "dtype", "|D|/|W|", "kept", "error")
    cells = tuple((t.name, t.action, t.dtype, t.relative, t.kept, t.error) for t in report.counted)
    joined = "Of several: the median |D|/|W| and the worst of the others; --all lists each."
    rows = Listing(heads, cells, {"kept": min, "error": max})
    print_rows(rows, everything=everything, joined=joined)
    for text in report.notes:
        say_words(f"note: {text}")
    if report.resumed:
        say(f"resumed: {count(len(report.resumed), 'file')} finished earlier")
    say_words(_merge_totals(report))
    if report.warning:
        note(f"warning: {report.warning}")


def _merge_totals(report: MergedFiles) -> str:
    changed = f"{len(report.tensors):,} of {report.n_tensors:,} tensors"
    peak = report.peak_memory_bytes
    memory = f", {_size(peak)} of memory" if peak else ""
    checked = ", verified" if report.verified else ""
    lost = f"; {report.warning}" if report.warning else ""
    return (
        f"merged {changed} into {report.output}: {_size(report.n_bytes)} in "
        f"{report.seconds:.1f} s{memory}{checked}{lost}"
    )


def print_plan(plan: Plan, *, everything: bool) -> None:
    """Print which layers a config selects."""
    say(plan.text(width(), everything=everything))


def print_verification(report: VerifyReport, *, everything: bool) -> None:
    """Print what a verification compared, and what is wrong; only a part unless `everything`."""
    problems = sorted(report.problems, key=natural)
    shown = problems if everything else problems[:MOST_NAMES]
    for problem in shown:
        say(f"wrong: {problem}", color=BAD)
    if len(shown) < len(problems):
        say(f"and {len(problems) - len(shown):,} more (--all)")
    near = f", {report.n_neighbors:,} of them one unit in the last place off"
    values = f"{report.n_values:,} values{near if report.n_neighbors else ''}"
    say_words(
        f"{'NOT ' if report.problems else ''}verified: "
        f"{count(report.n_tensors, 'tensor')} computed again ({values}), "
        f"{_size(report.copied_bytes)} equal to the base's",
        BAD if report.problems else GOOD,
    )


def print_extraction(report: ExtractReport, written: Path, *, everything: bool) -> None:
    """Print the parts of the difference that the adapter holds, and what was left behind."""
    low = [tensor for tensor in report.tensors if tensor.kept == "low rank"]
    low.sort(key=lambda tensor: tensor.energy or 0.0)
    cells = tuple((t.name, float(t.rank or 0), t.relative, t.energy) for t in low)
    joined = "Of several: the ranks, median |D|/|W|, least energy; --all lists each."
    rows = Listing(("tensor", "rank", "|D|/|W|", "energy"), cells, {"rank": span, "energy": min})
    print_rows(rows, everything=everything, joined=joined)
    say_list("left behind:", report.left, everything=everything)
    n_full = sum(tensor.kept == "in full" for tensor in report.tensors)
    say_words(
        f"wrote {written}: {count(report.n_sites, 'site')}, {count(n_full, 'tensor')} in full; "
        f"{len(report.left):,} left behind, {report.n_equal:,} equal to the base's"
    )

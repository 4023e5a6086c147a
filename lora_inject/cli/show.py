"""How results look: tables for people, JSON for machines, a progress bar for the patient.

Stdout carries the result and nothing else, so that it can be piped; whatever moves or
comments is on stderr, and only where somebody is looking.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lora_inject.analysis.inspection import Inspection, SiteFigures, TensorFigures
    from lora_inject.checkpoint import ExtractReport, MergePlan, VerifyReport
    from lora_inject.functional.merge_report import MergeReport

PIPE_WIDTH = 400  # a pipe has no width; a table in it must not be folded
N_WORST = 10


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    typer.echo(text, err=True)


def print_json(data: Any) -> None:
    """Print plain data as JSON; numbers that are not finite become null, which JSON can say."""
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on stderr while the body runs, where stderr is a terminal.

    Args:
        what: What is done.

    Yields:
        A function of bytes done and bytes in all, for any thread.
    """
    forced = os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE") == "1"  # as rich
    if not (sys.stderr.isatty() or forced):
        yield lambda *_: None
        return
    from rich import progress as bars  # not before somebody looks: commands start sooner
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def print_table(rows: Sequence[Sequence[str]], heads: Sequence[str], n_left: int) -> None:
    """Print aligned columns, the first `n_left` to the left and the others to the right."""
    from rich.console import Console  # nor where JSON is asked for
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        side = "left" if i < n_left else "right"
        table.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name may hold brackets
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def number(value: float | None) -> str:
    """Return a number with three digits, `-` for None."""
    return "-" if value is None else f"{value:.3g}"


def count(n: int, noun: str) -> str:
    """Return a number and its noun: `1 site`, `2,000 sites`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _size(n_bytes: float) -> str:
    """Bytes as people read them.

    Example:
        >>> _size(512), _size(538_090_408)
        ('512 bytes', '538.1 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


# ------------------------------------------------------------------------------------------ inspect


def print_inspection(found: Inspection) -> None:
    """Print what is in an adapter."""
    if found.sites:
        heads = ["site", "kind", "shape", "rank", "scale", "|A|", "|B|", "|delta|", "not finite"]
        print_table([_site_row(site) for site in found.sites], heads, n_left=3)
    tensors = {
        **{name: ("trained", figures) for name, figures in found.trained.items()},
        **{name: ("copy of the base", figures) for name, figures in found.base_copies.items()},
    }
    if tensors:
        if found.sites:
            typer.echo()
        rows = [_tensor_row(name, *entry) for name, entry in tensors.items()]
        print_table(rows, ["tensor", "", "shape", "dtype", "norm", "not finite"], n_left=4)
    typer.echo(_inspection_totals(found))


def _site_row(site: SiteFigures) -> tuple[str, ...]:
    slices = f" [{', '.join(site.slices)}]" if site.slices else ""
    return (
        site.name,
        site.kind + (" - start" if site.frozen_start else ""),
        f"{site.in_features:,} -> {site.out_features:,}{slices}",
        str(site.rank),
        f"{site.scale:g}",
        number(site.A.norm),
        number(site.B.norm),
        number(site.delta_norm),
        f"{site.n_nonfinite:,}",
    )


def _tensor_row(name: str, what: str, tensor: TensorFigures) -> tuple[str, ...]:
    shape = " x ".join(f"{side:,}" for side in tensor.shape) or "scalar"
    return name, what, shape, tensor.dtype, number(tensor.norm), f"{tensor.n_nonfinite:,}"


def _inspection_totals(found: Inspection) -> str:
    parts = [f"{count(len(found.sites), 'site')}: {found.n_lora:,} in A and B"]
    if found.trained:
        parts.append(f"{found.n_trained:,} in {count(len(found.trained), 'trained tensor')}")
    known = found.n_fingerprinted
    parts.append(
        f"recognises its base by {count(known, 'tensor')}" if known else "does not name its base"
    )
    parts.append(f"{found.n_nonfinite:,} values are NaN or Inf" if found.n_nonfinite else "finite")
    return "; ".join(parts)


# -------------------------------------------------------------------------------- merge and verify


def print_merge_plan(plan: MergePlan, where: Path, free_bytes: int) -> None:
    """Print what a merge would do, and whether the disk of `where` has room for it."""
    rows = [
        (job.name, job.action, job.dtype, " x ".join(f"{side:,}" for side in job.shape))
        for job in plan.jobs
    ]
    print_table(rows, ["tensor", "action", "dtype", "shape"], n_left=4)
    for part, (_, rule) in zip(plan.parts, plan.rules, strict=True):
        n_sites = len(part.state.sites)
        typer.echo(f"{part.label} x {part.weight:g}: {count(n_sites, 'site')}, {rule}")
    for key, value in plan.config_changes.items():
        typer.echo(f"config.json: {key} becomes {json.dumps(value)}")
    _print_notes(plan.notes)
    n_copied = sum(copy.n_bytes for shard in plan.shards for copy in shard.copies)
    typer.echo(
        f"would write {_size(plan.n_bytes)} in {count(len(plan.shards), 'file')}: "
        f"{_size(n_copied)} copied as they are, {count(len(plan.jobs), 'tensor')} changed"
    )
    room = "free" if free_bytes >= plan.n_bytes else "free, which is NOT enough,"
    typer.echo(f"{_size(free_bytes)} {room} on the disk of '{where}'; nothing was written")


def print_merge(report: MergeReport) -> None:
    """Print what a merge did: the tensors that lost most of their delta, and the totals."""
    measured = report.counted
    worst = measured[:N_WORST]
    if worst:
        rows = [
            (t.name, t.action, t.dtype, number(t.relative), f"{t.kept:.4f}", number(t.error))
            for t in worst
        ]
        print_table(rows, ["tensor", "action", "dtype", "|D|/|W|", "kept", "error"], n_left=3)
        if len(measured) > len(worst):
            typer.echo(f"... and {len(measured) - len(worst):,} that kept more of their delta")
    _print_notes(report.notes)
    if report.resumed:
        typer.echo(f"resumed: {count(len(report.resumed), 'file')} finished earlier")
    if report.lost:
        typer.echo(f"lost more than allowed in {len(report.lost):,}: {', '.join(report.lost[:5])}")
    typer.echo(_merge_totals(report))
    if report.warning:
        note(f"warning: {report.warning}")


def _merge_totals(report: MergeReport) -> str:
    changed = f"{len(report.tensors):,} of {report.n_tensors:,} tensors"
    checked = ", verified" if report.verified else ""
    peak = report.peak_memory_bytes
    memory = f", {_size(peak)} of memory" if peak else ""
    lost = f"; {report.warning}" if report.warning else ""
    return (
        f"merged {changed} into {report.output}: {_size(report.n_bytes)} in "
        f"{report.seconds:.1f} s{memory}{checked}{lost}"
    )


def print_verification(report: VerifyReport) -> None:
    """Print what a verification compared, and what is wrong."""
    for problem in report.problems:
        typer.echo(f"wrong: {problem}")
    near = f", {report.n_neighbours:,} of them one unit in the last place off"
    values = f"{report.n_values:,} values{near if report.n_neighbours else ''}"
    typer.echo(
        f"{'NOT ' if report.problems else ''}verified: "
        f"{count(report.n_tensors, 'tensor')} computed again ({values}), "
        f"{_size(report.copied_bytes)} equal to the base's"
    )


def print_extraction(report: ExtractReport, written: Path) -> None:
    """Print what of the difference the adapter holds: what lost most first, and what was left."""
    low = [tensor for tensor in report.tensors if tensor.kept == "low rank"]
    worst = sorted(low, key=lambda tensor: tensor.energy or 0.0)[:N_WORST]
    if worst:
        rows = [(t.name, str(t.rank), number(t.relative), f"{t.energy:.4f}") for t in worst]
        print_table(rows, ["tensor", "rank", "|D|/|W|", "energy"], n_left=1)
        if len(low) > len(worst):
            typer.echo(f"... and {len(low) - len(worst):,} that kept more of their difference")
    if report.left:
        typer.echo(f"left behind: {', '.join(report.left[:5])}{', ...' * (len(report.left) > 5)}")
    n_full = sum(tensor.kept == "in full" for tensor in report.tensors)
    typer.echo(
        f"wrote {written}: {count(len(low), 'site')}, {count(n_full, 'tensor')} in full; "
        f"{len(report.left):,} left behind, {report.n_equal:,} equal to the base's"
    )


def _print_notes(notes: Sequence[str]) -> None:
    for text in notes:
        typer.echo(f"note: {text}")

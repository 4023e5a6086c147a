"""The command `analyze`: an adapter in numbers, as pictures and as a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_inject.cli.program import (
    All,
    Allow,
    AllowPickle,
    Alpha,
    EnableLora,
    FanInFanOut,
    Json,
    Prefer,
    app,
    loralib_options,
    read_options,
)

if TYPE_CHECKING:
    from lora_inject.adapter.state import AdapterState
    from lora_inject.checkpoint import Checkpoint


@app.command()
def analyze(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or an adapter's file.")
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="Another adapter of the same base, to compare."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Folder or file of the base: compare the updates with its weights."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a report, one HTML file; replaces an existing one."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Draw the paper's figures into this folder.")
    ] = None,
    any_base: Annotated[
        bool,
        typer.Option("--any-base", help="Compare although the adapter was made on another base."),
    ] = False,
    prefer: Prefer = None,
    allow: Allow = None,
    alpha: Alpha = None,
    allow_pickle: AllowPickle = False,
    fan_in_fan_out: FanInFanOut = None,
    enable_lora: EnableLora = None,
    everything: All = False,
    as_json: Json = False,
) -> None:
    """Show what ADAPTER has learned: needed rank, spectra, subspaces.

    With --base also how large the update is compared with W, what it amplifies, and what merging
    keeps of it in 16, 8 and 4 bits. With OTHER how far the subspaces of both agree.
    """
    from lora_inject import analysis as figures
    from lora_inject.checkpoint import Checkpoint
    from lora_inject.cli.show import note, print_json, progress_bar
    from lora_inject.cli.show_analysis import print_analysis

    _check(base, report, any_base=any_base)
    if pictures is not None or report is not None:
        figures.need_matplotlib()
    of_loralib = loralib_options(alpha, allow_pickle, fan_in_fan_out, enable_lora)
    checkpoint = None if base is None else Checkpoint.open(base)

    def read(path: Path) -> AdapterState:
        return _read(path, checkpoint, {**read_options(path, prefer, allow), **of_loralib})

    state = read(adapter)
    weights = None
    if checkpoint is not None:
        weights = figures.Weights(state, checkpoint, str(adapter), any_base=any_base)
    with progress_bar("analyzing") as progress:
        found = figures.analyze(state, weights, label=str(adapter), progress=progress)
    compared = None
    if other is not None:
        second = read(other)
        with progress_bar("comparing") as progress:
            compared = figures.compare(state, second, progress)
    written: list[Path] = []
    if pictures is not None:
        written += figures.draw_gallery(pictures, state, comparison=compared, weights=weights)
    if report is not None:
        page = figures.report(
            found,
            state,
            adapter.name,
            comparison=compared,
            other="the other adapter" if other is None else other.name,
        )
        written.append(figures.write_report(report, page))
    if as_json:
        more = {
            "findings": [finding.to_dict() for finding in figures.findings(found)],
            "comparison": None if compared is None else compared.to_dict(),
            "written": [str(path) for path in written],
        }
        print_json({**found.to_dict(), **more})
    else:
        print_analysis(found, compared, everything=everything)
    for path in written:
        note(f"wrote {path}")


def _check(base: Path | None, report: Path | None, *, any_base: bool) -> None:
    if any_base and base is None:
        raise typer.BadParameter("it needs --base", param_hint="--any-base")
    if report is not None and report.is_dir():
        raise typer.BadParameter(f"'{report}' is a folder", param_hint="--report")


def _read(path: Path, checkpoint: Checkpoint | None, options: dict[str, Any]) -> AdapterState:
    """Read an adapter; a base tells which weights a file of stacked experts means."""
    from lora_inject.checkpoint import read_weighted
    from lora_inject.formats import read_adapter

    if checkpoint is None:
        return read_adapter(path, **options)
    return read_weighted(path, checkpoint, **options).state

"""Commands that work on checkpoints: `merge`, `verify`, `extract`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_inject.cli.given import All, Dtype, Json, Keeping, Reading, Writing
from lora_inject.cli.program import app

if TYPE_CHECKING:
    from lora_inject.checkpoint import Checkpoint, MergeOptions, WeightedAdapter


class OnLost(StrEnum):
    """What to do where rounding leaves less of a delta than asked for."""

    fail = "fail"
    warn = "warn"


BasePath = Annotated[
    Path, typer.Argument(metavar="BASE", help="Folder of the base, or one .safetensors file.")
]
AdapterPaths = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER", help="Adapters: PEFT folders or files.")
]


@dataclass(frozen=True)
class Merging:
    """The options that decide the bytes of a merged checkpoint, of `merge` and `verify`."""

    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            "-w",
            help="Mixing weight of an adapter; once for each, in order. (default: 1 each)",
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of every float tensor. (default: as each tensor is)"),
    ] = None
    copy_code: Annotated[bool, typer.Option("--copy-code", help="Copy the base's *.py files.")] = (
        False
    )
    allow_new: Annotated[
        bool, typer.Option("--allow-new", help="Add trained tensors that the base lacks.")
    ] = False
    dequantize: Annotated[
        Dtype | None,
        typer.Option("--dequantize", help="Write a quantized base as plain floats of this dtype."),
    ] = None
    any_base: Annotated[
        bool,
        typer.Option("--any-base", help="Merge although the adapter was made on another base."),
    ] = False
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Literal prefix of the adapters' names, and of the base's; not a regex. "
            "(default: by its class)",
        ),
    ] = None
    tie: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ABSENT=STORED",
            help="A tensor that the files lack and the one that it equals; or: none. (default: by "
            "the base's class)",
        ),
    ] = None

    def options(self, **more: Any) -> MergeOptions:
        """Return these and other options as keywords of the package."""
        from lora_inject.checkpoint import MergeOptions

        names = ("dtype", "copy_code", "allow_new", "dequantize", "any_base")
        # Without ties the base's class decides; an empty table means that nothing is tied.
        tie = {} if self.tie == ["none"] else _pairs(self.tie, "--tie") if self.tie else None
        return MergeOptions(
            **{name: getattr(self, name) for name in names},
            rename=_pairs(self.rename, "--rename"),
            tie=tie,
            **more,
        )

    def read(
        self, base: Path, adapters: Sequence[Path], reading: Reading
    ) -> tuple[Checkpoint, list[WeightedAdapter]]:
        """Open the base and read the adapters."""
        from lora_inject.checkpoint import Checkpoint, read_weighted

        weights = _weights(self.weight, len(adapters))
        checkpoint, weighted = Checkpoint.open(base), []
        for path, weight, options in zip(adapters, weights, reading.options(adapters), strict=True):
            weighted.append(read_weighted(path, checkpoint, weight, **options))
        return checkpoint, weighted


@app.command()
def merge(
    base: BasePath,
    adapters: AdapterPaths,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make. Not with --dry-run.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute everything again before publishing.")
    ] = False,
    merging: Merging,
    min_kept: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least share of each delta that must survive rounding."),
    ] = None,
    on_lost: Annotated[
        OnLost, typer.Option(help="Where less survives: refuse, or write and list it.")
    ] = OnLost.fail,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads. (default: one per core, at most four)"),
    ] = None,
    reading: Reading,
    everything: All = False,
    as_json: Json = False,
) -> None:
    """Fold each ADAPTER into the checkpoint BASE, without the model.

    BASE is a folder of safetensors files, or one such file.

    Tensors that no adapter touches keep their bytes. Stopped at any moment, the output is absent,
    complete, or finished by the same command.
    """
    from lora_inject import checkpoint as on_disk
    from lora_inject.cli.show import print_json, print_merge, print_merge_plan, progress_bar

    if output is None and not dry_run:
        raise typer.BadParameter("say where to write: --output FOLDER (or --dry-run)")
    options = merging.options(min_kept=min_kept, on_lost=on_lost, verify=verify, workers=workers)
    checkpoint, weighted = merging.read(base, adapters, reading)
    planned = on_disk.plan_merge(checkpoint, weighted, options)
    if output is None or dry_run:
        where = Path.cwd() if output is None else on_disk.check_output(checkpoint, output)
        free = on_disk.free_bytes(where)
        if as_json:
            print_json({**planned.to_dict(), "free_bytes": free})
        else:
            print_merge_plan(planned, where, free, everything=everything)
        return
    with progress_bar("merging") as progress:
        report = on_disk.merge_planned(planned, output, progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print_merge(report, everything=everything)


@app.command()
def verify(
    base: BasePath,
    adapters: AdapterPaths,
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="The folder to check.")],
    merging: Merging,
    reading: Reading,
    as_json: Json = False,
) -> None:
    """Check that MERGED is what merging ADAPTER into BASE would write.

    Every touched tensor is computed again, every other byte is compared. Give the options that the
    merge was given.
    """
    from lora_inject.checkpoint import verify_checkpoint
    from lora_inject.cli.show import print_json, print_verification, progress_bar

    options = merging.options()
    checkpoint, weighted = merging.read(base, adapters, reading)
    with progress_bar("verifying") as progress:
        report = verify_checkpoint(checkpoint, weighted, merged, options=options, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print_verification(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def extract(
    base: BasePath,
    tuned: Annotated[
        Path, typer.Argument(metavar="TUNED", help="Folder of the fine-tuned checkpoint.")
    ],
    writing: Writing,
    keeping: Keeping,
    full: Annotated[
        bool, typer.Option("--full", help="Store other tensors in full: norms, biases.")
    ] = False,
    everything: All = False,
    as_json: Json = False,
) -> None:
    """Store the difference of TUNED and BASE as a low-rank adapter."""
    from lora_inject.checkpoint import extract_adapter
    from lora_inject.cli.show import print_extraction, print_json, progress_bar

    with progress_bar("extracting") as progress:
        report = extract_adapter(
            base,
            tuned,
            writing.output,
            rank=keeping.rank,
            energy=keeping.energy,
            full=full,
            format=writing.adapter_format,
            overwrite=writing.overwrite,
            progress=progress,
        )
    if as_json:
        print_json({"output": str(writing.output), **report.to_dict()})
    else:
        print_extraction(report, writing.output, everything=everything)


def _pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """Read `OLD=NEW` pairs."""
    pairs = {}
    for text in given or ():
        old, equals, new = text.partition("=")
        if not equals or (option == "--tie" and not (old and new)):
            raise typer.BadParameter(f"{text!r} is not a pair, such as a.=b.", param_hint=option)
        pairs[old] = new
    return pairs


def _weights(weights: list[float] | None, n_adapters: int) -> list[float]:
    """One weight for each adapter."""
    if not weights:
        return [1.0] * n_adapters
    if len(weights) != n_adapters:
        found = f"{len(weights)} weights for {n_adapters} adapters"
        raise typer.BadParameter(f"{found}; give --weight once for each", param_hint="--weight")
    if bad := [w for w in weights if not math.isfinite(w) or w == 0]:
        raise typer.BadParameter(f"{bad[0]} is not a weight", param_hint="--weight")
    return weights

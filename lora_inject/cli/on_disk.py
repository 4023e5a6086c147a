"""Commands that work on checkpoints: `merge`, `verify`, `extract`.

One idea: a command is its arguments, one call of `lora_inject.checkpoint`, and printing.

What is not here: how results look (`show`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_inject.cli.program import Allow, Json, Prefer, app, read_options

if TYPE_CHECKING:
    from lora_inject.checkpoint import Checkpoint, Part

__all__ = ["extract", "merge", "verify"]


class Dtype(StrEnum):
    """Dtypes that a merged checkpoint can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OnLost(StrEnum):
    """What to do where rounding leaves less of a delta than asked for."""

    fail = "fail"
    warn = "warn"


BasePath = Annotated[
    Path, typer.Argument(metavar="BASE", help="Folder of the base, or one .safetensors file.")
]
AdapterPaths = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters: PEFT folders or files.")
]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weight",
        "-w",
        help="Mixing weight of an adapter; once for each, in their order. (default: 1 each)",
    ),
]
WriteDtype = Annotated[
    Dtype | None,
    typer.Option(help="Write every float tensor so. (default: as each tensor is)"),
]
CopyCode = Annotated[bool, typer.Option("--copy-code", help="Take the base's *.py files along.")]
AllowNew = Annotated[
    bool, typer.Option("--allow-new", help="Add trained tensors that the base lacks.")
]
Dequantise = Annotated[
    bool,
    typer.Option("--dequantise", help="Write a float8 base with block scales as bfloat16."),
]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="Merge although the adapter was made on another base."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that compute. (default: one a core, at most four)"),
]


@app.command()
def merge(
    base: BasePath,
    adapters: AdapterPaths,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make. Not with --dry-run.")
    ] = None,
    weight: Weights = None,
    dtype: WriteDtype = None,
    min_kept: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least share of each delta that must survive rounding."),
    ] = None,
    on_lost: Annotated[
        OnLost, typer.Option(help="Where less survives: refuse, or write and list it.")
    ] = OnLost.fail,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute everything again before publishing.")
    ] = False,
    copy_code: CopyCode = False,
    allow_new: AllowNew = False,
    dequantise: Dequantise = False,
    any_base: AnyBase = False,
    workers: Workers = None,
    prefer: Prefer = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Fold each ADAPTER into the safetensors checkpoint BASE, without building the model.

    Tensors that no adapter touches keep their bytes. Stopped at any moment, the output is absent,
    complete, or finished by the same command.
    """
    from lora_inject.checkpoint import Checkpoint, MergeOptions, merge_planned, plan_merge
    from lora_inject.cli.show import print_json, print_merge, print_merge_plan, progress_bar

    if output is None and not dry_run:
        raise typer.BadParameter("say where to write: --output FOLDER (or --dry-run)")
    options = MergeOptions(
        dtype=dtype,
        min_kept=min_kept,
        on_lost=on_lost,
        verify=verify,
        copy_code=copy_code,
        allow_new=allow_new,
        dequantise=dequantise,
        any_base=any_base,
        workers=workers,
    )
    weights = _weights(weight, len(adapters))
    checkpoint = Checkpoint.open(base)
    parts = _parts(checkpoint, adapters, weights, prefer, allow)
    planned = plan_merge(checkpoint, parts, options)
    if output is None or dry_run:
        if as_json:
            print_json(planned.to_dict())
        else:
            print_merge_plan(planned)
        return
    with progress_bar("merging") as progress:
        report = merge_planned(planned, output, progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print_merge(report)


@app.command()
def verify(
    base: BasePath,
    adapters: AdapterPaths,
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="The folder to check.")],
    weight: Weights = None,
    dtype: WriteDtype = None,
    copy_code: CopyCode = False,
    allow_new: AllowNew = False,
    dequantise: Dequantise = False,
    any_base: AnyBase = False,
    prefer: Prefer = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Check that MERGED is exactly what merging each ADAPTER into BASE would write.

    Every touched tensor is computed again, every other byte is compared. Give the options that the
    merge was given.
    """
    from lora_inject.checkpoint import Checkpoint, MergeOptions, verify_checkpoint
    from lora_inject.cli.show import print_json, print_verification, progress_bar

    options = MergeOptions(
        dtype=dtype,
        copy_code=copy_code,
        allow_new=allow_new,
        dequantise=dequantise,
        any_base=any_base,
    )
    weights = _weights(weight, len(adapters))
    checkpoint = Checkpoint.open(base)
    parts = _parts(checkpoint, adapters, weights, prefer, allow)
    with progress_bar("verifying") as progress:
        report = verify_checkpoint(checkpoint, parts, merged, options, progress)
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
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every site, at most.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of each delta to keep; the rank follows."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Store in full what is no matrix: norms, biases.")
    ] = False,
    adapter_format: Annotated[
        str, typer.Option("--format", help="Format to write the adapter in.")
    ] = "peft",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take the difference of TUNED and BASE as a low-rank adapter: the reverse of merge."""
    from lora_inject.checkpoint import extract_adapter
    from lora_inject.cli.show import print_extraction, print_json, progress_bar
    from lora_inject.formats import write_adapter

    if rank is None and energy is None:
        raise typer.BadParameter("say how much to keep: --rank, --energy, or both")
    with progress_bar("extracting") as progress:
        state, report = extract_adapter(base, tuned, rank, energy, full=full, progress=progress)
    written = write_adapter(state, output, format=adapter_format, overwrite=overwrite)
    if as_json:
        print_json({"output": str(written), **report.to_dict()})
    else:
        print_extraction(report, written)


def _weights(weights: list[float] | None, n_adapters: int) -> list[float]:
    """One weight for each adapter."""
    if not weights:
        return [1.0] * n_adapters
    if len(weights) != n_adapters:
        found = f"{len(weights)} weights for {n_adapters} adapters"
        raise typer.BadParameter(f"{found}; give --weight once for each", param_hint="--weight")
    if bad := [w for w in weights if not math.isfinite(w) or w == 0]:
        raise typer.BadParameter(f"{bad[0]} is no weight", param_hint="--weight")
    return weights


def _parts(
    base: Checkpoint,
    adapters: Sequence[Path],
    weights: Sequence[float],
    prefer: str | None,
    allow: Sequence[str] | None,
) -> list[Part]:
    """Read the adapters."""
    from lora_inject.checkpoint import load_part

    return [
        load_part(path, base, weight, **read_options(path, prefer, allow))
        for path, weight in zip(adapters, weights, strict=True)
    ]

"""Commands that work on checkpoints: `merge`, `verify`, `extract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Exit, Option

from lora_inject.checkpoint import (
    Checkpoint,
    MergeOptions,
    WeightedAdapter,
    check_output,
    extract_adapter,
    free_bytes,
    merge_planned,
    plan_merge,
    read_weighted,
    verify_checkpoint,
)
from lora_inject.cli import options
from lora_inject.cli.show import note, progress_bar, width
from lora_inject.core.spec.tables import in_bytes

BasePath = Annotated[
    Path, Argument(metavar="BASE", help="Folder of the base, or one .safetensors file.")
]


@dataclass(frozen=True)
class Merging:
    """The options that decide the bytes of a merged checkpoint, of `merge` and `verify`."""

    weight: options.Weights = None
    dtype: Annotated[
        options.Dtype | None,
        Option(help="Dtype of every float tensor. (default: as each tensor is)"),
    ] = None
    copy_code: Annotated[bool, Option(help="Copy the base's *.py files.")] = False
    allow_new: Annotated[bool, Option(help="Add trained tensors that the base lacks.")] = False
    dequantize: Annotated[
        options.Dtype | None, Option(help="Write a quantized base as plain floats of this dtype.")
    ] = None
    requantize: Annotated[
        bool, Option(help="Quantize merged weights again, in the base's format.")
    ] = False
    any_base: options.AnyBase = False
    rename: Annotated[
        list[str] | None,
        Option(
            metavar="OLD=NEW",
            help="Literal prefix of the adapters' names, and of the base's; not a regex. "
            "(default: by its class)",
        ),
    ] = None
    tie: Annotated[
        list[str] | None,
        Option(
            metavar="ABSENT=STORED",
            help="A tensor that the files lack and the one that it equals; or: none. (default: by "
            "the base's class)",
        ),
    ] = None

    def merge_options(self, **more: Any) -> MergeOptions:
        """Return these and other options as the package takes them."""
        names = ("dtype", "copy_code", "allow_new", "dequantize", "requantize", "any_base")
        more |= {name: getattr(self, name) for name in names}
        more["rename"] = options.pairs_from(self.rename or (), "--rename", "a.=b.")
        if self.tie:  # else the base's class decides; an empty table means that nothing is tied
            ties = [] if self.tie == ["none"] else self.tie
            more["tie"] = options.pairs_from(ties, "--tie", "a.=b.", whole="old new")
        return MergeOptions(**more)

    def read(
        self,
        base: Path,
        adapters: Sequence[Path],
        reading: options.ReadOptions,
        output: Path | None = None,
        *,
        overwrite: bool = False,
    ) -> tuple[Checkpoint, list[WeightedAdapter]]:
        """Open the base, check the output and read the adapters."""
        weights = options.weights_for(adapters, self.weight)
        checkpoint = Checkpoint.open(options.model_folder(base))
        if output is not None:
            check_output(checkpoint, output, overwrite=overwrite)
        rows = zip(adapters, weights, reading.options(adapters), strict=True)
        return checkpoint, [read_weighted(path, checkpoint, w, **how) for path, w, how in rows]


def merge(
    base: BasePath,
    adapters: options.AdapterPaths,
    *,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder to make. Not with --dry-run.")
    ] = None,
    dry_run: Annotated[bool, Option(help="Check everything, print the plan and stop.")] = False,
    verify: Annotated[bool, Option(help="Compute everything again before publishing.")] = False,
    overwrite: Annotated[
        bool, Option(help="Replace a checkpoint that is there, once the new one is complete.")
    ] = False,
    merging: Merging,
    min_kept: Annotated[
        float | None,
        Option(min=0, max=1, help="Least share of each delta that must survive rounding."),
    ] = None,
    workers: Annotated[
        int | None, Option(min=1, help="Threads. (default: one per core, at most four)")
    ] = None,
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    """BASE is a folder of safetensors files, or one such file.

    Tensors that no adapter touches keep their bytes. Stopped at any moment, the output is absent or
    complete.
    """
    if output is None and not dry_run:
        raise BadParameter("say where to write: --output FOLDER (or --dry-run)")
    given = merging.merge_options(min_kept=min_kept, verify=verify, workers=workers)
    checkpoint, weighted = merging.read(base, adapters, reading, output, overwrite=overwrite)
    planned = plan_merge(checkpoint, weighted, given)
    if output is None or dry_run:
        where = output or Path.cwd()
        free = free_bytes(where)
        room = "free" if free >= planned.n_bytes else "free, which is NOT enough,"
        text = planned.text(width(), everything=listing.everything)
        text += f"\n{in_bytes(free)} {room} on the disk of '{where}'; nothing was written"
        listing.print({**planned.to_dict(), "free_bytes": free}, text)
        return
    with progress_bar("merging") as progress:
        report = merge_planned(planned, output, progress, overwrite=overwrite)
    listing.show(report)
    if report.warning:
        note(f"warning: {report.warning}")


def verify(
    base: BasePath,
    adapters: options.AdapterPaths,
    merged: Annotated[Path, Argument(metavar="MERGED", help="The folder to check.")],
    merging: Merging,
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    """Every touched tensor is computed again, every other byte is compared.

    Give the options that the merge was given.
    """
    checkpoint, weighted = merging.read(base, adapters, reading)
    with progress_bar("verifying") as progress:
        report = verify_checkpoint(
            checkpoint, weighted, merged, options=merging.merge_options(), progress=progress
        )
    listing.show(report)
    if report.problems:
        raise Exit(1)


def extract(
    base: BasePath,
    tuned: Annotated[Path, Argument(metavar="TUNED", help="Folder of the fine-tuned checkpoint.")],
    writing: options.Writing,
    keeping: options.Keeping,
    full: Annotated[bool, Option(help="Store other tensors in full: norms, biases.")] = False,
    square: Annotated[
        str | None,
        Option(
            help="What layers of square weights are, if no class says: linear, conv1d, embedding"
        ),
    ] = None,
    *,
    listing: options.ListOutput,
) -> None:
    with progress_bar("extracting") as progress:
        report = extract_adapter(
            options.model_folder(base),
            options.model_folder(tuned),
            writing.output,
            rank=keeping.rank,
            energy=keeping.energy,
            full=full,
            square=square,
            format=writing.adapter_format,
            overwrite=writing.overwrite,
            progress=progress,
        )
    listing.show(report, output=str(writing.output))
    note(f"wrote {writing.output}")

"""Commands that work on checkpoints: `merge`, `verify`, `extract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Exit, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app

if TYPE_CHECKING:
    from lora_inject.checkpoint import Checkpoint, MergeOptions, WeightedAdapter

BasePath = Annotated[
    Path, Argument(metavar="BASE", help="Folder of the base, or one .safetensors file.")
]


@dataclass(frozen=True)
class Merging:
    """The options that decide the bytes of a merged checkpoint, of `merge` and `verify`."""

    weight: given.Weights = None
    dtype: Annotated[
        given.Dtype | None, Option(help="Dtype of every float tensor. (default: as each tensor is)")
    ] = None
    copy_code: Annotated[bool, Option(help="Copy the base's *.py files.")] = False
    allow_new: Annotated[bool, Option(help="Add trained tensors that the base lacks.")] = False
    dequantize: Annotated[
        given.Dtype | None, Option(help="Write a quantized base as plain floats of this dtype.")
    ] = None
    requantize: Annotated[
        bool, Option(help="Quantize merged weights again, in the base's format.")
    ] = False
    any_base: given.AnyBase = False
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

    def options(self, **more: Any) -> MergeOptions:
        """Return these and other options as keywords of the package."""
        from lora_inject.checkpoint import MergeOptions

        names = ("dtype", "copy_code", "allow_new", "dequantize", "requantize", "any_base")
        more |= {name: getattr(self, name) for name in names}
        more["rename"] = given.pairs_from(self.rename or (), "--rename", "a.=b.")
        if self.tie:  # else the base's class decides; an empty table means that nothing is tied
            ties = [] if self.tie == ["none"] else self.tie
            more["tie"] = given.pairs_from(ties, "--tie", "a.=b.", whole="old new")
        return MergeOptions(**more)

    def read(
        self,
        base: Path,
        adapters: Sequence[Path],
        reading: given.ReadOptions,
        output: Path | None = None,
        *,
        overwrite: bool = False,
    ) -> tuple[Checkpoint, list[WeightedAdapter]]:
        """Open the base, check the output and read the adapters."""
        from lora_inject.checkpoint import Checkpoint, check_output, read_weighted

        weights = given.weights_for(adapters, self.weight)
        checkpoint = Checkpoint.open(given.model_folder(base))
        if output is not None:
            check_output(checkpoint, output, overwrite=overwrite)
        options = reading.options(adapters)
        rows = zip(adapters, weights, options, strict=True)
        return checkpoint, [read_weighted(path, checkpoint, w, **how) for path, w, how in rows]


@app.command("merge")
def merge_command(
    base: BasePath,
    adapters: given.AdapterPaths,
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
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Fold each ADAPTER into the checkpoint BASE, without the model.

    BASE is a folder of safetensors files, or one such file.

    Tensors that no adapter touches keep their bytes. Stopped at any moment, the output is absent,
    complete, or finished by the same command.
    """
    from lora_inject.checkpoint import free_bytes, merge_planned, plan_merge

    if output is None and not dry_run:
        raise BadParameter("say where to write: --output FOLDER (or --dry-run)")
    options = merging.options(min_kept=min_kept, verify=verify, workers=workers)
    checkpoint, weighted = merging.read(base, adapters, reading, output, overwrite=overwrite)
    planned = plan_merge(checkpoint, weighted, options)
    if output is None or dry_run:
        where = output or Path.cwd()
        free = free_bytes(where)
        data = {**planned.to_dict(), "free_bytes": free}
        listing.show(data, show.print_merge_plan, planned, where, free)
        return
    with show.progress_bar("merging") as progress:
        report = merge_planned(planned, output, progress, overwrite=overwrite)
    listing.show(report.to_dict(), show.print_merge, report)


@app.command()
def verify(
    base: BasePath,
    adapters: given.AdapterPaths,
    merged: Annotated[Path, Argument(metavar="MERGED", help="The folder to check.")],
    merging: Merging,
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Check that MERGED is what merging ADAPTER into BASE would write.

    Every touched tensor is computed again, every other byte is compared. Give the options that the
    merge was given.
    """
    from lora_inject.checkpoint import verify_checkpoint

    options = merging.options()
    checkpoint, weighted = merging.read(base, adapters, reading)
    with show.progress_bar("verifying") as progress:
        report = verify_checkpoint(checkpoint, weighted, merged, options=options, progress=progress)
    listing.show(report.to_dict(), show.print_verification, report)
    if report.problems:
        raise Exit(1)


@app.command()
def extract(
    base: BasePath,
    tuned: Annotated[Path, Argument(metavar="TUNED", help="Folder of the fine-tuned checkpoint.")],
    writing: given.Writing,
    keeping: given.Keeping,
    full: Annotated[bool, Option(help="Store other tensors in full: norms, biases.")] = False,
    *,
    listing: given.ListOutput,
) -> None:
    """Store the difference of TUNED and BASE as a low-rank adapter."""
    from lora_inject.checkpoint import extract_adapter

    how: dict[str, Any] = {"rank": keeping.rank, "energy": keeping.energy, "full": full}
    how |= {"format": writing.adapter_format, "overwrite": writing.overwrite}
    with show.progress_bar("extracting") as progress:
        report = extract_adapter(
            given.model_folder(base),
            given.model_folder(tuned),
            writing.output,
            **how,
            progress=progress,
        )
    data = {"output": str(writing.output), **report.to_dict()}
    listing.show(data, show.print_extraction, report, writing.output)

"""Commands that change nothing: `plan`, `advise`, `inspect`, `analyze`, `schema`.

The package is imported inside the commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app

if TYPE_CHECKING:
    from lora_inject.analysis import Analysis, Comparison
    from lora_inject.core.spec.inventory import Inventory


@app.command("plan")
def plan_command(
    config: Annotated[Path, Argument(metavar="CONFIG", help="The config, a YAML file.")],
    model: Annotated[
        Path,
        Argument(
            metavar="MODEL",
            help="Folder or file: a config.json of transformers, a .safetensors file or its index.",
        ),
    ],
    keys: Annotated[
        bool, Option(help="Plan on the names in the checkpoint, not on config.json.")
    ] = False,
    *,
    listing: given.ListOutput,
) -> None:
    """List the layers of MODEL that CONFIG selects. Reads no weights, changes nothing."""
    from lora_inject.core.spec.config import Config
    from lora_inject.core.spec.resolve import resolve

    wanted = Config.from_yaml(config)
    planned = resolve(wanted, _inventory_of(given.model_folder(model), keys=keys))
    listing.show(planned.to_dict(), show.print_plan, planned)


@app.command("advise")
def advise_command(
    model: Annotated[Path, Argument(metavar="MODEL", help="Folder or file, as for plan.")],
    budget: Annotated[
        str, Option(metavar="N", help="Most parameters in A and B, such as 170k or 1.5M.")
    ],
    purpose: Annotated[
        str,
        Option(
            "--for",
            help="What it is trained for: sft, rl or classify.",
            callback=given.one_of(("sft", "rl", "classify")),
        ),
    ] = "sft",
) -> None:
    """Print a config to start from, within a budget, with what is known of its learning rate.

    One rank on all linear layers and experts of MODEL.
    """
    from lora_inject.trials.advise import advised, remarks

    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", budget)
    if number is None:
        raise BadParameter(f"{budget!r} is not a number such as 170k", param_hint="--budget")
    most = int(float(number[1]) * {"": 1, "k": 1000, "m": 1_000_000}[number[2].lower()])
    inventory = _inventory_of(given.model_folder(model))
    config = advised(inventory, most, purpose)
    for remark in remarks(inventory, config):
        show.say(textwrap.fill(remark, 88, initial_indent="# ", subsequent_indent="#   "))
    show.say(config.to_yaml().rstrip())


def _inventory_of(path: Path, *, keys: bool = False) -> Inventory:
    """Return the names and shapes of a model that is never loaded; print what they come from.

    A `config.json` is enough to build the model on the meta device, where every kind of layer is
    known. If there is only a checkpoint, or with `keys`, kinds are assumed from its keys.
    """
    from lora_inject.checkpoint import Checkpoint
    from lora_inject.checkpoint.base_class import meta_model
    from lora_inject.checkpoint.index import INDEX_SUFFIX, read_config
    from lora_inject.core.layers.candidates import inventory
    from lora_inject.core.layers.survey import Survey
    from lora_inject.core.spec.key_lists import inventory_of
    from lora_inject.errors import CheckpointError

    if not path.exists():
        asked = f"plan on '{path}'"
        raise CheckpointError(asked, "there is no such file or folder", "Check the path")
    folder = path if path.is_dir() else path.parent
    is_keys = path.name.endswith(INDEX_SUFFIX) or path.suffix == ".safetensors"
    if path.is_dir():
        is_keys = not os.path.lexists(path / "config.json")
    if keys or is_keys:  # of an index or a config, those of the folder that it lies in
        checkpoint = Checkpoint.open(path if path.suffix == ".safetensors" else folder)
        shapes = {entry.name: entry.shape for entry in checkpoint}
        n_files = len(checkpoint.shards)
        show.note(f"planned on {len(shapes):,} keys of {n_files:,} safetensors file(s)")
        return inventory_of(shapes)
    config = read_config(folder, path.name if path.is_file() else "config.json")
    remedy = "pass --keys to plan on the names in the checkpoint"
    model = meta_model(config, f"build the model of '{path}'", remedy)
    show.note(f"planned on {type(model).__name__}, built from its config.json")
    return inventory(Survey(model))


@app.command()
def inspect(
    adapter: given.AdapterPath,
    *,
    base: Annotated[
        Path | None, Option(help="The base, where a file of stacked experts names no weights.")
    ] = None,
    adapter_format: Annotated[
        str | None,
        Option(
            "--format",
            help="Format of the adapter. (default: detected from the files)",
            callback=given.one_of(given.FORMATS),
        ),
    ] = None,
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Show the sites, ranks, norms and non-finite values of ADAPTER."""
    from lora_inject.analysis.inspection import inspect_state
    from lora_inject.checkpoint import Checkpoint

    checkpoint = None if base is None else Checkpoint.open(given.model_folder(base))
    [state] = reading.read([adapter], checkpoint, format=adapter_format)
    inspection = inspect_state(state)
    listing.show(inspection.to_dict(), show.print_inspection, inspection)


@app.command("analyze")
def analyze_command(
    adapter: given.AdapterPath,
    other: Annotated[
        Path | None, Argument(metavar="OTHER", help="Another adapter of the same base, to compare.")
    ] = None,
    *,
    base: Annotated[
        Path | None, Option(help="Folder or file of the base: compare updates with its weights.")
    ] = None,
    report: Annotated[
        Path | None, Option(help="Write a report, one HTML file; replaces an existing one.")
    ] = None,
    pictures: Annotated[
        Path | None, Option(help="Draw the paper's figures into this folder.")
    ] = None,
    any_base: given.AnyBase = False,
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Show what ADAPTER has learned: needed rank, spectra, subspaces.

    With --base also the size of the update compared with W, the directions that it amplifies, and
    the part that a merge in 16, 8 and 4 bits keeps. With OTHER also the overlap of the subspaces.
    """
    from lora_inject import analysis
    from lora_inject.checkpoint import Checkpoint

    if any_base and base is None:
        raise BadParameter("it needs --base", param_hint="--any-base")
    _check_outputs(report, pictures)
    weights, comparison, written = None, None, list[Path]()
    checkpoint = None if base is None else Checkpoint.open(given.model_folder(base))
    paths = [adapter] if other is None else [adapter, other]
    state, *others = reading.read(paths, checkpoint)
    if checkpoint is not None:
        weights = analysis.Weights(state, checkpoint, str(adapter), any_base=any_base)
    with show.progress_bar("analyzing") as progress:
        figures = analysis.analyze(state, weights, label=str(adapter), progress=progress)
    for second in others:
        with show.progress_bar("comparing") as progress:
            comparison = analysis.compare(state, second, progress)
    if pictures is not None:
        written += analysis.draw_gallery(pictures, state, comparison=comparison, weights=weights)
    if report is not None:
        name = other.name if other else "the other adapter"
        title = "/".join(adapter.parts[-2:])  # the name alone may be `adapter`
        page = analysis.report(figures, state, title, comparison=comparison, other=name)
        written.append(analysis.write_report(report, page))
    _show_analysis(listing, figures, comparison, written)


def _check_outputs(report: Path | None, pictures: Path | None) -> None:
    """Refuse what cannot be written, before anything is computed."""
    from lora_inject import analysis

    if report is not None and report.is_dir():
        raise BadParameter(f"'{report}' is a folder", param_hint="--report")
    if pictures is not None or report is not None:
        analysis.need_matplotlib()


def _show_analysis(
    listing: given.ListOutput,
    figures: Analysis,
    comparison: Comparison | None,
    written: Sequence[Path],
) -> None:
    from lora_inject import analysis

    more = {
        "findings": [finding.to_dict() for finding in analysis.findings(figures)],
        "comparison": None if comparison is None else comparison.to_dict(),
        "written": [str(path) for path in written],
    }
    listing.show({**figures.to_dict(), **more}, show.print_analysis, figures, comparison)
    for path in written:
        show.note(f"wrote {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from lora_inject.core.spec.schema import json_schema

    show.print_json(json_schema())

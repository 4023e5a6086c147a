"""Commands that change nothing: `plan`, `inspect`, `analyze`, `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from lora_inject import analysis
from lora_inject.analysis.pictures import need_matplotlib
from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.base_class import meta_model
from lora_inject.checkpoint.index import read_config
from lora_inject.cli import options
from lora_inject.cli.options import one_of
from lora_inject.cli.show import note, progress_bar, say
from lora_inject.core.files.atomic import write_file
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.config import CONFIGS, Config
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import CheckpointError, user_path
from lora_inject.formats.exchange import FORMATS


def plan(
    config: Annotated[Path, Argument(metavar="CONFIG", help="The config, a YAML file.")],
    model: Annotated[
        Path,
        Argument(
            metavar="MODEL",
            help="Folder of a model of transformers, or its config.json.",
        ),
    ],
    *,
    listing: options.ListOutput,
) -> None:
    """Reads no weights, changes nothing."""
    wanted = Config.from_yaml(config)
    listing.show(resolve(wanted, _inventory_of(options.model_folder(model))))


def _inventory_of(path: Path) -> Inventory:
    """Return the names and shapes of a model that is never loaded; print what they come from.

    A `config.json` is enough to build the model on the meta device, where every kind of layer is
    known.
    """
    folder = path if path.is_dir() else path.parent
    name = path.name if path.suffix == ".json" else "config.json"
    if not (folder / name).exists():
        problem, remedy = f"there is no {name}", "Give the folder of a model of transformers"
        raise CheckpointError(f"plan on '{path}'", problem, remedy)
    remedy = "load the model and call lora_inject.plan(model, config)"
    model = meta_model(read_config(folder, name), f"build the model of '{path}'", remedy)
    note(f"planned on {type(model).__name__}, built from its config.json")
    return inventory(Survey(model))


def inspect(
    adapter: options.AdapterPath,
    *,
    base: Annotated[
        Path | None, Option(help="The base, where a file of stacked experts names no weights.")
    ] = None,
    adapter_format: Annotated[
        str | None,
        Option(
            "--format",
            help="Format of the adapter. (default: detected from the files)",
            callback=one_of(FORMATS),
        ),
    ] = None,
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    checkpoint = None if base is None else Checkpoint.open(options.model_folder(base))
    [state] = reading.read([adapter], checkpoint, format=adapter_format)
    listing.show(analysis.inspect_state(state))


def analyze(
    adapter: options.AdapterPath,
    *,
    base: Annotated[
        Path | None, Option(help="Folder or file of the base: compare updates with its weights.")
    ] = None,
    report: Annotated[
        Path | None, Option(help="Write a report, one HTML file; replaces an existing one.")
    ] = None,
    any_base: options.AnyBase = False,
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    """With --base also its size compared with W, and what a merge in 16 bits keeps.

    `diff` compares two adapters.
    """
    if any_base and base is None:
        raise BadParameter("it needs --base", param_hint="--any-base")
    if report is not None and report.is_dir():
        raise BadParameter(f"'{report}' is a folder", param_hint="--report")
    if report is not None:
        need_matplotlib()  # before anything is computed
    checkpoint = None if base is None else Checkpoint.open(options.model_folder(base))
    [state] = reading.read([adapter], checkpoint)
    with progress_bar("analyzing") as progress:
        figures = analysis.analyze(
            state, checkpoint, any_base=any_base, label=str(adapter), progress=progress
        )
    written = []
    if report is not None:
        # The last name alone may be `adapter`.
        page = analysis.report(figures, state, "/".join(adapter.parts[-2:]))
        path = user_path("write report", report)
        written = [str(write_file(path, page.encode(), overwrite=True))]
    listing.show(figures, written=written)
    for file in written:
        note(f"wrote {file}")


def schema() -> None:
    say((CONFIGS / "schema.json").read_text(encoding="utf-8").rstrip())

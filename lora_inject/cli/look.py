"""Commands that look: `plan`, `inspect`, `schema`.

A command is its arguments, one call of the package, and printing. The package is imported inside
the commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

AdapterFormat = Annotated[
    str | None,
    typer.Option("--format", help="Format of the adapter. (default: detected from the files)"),
]


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The config, a YAML file.")],
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder or file: a config.json of transformers, a .safetensors file or its index.",
        ),
    ],
    keys: Annotated[
        bool,
        typer.Option("--keys", help="Plan on the names in the checkpoint, not on config.json."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the layers of MODEL that CONFIG selects. Reads no weights, changes nothing."""
    from lora_inject.cli.models import source_of
    from lora_inject.cli.show import note, print_json, say, width
    from lora_inject.spec.config import Config
    from lora_inject.spec.matching import resolve

    wanted = Config.from_yaml(config)
    source = source_of(model, keys=keys)
    note(f"planned on {source.about}")
    planned = resolve(wanted, source.inventory)
    if as_json:
        print_json(planned.to_dict())
    else:
        say(planned.text(width()))


@app.command()
def inspect(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or an adapter's file.")
    ],
    adapter_format: AdapterFormat = None,
    prefer: Prefer = None,
    allow: Allow = None,
    alpha: Alpha = None,
    allow_pickle: AllowPickle = False,
    fan_in_fan_out: FanInFanOut = None,
    enable_lora: EnableLora = None,
    everything: All = False,
    as_json: Json = False,
) -> None:
    """Show the sites, ranks, norms and non-finite values of ADAPTER."""
    from lora_inject.analysis.inspection import inspect_state
    from lora_inject.cli.show import print_inspection, print_json
    from lora_inject.formats import read_adapter

    options = read_options(adapter, prefer, allow)
    options |= loralib_options(alpha, allow_pickle, fan_in_fan_out, enable_lora)
    found = inspect_state(read_adapter(adapter, format=adapter_format, **options))
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found, everything=everything)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors to complete and check it."""
    from lora_inject.cli.show import print_json
    from lora_inject.spec.config import Config

    print_json(Config.json_schema())

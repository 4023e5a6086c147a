"""Arguments and options of several commands: adapters, reading, printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_inject.adapter.state import AdapterState
    from lora_inject.checkpoint import Checkpoint

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
All = Annotated[bool, typer.Option("--all", help="List each site instead of each kind of site.")]
AdapterPath = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder or an adapter file.")
]


class Dtype(StrEnum):
    """Dtypes that checkpoints and adapters can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Writing:
    """Where and how to write an adapter: options of a command, as `Reading`."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the adapter.")]
    adapter_format: Annotated[str, typer.Option("--format", help="Format to write.")] = "peft"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing adapter.")] = (
        False
    )


@dataclass(frozen=True)
class Keeping:
    """How much of each delta to keep."""

    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every site, at most.")] = None
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of each delta's squares to keep; the rank follows."),
    ] = None

    def __post_init__(self) -> None:
        """Require one of the two."""
        if self.rank is None and self.energy is None:
            raise typer.BadParameter("say how much to keep: --rank, --energy, or both")


class Believe(StrEnum):
    """What to believe where a PEFT folder's metadata and adapter_config.json disagree."""

    metadata = "metadata"
    config = "config"


@dataclass(frozen=True)
class Reading:
    """How to read adapters: options of a command."""

    prefer: Annotated[
        Believe | None,
        typer.Option(help="PEFT folders: what to believe where metadata and config disagree."),
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="PEFT folders: accept this unknown field of adapter_config.json; may be repeated.",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(help="loralib files: the lora_alpha of the layers, which the file lacks."),
    ] = None
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read a pickle, as tensors only."),
    ] = False
    fan_in_fan_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="loralib files: a layer, or the end of its name, whose weight is (in, out).",
        ),
    ] = None
    expert_major: Annotated[
        bool,
        typer.Option(
            "--expert-major",
            help="PEFT folders: a stacked B has its columns by expert, as unsloth writes them.",
        ),
    ] = False
    enable_lora: Annotated[
        str | None,
        typer.Option(
            metavar="FLAGS",
            help="loralib files: enable_lora of the fused layers, such as 1,0,1.",
        ),
    ] = None

    def options(self, paths: Sequence[Path], known: str | None = None) -> list[dict[str, Any]]:
        """Return for each adapter the given options that its format takes.

        `known` is the format; by default it is detected.
        """
        from lora_inject.errors import FormatError
        from lora_inject.formats import FORMATS, detected, taken_by

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {k: v for k, v in values.items() if v is not None and v is not False and v != []}
        if self.enable_lora is not None:
            flags = self.enable_lora.split(",")
            if set(flags) - {"0", "1"}:
                found = f"{self.enable_lora!r} is not a list of 0 and 1, such as 1,0,1"
                raise typer.BadParameter(found, param_hint="--enable-lora")
            given["enable_lora"] = [flag == "1" for flag in flags]
        taken: list[dict[str, Any]] = []
        for path in paths:
            try:
                taken.append(taken_by(FORMATS[known or detected(path)].read, given))
            except (FormatError, KeyError):  # reading it will report the error
                taken.append({})
        for name in given:
            if not any(name in options for options in taken):
                hint = f"--{name.replace('_', '-')}"
                found = "no adapter has a format with this option"
                raise typer.BadParameter(found, param_hint=hint)
        return taken

    def read(
        self, paths: Sequence[Path], base: Checkpoint | None = None, **more: Any
    ) -> list[AdapterState]:
        """Read adapters; a base resolves the weights of stacked experts."""
        from lora_inject.checkpoint import read_weighted
        from lora_inject.formats import read_adapter

        states = []
        for path, options in zip(paths, self.options(paths, more.get("format")), strict=True):
            options |= {name: value for name, value in more.items() if value is not None}
            states.append(
                read_adapter(path, **options)
                if base is None
                else read_weighted(path, base, **options).state
            )
        return states

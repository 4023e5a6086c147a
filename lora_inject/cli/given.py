"""What several commands take: adapters, how to read them, and how to print results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_inject.adapter.state import AdapterState
    from lora_inject.checkpoint import Checkpoint

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
All = Annotated[bool, typer.Option("--all", help="List each site instead of each kind of site.")]
AdapterPath = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or an adapter's file.")
]


class Believe(StrEnum):
    """Where the metadata of a PEFT folder's tensors and its adapter_config.json disagree."""

    metadata = "metadata"
    config = "config"


@dataclass(frozen=True)
class Reading:
    """How to read adapters: a parameter of a command that gives it all these options."""

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
        typer.Option("--allow-pickle", help="loralib files: read a pickle, as tensors only."),
    ] = False
    fan_in_fan_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="loralib files: a layer, or the end of its name, whose weight is (in, out).",
        ),
    ] = None
    enable_lora: Annotated[
        str | None,
        typer.Option(
            metavar="FLAGS",
            help="loralib files: enable_lora of the fused layers, such as 1,0,1.",
        ),
    ] = None

    def options(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """Return for each of some adapters what was given of the options of its format."""
        from lora_inject.formats import FORMATS

        of_peft, of_loralib = (
            self._given("prefer", "allow"),
            self._given("alpha", "allow_pickle", "fan_in_fan_out"),
        )
        if self.enable_lora is not None:
            flags = self.enable_lora.split(",")
            if set(flags) - {"0", "1"}:
                found = f"{self.enable_lora!r} is not a list of 0 and 1, such as 1,0,1"
                raise typer.BadParameter(found, param_hint="--enable-lora")
            of_loralib["enable_lora"] = [flag == "1" for flag in flags]
        is_loralib = [FORMATS["loralib"].detects(path) for path in paths]
        if of_loralib and not any(is_loralib):
            name = next(iter(of_loralib)).replace("_", "-")
            raise typer.BadParameter("no adapter is a loralib file", param_hint=f"--{name}")
        if of_peft and (others := [p for p in paths if not (p / "adapter_config.json").is_file()]):
            found = f"'{others[0]}' is not a PEFT folder"
            raise typer.BadParameter(found, param_hint=f"--{next(iter(of_peft))}")
        return [{**of_peft, **(of_loralib if own else {})} for own in is_loralib]

    def _given(self, *names: str) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in names}
        return {name: v for name, v in found.items() if v not in (None, False, [])}

    def read(
        self, paths: Sequence[Path], base: Checkpoint | None = None, **more: Any
    ) -> list[AdapterState]:
        """Read adapters; a base tells which weights a file of stacked experts means."""
        from lora_inject.checkpoint import read_weighted
        from lora_inject.formats import read_adapter

        states = []
        for path, options in zip(paths, self.options(paths), strict=True):
            options |= {name: value for name, value in more.items() if value is not None}
            states.append(
                read_adapter(path, **options)
                if base is None
                else read_weighted(path, base, **options).state
            )
        return states

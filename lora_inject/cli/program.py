"""The program itself: its name, its exit codes, and what all commands share.

Exit codes are part of the interface. 0: done. 1: refused, with the message of the error
and no traceback. 2: wrong usage. 130: interrupted. A traceback is a defect of this package.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lora_inject.errors import LoraInjectError
from lora_inject.version import __version__


class _Commands(TyperGroup):
    """Turns what this package raises on purpose into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LoraInjectError as error:
            public = next(c for c in type(error).__mro__ if not c.__name__.startswith("_"))
            typer.echo(f"{public.__name__}: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
                raise
            place = f"'{error.filename}'" if error.filename else "the output"
            typer.echo(
                f"read or write {place}: {error.strerror or error}. Check the path and the disk, "
                "and run again.",
                err=True,
            )
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    name="lora-inject",
    help="Put LoRA adapters onto torch models, look at them, and fold them into checkpoints.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class Believe(StrEnum):
    """Where the metadata of a PEFT folder's tensors and its adapter_config.json disagree."""

    metadata = "metadata"
    config = "config"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Prefer = Annotated[
    Believe | None,
    typer.Option(help="PEFT folders: what to believe where metadata and config disagree."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="PEFT folders: a field of adapter_config.json to accept though unknown."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-inject {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version  # its callback has answered
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


def read_options(path: Path, prefer: str | None, allow: Sequence[str] | None) -> dict[str, Any]:
    """What was given of the options that only PEFT's folders have."""
    options = {"prefer": prefer, "allow": allow}
    given = {key: value for key, value in options.items() if value}
    if given and not (path / "adapter_config.json").is_file():
        raise typer.BadParameter(f"'{path}' is no PEFT folder", param_hint=f"--{next(iter(given))}")
    return given


def main() -> None:
    """Run the command line and exit."""
    # Importing torch makes a quarter of a million objects that live on: collections on the way find
    # nothing, and cost 0.15 s.
    gc.set_threshold(400_000)
    try:
        app(prog_name="lora-inject")
    except SystemExit as left:
        _leave(left.code if isinstance(left.code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Exit without taking torch apart object by object, which costs 0.3 s for every command."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by whoever started us
                stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)

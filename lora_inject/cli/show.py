"""How results are printed: text for people, JSON for machines, a progress bar.

Only the result goes to stdout, so it can be piped; progress and remarks go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from lora_inject.core.spec.names import printable

WIDTH = 80  # where stdout is not a terminal


def say(text: str = "", *, err: bool = False) -> None:
    """Print text, with escape sequences and other unprintable characters escaped.

    Every line of this program is printed here, and names come from untrusted files.
    """
    _write(printable(text, keep="\n"), err=err)


def _write(text: str, *, err: bool = False) -> None:
    """Write text; if its reader has closed the pipe, the command goes on without output."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        stream = sys.stderr if err else sys.stdout
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def note(text: str) -> None:
    """Print a remark on stderr."""
    say(text, err=True)


def print_json(data: object) -> None:
    """Print plain data as JSON, with null for numbers that are not finite."""
    _write(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def is_live() -> bool:
    """Return whether stderr is a terminal, or rich is told to treat it as one."""
    from rich.console import Console

    return Console(stderr=True).is_terminal


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on stderr while the body runs, if stderr is a terminal.

    Yields a function of bytes done and bytes in all, for any thread.
    """
    if not is_live():  # rich 14.0 ends a bar that is switched off by an empty line
        yield lambda *_: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    shown = (bars.TextColumn("{task.description}"), bars.BarColumn(), *columns)
    how: Any = {"console": Console(stderr=True), "transient": True}
    with bars.Progress(*shown, **how) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def width() -> int:
    """Return the columns of the terminal."""
    return shutil.get_terminal_size((WIDTH, 24)).columns

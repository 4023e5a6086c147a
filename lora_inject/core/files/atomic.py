"""Write one file atomically: under a temporary name in its folder, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lora_inject.core.files.disk import create_file, replace_file
from lora_inject.errors import FormatError


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuse a target that holds anything, unless it may be replaced; return it, links resolved."""
    target = Path(os.path.realpath(path))
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        remedy = "Choose another path, or pass overwrite=True to replace an adapter"
        raise FormatError(f"write '{target}'", "it exists already", remedy)
    return target


def write_file(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Write one file in one step; parents are made. Returns the path with links resolved."""
    target = check_free(path, overwrite=overwrite)
    if target.is_dir():
        raise FormatError(f"write '{target}'", "it is a directory", "Give the name of a file")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            replace_file(target, content)
            return target
        try:
            create_file(target, content)
        except FileExistsError:
            check_free(target)
    return target


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Raise an error of the system, such as a full disk, as a `FormatError`."""
    try:
        yield
    except OSError as error:
        from lora_inject.core.files.system_errors import remedy_for

        problem = error.strerror or str(error)
        raise FormatError(f"write '{target}'", problem, remedy_for(error)) from error

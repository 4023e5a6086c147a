"""Why a path is no adapter of a known format, and what to do."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable
from pathlib import Path

from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import FormatError


def why_none(path: Path, formats: Iterable[str]) -> tuple[str, str]:
    """Return what a path is instead, and what to give."""
    if not path.exists():
        beside = sorted(path.parent.glob(f"{glob.escape(path.name)}.*")) if path.name else []
        remedy = f"Give '{beside[0]}'" if len(beside) == 1 else "Check the path"
        return "there is no such file or directory", remedy
    if path.is_dir() and (path / "config.json").is_file():
        problem = "it is a model, and an adapter is due here"
        return problem, "Give an adapter; where both are given, the base is first"
    problem = "it is not an adapter of a known format"
    return problem, f"Give a folder or a file of one of: {', '.join(formats)}"


def no_such_format(name: str, known: Collection[str], asked: str) -> FormatError:
    """Return the error of a name that no format has."""
    near = ", ".join(nearest(name, known) or known)
    return FormatError(asked, f"there is no format '{name}'", f"Nearest: {near}")

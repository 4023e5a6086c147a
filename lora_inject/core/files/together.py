"""Several processes that write the same files: whoever comes first does, the others find them.

Each process of a group may hold the whole adapter, in whatever wrapper its model is. None knows
whether the others write as well: some programs let every process save, others only the first. So
nobody waits and nobody is chosen. What stands at the target already counts as written if it is
what this process would write, byte by byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lora_inject.errors import FormatError


def write_together(target: Path, write: Callable[[Path], Path]) -> Path:
    """Let `write` write to `target`, which another process of the group may do as well.

    Args:
        target: A file or a directory.
        write: Writes it, wherever told, and returns its path.

    Returns:
        The path, when it holds what `write` writes.

    Raises:
        FormatError: It cannot be written; or it is there, and holds something else.
    """
    try:
        return write(target)
    except FormatError as error:
        if not target.exists() or torch.distributed.get_world_size() == 1:
            raise
        with tempfile.TemporaryDirectory() as place:
            mine = file_bytes(write(Path(place, target.name)))
        if file_bytes(target) == mine:
            return target
        problem = "it is there, and another process wrote other values or somebody did before"
        remedy = "Choose another path, one for each process if each has an adapter of its own"
        raise FormatError(f"write '{target}'", problem, remedy) from error


def file_bytes(path: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a directory by its name, or of a file."""
    paths = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
    return {each.name: each.read_bytes() for each in paths}

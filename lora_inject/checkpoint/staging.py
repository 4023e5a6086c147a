"""The folder of an unfinished merge, next to its output.

Weight files and side files are written to `files` inside it, which gets the output's name in one
rename when all of them are complete. So a process that dies leaves no output, and a later run can
continue with its finished files: `manifest.json` identifies the merge, and each finished weight
file has a separate record, so several processes never write one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.output_files import OutputShard
from lora_inject.errors import CheckpointError
from lora_inject.storage.disk import fsync_dir, replace_file, write_new
from lora_inject.storage.safetensors_file import read_header
from lora_inject.storage.strict_json import read_json

SPARE_BYTES = 64 << 20
"""Left free for small files and the file system's own needs."""


def check_output(base: Checkpoint, output: Path) -> Path:
    """Return an output folder, links resolved, that can be written without changing other files.

    Raises:
        CheckpointError: It is the base, inside or around it, a file, a mount point, or not empty.
    """
    asked, folder = f"write to '{output}'", output.resolve()
    if folder == base.folder or base.folder in folder.parents or folder in base.folder.parents:
        found = f"it is the base '{base.folder}', or one is inside the other"
        raise CheckpointError(asked, found, "Give another folder")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(asked, "it is a file", "Give the name of a folder")
    if folder.is_dir():
        if names := sorted(path.name for path in folder.iterdir()):
            staging = Staging(folder)
            if not staging.files.exists():  # a process died between the rename and the end
                staging.remove()
            found = f"it is not empty ({', '.join(names[:4])})"
            raise CheckpointError(asked, found, "Give another folder, or remove this one")
        if folder.is_mount():
            found = "it is a mount point, and the output gets its name by a rename"
            raise CheckpointError(asked, found, "Give a folder inside it")
    return folder


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a disk without enough room."""
    free = free_bytes(folder)
    if free < needed_bytes + min(SPARE_BYTES, needed_bytes):
        asked = f"write {needed_bytes:,} bytes to '{folder}'"
        remedy = "Free some space, or give a folder on another disk"
        raise CheckpointError(asked, f"only {free:,} are free", remedy)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class Staging:
    """The folder of an unfinished merge into `output`; what is in `files` becomes the output."""

    def __init__(self, output: Path) -> None:
        self.output = output
        name = output.name  # shortened, as a name takes at most 255 bytes
        mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        self.folder = output.with_name(f".{name[:50]}.{mark}.merging")
        self.files = self.folder / "files"
        self._records = self.folder / "records"

    def open(self, identity: Mapping[str, Any]) -> None:
        """Create the folder, or resume the merge in it; refuse another merge's folder.

        `identity` identifies the merge, as plain data. Half-written files are removed.
        """
        for folder in (self.files, self._records):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.partial"):
            stale.unlink(missing_ok=True)
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            replace_file(manifest, json.dumps(identity, indent=1, sort_keys=True).encode())
        asked = f"resume the merge in '{self.output}'"
        known = read_json(manifest, asked, CheckpointError)
        if known != identity:
            known = known if isinstance(known, dict) else {}
            other = [name for name in identity if known.get(name) != identity[name]]
            found = f"it was of something else: {', '.join(other)} differ"
            remedy = f"Remove '{self.folder}' to begin again, or give another output folder"
            raise CheckpointError(asked, found, remedy)

    def partial(self) -> Path:
        """Return a new name for a file that is being written."""
        return self.folder / f"{secrets.token_hex(8)}.partial"

    def finish(self, partial: Path, shard: OutputShard, record: Mapping[str, Any]) -> None:
        """Add a finished, durable weight file and write its record."""
        try:
            partial.replace(self.files / shard.name)
        except FileNotFoundError:
            found = f"'{partial}' was removed: another merge works on the same output"
            remedy = "Wait until it ends; to share one merge, start both with torchrun"
            raise CheckpointError(f"write '{shard.name}'", found, remedy) from None
        fsync_dir(self.files)
        replace_file(self._record(shard), json.dumps(record, sort_keys=True).encode())

    def record(self, shard: OutputShard) -> dict[str, Any] | None:
        """Return the record of a finished weight file; None if it must be written again."""
        path, file = self._record(shard), self.files / shard.name
        if not path.exists() or not file.is_file():
            return None
        with contextlib.suppress(CheckpointError):
            if read_header(file).raw == shard.header.raw:
                return read_json(path, "resume", CheckpointError)  # type: ignore[no-any-return]
        return None

    def _record(self, shard: OutputShard) -> Path:
        return self._records / f"{hashlib.sha256(shard.name.encode()).hexdigest()[:32]}.json"

    def n_finished(self) -> int:
        """Count the finished weight files."""
        return len(list(self._records.glob("*.json")))

    def publish(self, side_files: Mapping[str, bytes]) -> None:
        """Add the other files by their relative paths, and rename all to the output in one step."""
        for name, data in side_files.items():
            path = self.files / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of an earlier attempt
            write_new(path, data)
        for folder in {(self.files / name).parent for name in side_files} | {self.files}:
            fsync_dir(folder)
        self.files.rename(self.output)  # over an empty folder as well
        fsync_dir(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""What is finished, what may be resumed, and when the output may be seen.

Everything grows in one hidden folder inside the output, `.lora_inject-merge/`, and moves
out only when all of it is there: side files, shards, the index, `config.json` last. So a process
that dies leaves an output that is absent, resumable or complete. The journal in that folder says
what the merge is of; a rerun must be of the same. Each finished shard has a record of its own, so
that several ranks never write one file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.storage.disk import fsync_dir, open_write, try_lock, write_file
from lora_inject.storage.safetensors_file import Header, read_header
from lora_inject.storage.strict_json import parse_json

STAGING = ".lora_inject-merge"
_JOURNAL = "journal.json"
_LOCK = "lock"
_TURN = "publishing"
_DIGESTS = "base.json"
_TRASH = STAGING + "-removed"
SPARE_BYTES = 64 << 20
"""Left free for small files and the file system's own needs."""


def check_output(base: Checkpoint, output: Path) -> Path:
    """Check that an output folder can be written without touching anything that is there.

    Args:
        base: The base.
        output: Where to write.

    Returns:
        The folder, links resolved.

    Raises:
        CheckpointError: It is the base, inside or around it, a file, or holds something else.
    """
    asked = f"write to '{output}'"
    folder = output.resolve()
    if folder == base.folder or base.folder in folder.parents or folder in base.folder.parents:
        raise CheckpointError(
            asked,
            f"it is the base '{base.folder}', or one is inside the other",
            "Give a folder of its own",
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(asked, "it is a file", "Give the name of a folder")
    if folder.is_dir():
        if os.access(folder, os.W_OK):  # left by a merge that was killed while tidying up
            shutil.rmtree(folder / _TRASH, ignore_errors=True)
        names = sorted(path.name for path in folder.iterdir())
        if names and STAGING not in names:
            raise CheckpointError(
                asked,
                f"it is not empty ({', '.join(names[:4])}) and holds no unfinished merge",
                "Give another folder, or remove this one",
            )
    return folder


def check_space(folder: Path, needed_bytes: int) -> int:
    """Check that the disk has room.

    Args:
        folder: Where to write; it need not exist.
        needed_bytes: What will be written.

    Returns:
        Free bytes.

    Raises:
        CheckpointError: There is not enough.
    """
    free = free_bytes(folder)
    if free < needed_bytes + min(SPARE_BYTES, needed_bytes):
        raise CheckpointError(
            f"write {needed_bytes:,} bytes to '{folder}'",
            f"only {free:,} are free",
            "Free some space, or give a folder on another disk",
        )
    return free


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class Staging:
    """The hidden folder of an unfinished merge.

    Args:
        output: The output folder, resolved.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / STAGING
        self.made_output = not output.exists()

    @contextlib.contextmanager
    def opened(self, identity: Mapping[str, Any], *, shared: bool = False) -> Iterator[Staging]:
        """Create or resume the folder, and hold its lock.

        Args:
            identity: What the merge is of, as plain data.
            shared: Let other ranks of the same merge work beside this one.

        Raises:
            CheckpointError: Another merge holds it, or it is of something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = open_write(self.folder / _LOCK)
        try:
            with try_lock(fd, shared=shared) as mine:
                if not mine or not _same_file(fd, self.folder / _LOCK):
                    raise CheckpointError(
                        f"write to '{self.output}'",
                        "another merge is writing there",
                        "Wait until it ends, or give another folder",
                    )
                self._agree(identity)
                yield self
        finally:
            os.close(fd)

    def _agree(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / _JOURNAL
        if not path.exists():
            write_file(path, json.dumps(identity, indent=1, sort_keys=True).encode())
            return
        asked = f"resume the merge in '{self.output}'"
        found = parse_json(path.read_bytes(), asked, CheckpointError)
        wanted = json.loads(json.dumps(identity))
        if found != wanted:
            raise CheckpointError(
                asked,
                f"it was of something else: {_difference(found, wanted)}",
                f"Remove '{self.folder}' to begin again, or give another folder",
            )

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Hold the right to publish; False where another rank has it, or has used it already."""
        path = self.folder / _TURN
        try:
            fd = open_write(path)
        except FileNotFoundError:
            yield False
            return
        try:
            with try_lock(fd) as mine:
                yield mine and _same_file(fd, path)
        finally:
            os.close(fd)

    def agree_on_base(self, digests: Mapping[str, str]) -> None:
        """Keep the digests of the base's files, or compare them with those of an earlier run.

        Args:
            digests: SHA-256 of each file, by its name.

        Raises:
            CheckpointError: They are not what they were.
        """
        path = self.folder / _DIGESTS
        if not path.exists():
            write_file(path, json.dumps(digests, indent=1).encode())
            return
        before = parse_json(
            path.read_bytes(), f"resume the merge in '{self.output}'", CheckpointError
        )
        if before != dict(digests):
            raise CheckpointError(
                f"resume the merge in '{self.output}'",
                f"the base's bytes are not what they were: {_difference(before, dict(digests))}",
                f"Remove '{self.folder}' to begin again, or restore the base",
            )

    def staged(self, name: str) -> Path:
        """Return where a finished file waits."""
        return self.folder / name

    def partial(self, name: str) -> Path:
        """Return where an unfinished file grows."""
        return self.folder / f"{name}.partial"

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Give a durable file its name inside the folder and write its record.

        Args:
            name: Of the file, which lies at `partial(name)`.
            record: What to remember of it.
        """
        self.partial(name).replace(self.staged(name))
        fsync_dir(self.folder)
        write_file(self.folder / f"{name}.done", json.dumps(record, sort_keys=True).encode())

    def record(self, name: str, header: Header) -> dict[str, Any] | None:
        """Return the record of a finished file, None where it has to be made again.

        Args:
            name: Of the file.
            header: What its header must be.
        """
        path = self.folder / f"{name}.done"
        if not path.exists():
            return None
        record = parse_json(path.read_bytes(), f"resume '{name}'", CheckpointError)
        for place in (self.staged(name), self.output / name):
            if place.is_file() and _is(place, header):
                return record  # type: ignore[no-any-return]
        return None

    def publish(self, names: Sequence[str], files: Mapping[str, bytes]) -> None:
        """Move everything out: side files, shards, then what makes them loadable.

        Args:
            names: The shards.
            files: Content of the other files, by path relative to the output, in the order in
                which they may be seen; the last one is what programs look for first.
        """
        last = [name for name in files if name.endswith((".index.json", "config.json"))]
        last = [name for name in last if "/" not in name and not name.startswith("generation")]
        first = [name for name in files if name not in last]
        for name in first:
            self._place(name, files[name])
        for name in names:
            if self.staged(name).exists():
                self.staged(name).replace(self.output / name)
        fsync_dir(self.output)
        for name in last:
            self._place(name, files[name])
        self.remove()

    def _place(self, name: str, data: bytes) -> None:
        waiting = self.folder / f"file-{name.replace('/', '__')}"
        write_file(waiting, data)
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        waiting.replace(target)
        fsync_dir(target.parent)

    def discard(self, name: str) -> None:
        """Remove an unfinished file; it is never written on."""
        self.partial(name).unlink(missing_ok=True)

    def n_finished(self) -> int:
        """Count the finished shards."""
        return len(list(self.folder.glob("*.done")))

    def remove(self) -> None:
        """Remove the folder, in one step as far as anyone who looks at its name can tell."""
        trash = self.output / _TRASH
        with contextlib.suppress(FileNotFoundError):
            self.folder.replace(trash)
        shutil.rmtree(trash, ignore_errors=True)
        fsync_dir(self.output)

    def abandon(self) -> None:
        """Remove everything that this merge made, and the output folder if it made that."""
        self.remove()
        if self.made_output:
            with contextlib.suppress(OSError):
                self.output.rmdir()


def _same_file(fd: int, path: Path) -> bool:
    """Return whether a descriptor is still the file of that name; false after a removal."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_ino, found.st_dev) == (mine.st_ino, mine.st_dev)


def _is(path: Path, header: Header) -> bool:
    try:
        return path.stat().st_size == header.size_bytes and read_header(path).raw == header.raw
    except CheckpointError:
        return False


def _difference(found: Any, wanted: Any, place: str = "") -> str:
    """Name the first place where two journals differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                where = f"{place}.{key}" if place else key
                return _difference(found.get(key), wanted.get(key), where)
    return f"'{place}' was {str(found)[:60]!r} and is {str(wanted)[:60]!r}"

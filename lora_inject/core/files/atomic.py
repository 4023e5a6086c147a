"""Files that are written atomically and durably: under a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_inject.errors import FormatError

_DAY = 24 * 60 * 60  # seconds


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
        try:
            _put(target, content, Path.replace if overwrite else _link)
        except FileExistsError:  # of several that write at once, one succeeds
            check_free(target)
            raise  # it was there, and is gone again
    return target


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Raise an error of the system, such as a full disk, as a `FormatError`."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        raise FormatError(f"write '{target}'", problem, remedy_for(error)) from error


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable, where the system can: not on each mount."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_new(path: Path, data: bytes) -> None:
    """Create a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_name(target: Path) -> Path:
    """Return a free name in the target's own folder, so that it can be renamed to the target."""
    return target.with_name(f".{target.name[:30]}.{secrets.token_hex(6)}.tmp")


def remove_left(target: Path) -> None:
    """Remove what writers of a name left under temporary ones when they were killed, a day ago."""
    for left in target.parent.glob(f"{glob.escape(f'.{target.name[:30]}.')}{'?' * 12}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    _put(path, data, Path.replace)


def _put(path: Path, data: bytes, name_it: Callable[[Path, Path], object]) -> None:
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        name_it(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    remove_left(path)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no links there, as in FAT
        temporary.replace(path)


_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give a folder that you may write to"),
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


def remedy_for(error: OSError) -> str:
    """Return what to do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "Check the disk and run again")

"""Files and folders that are written whole or not at all, and durably.

Each is written under a temporary name in the target's own folder, flushed to the disk, and renamed.
What is there with the same bytes counts as written: several processes of a group may save the same
adapter, and none knows whether the others do. While a folder is replaced, for a moment nothing has
its name.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lora_inject.errors import FormatError

_DAY = 24 * 60 * 60  # seconds


def write_file(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Write one file in one step; parents are made. Returns the path with links resolved."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FormatError(f"write '{target}'", "it is a directory", "Give the name of a file")
    return _write(target, content, overwrite=overwrite)


def write_directory(
    path: str | os.PathLike[str],
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    replaceable: Collection[str] = (),
) -> Path:
    """Write a directory of small files, content by plain name, in one step; parents are made.

    With `overwrite` an existing adapter is replaced, but never a directory with other files than
    `files` and those in `replaceable`, which an older adapter may have. Returns the path with
    symbolic links resolved.
    """
    target = Path(os.path.realpath(path))
    asked = f"write adapter to '{target}'"
    if target.is_file():
        raise FormatError(asked, "it is a file; an adapter is a directory", "Choose another path")
    there = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if foreign := sorted(there - files.keys() - set(replaceable)):
        problem = f"the directory holds '{foreign[0]}', which no adapter has and would be lost"
        raise FormatError(asked, problem, "Choose a separate directory for the adapter")
    return _write(target, files, overwrite=overwrite)


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a target that holds anything, unless it may be replaced."""
    target = Path(os.path.realpath(path))
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        remedy = "Choose another path, or pass overwrite=True to replace an adapter"
        raise FormatError(f"write '{target}'", "it exists already", remedy)


def _write(target: Path, content: bytes | Mapping[str, bytes], *, overwrite: bool) -> Path:
    temporary = temporary_name(target)
    with explained(target):
        if _holds(target, content):
            return target
        try:
            check_free(target, overwrite=overwrite)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                write_new(temporary, content)
                (os.replace if overwrite else _link)(temporary, target)
            else:
                temporary.mkdir()
                for name, data in content.items():
                    write_new(temporary / name, data)
                fsync_dir(temporary)
                with out_of_the_way(target) if overwrite else contextlib.nullcontext():
                    rename_folder(temporary, target)
        except (FormatError, OSError):  # of several that write at once, one succeeds
            if not _holds(target, content):
                check_free(target, overwrite=overwrite)
                raise
        finally:
            _remove(temporary)
        fsync_dir(target.parent)
        _remove_left(target)
    return target


def _holds(target: Path, content: bytes | Mapping[str, bytes]) -> bool:
    """Return whether a file or a folder has these bytes, and no others."""
    if isinstance(content, bytes):
        return target.is_file() and target.read_bytes() == content
    return (
        target.is_dir()
        and {path.name for path in target.iterdir()} == content.keys()
        and all(_holds(target / name, data) for name, data in content.items())
    )


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; its folder is there."""
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


@contextlib.contextmanager
def out_of_the_way(folder: Path) -> Iterator[None]:
    """Give a folder another name, and its own back unless another has it then; else it goes."""
    if not folder.is_dir():
        yield
        return
    aside = temporary_name(folder)
    folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():  # also where Ctrl-C comes between the rename and here
            _remove(aside)
        else:
            aside.rename(folder)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free, or that of an empty folder."""
    try:
        source.rename(target)
    except FileExistsError:  # Windows renames over nothing
        target.rmdir()
        source.rename(target)


def write_new(path: Path, data: bytes) -> None:
    """Create a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable, where the system can: not on each mount."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def temporary_name(target: Path) -> Path:
    """Return a free name in the target's own folder, so that it can be renamed to the target."""
    return target.with_name(f".{target.name[:30]}.{secrets.token_hex(6)}.tmp")


def _remove_left(target: Path) -> None:
    """Remove what writers of a name left under temporary ones when they were killed, a day ago."""
    for left in target.parent.glob(f"{glob.escape(f'.{target.name[:30]}.')}{'?' * 12}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no links there, as in FAT
        temporary.replace(path)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Raise an error of the system, such as a full disk, as a `FormatError`."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        raise FormatError(f"write '{target}'", problem, remedy_for(error)) from error


_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give a folder that you may write to"),
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


def remedy_for(error: OSError) -> str:
    """Return what to do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "Check the disk and run again")

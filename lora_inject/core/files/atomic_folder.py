"""Write a folder of small files atomically: for adapters whose format is a folder.

Everything is written under a temporary name in the target's folder, flushed to the disk, and
renamed. An existing directory is exchanged in the same step if the system can (Linux); otherwise it
is moved aside first, so for a moment there is no adapter. If anything fails, Ctrl-C included, the
old adapter is restored.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from lora_inject.core.files.atomic import (
    check_free,
    explained,
    fsync_dir,
    remove_left,
    temporary_name,
    write_new,
)
from lora_inject.errors import FormatError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


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
    target = check_free(path, overwrite=overwrite)
    _check_directory(target, files.keys() | set(replaceable))
    temporary = temporary_name(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for name, content in files.items():
                write_new(temporary / name, content)
            fsync_dir(temporary)
            if overwrite:
                _put_in_place(temporary, target)
            else:
                rename_folder(temporary, target)
        except OSError:  # of several that write at once, one succeeds
            check_free(target, overwrite=overwrite)
            raise
        finally:
            # after an exchange the old adapter, after a failure unfinished files
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_dir(target.parent)
        remove_left(target)
    return target


def _check_directory(target: Path, names: Collection[str]) -> None:
    """Refuse a target that exists and is not an adapter that may be replaced."""
    asked = f"write adapter to '{target}'"
    if not target.exists():
        return
    if not target.is_dir():
        raise FormatError(asked, "it is a file; an adapter is a directory", "Choose another path")
    if foreign := sorted({entry.name for entry in target.iterdir()} - {*names}):
        problem = f"the directory holds '{foreign[0]}', which no adapter has and would be lost"
        raise FormatError(asked, problem, "Choose a separate directory for the adapter")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; what had that name gets the temporary one."""
    if not target.exists() or not any(target.iterdir()):
        rename_folder(temporary, target)
    elif not _exchange(temporary, target):
        aside = temporary_name(target)
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # the last on Windows, of None
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free, or that of an empty folder."""
    try:
        source.rename(target)
    except FileExistsError:  # Windows renames over nothing
        target.rmdir()
        source.rename(target)

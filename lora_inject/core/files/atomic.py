"""Write an adapter's files atomically.

Everything is written under a temporary name in the target's folder, flushed to the disk, and
renamed. An existing directory is exchanged in the same step if the system can (Linux); otherwise it
is moved aside first, so for a moment there is no adapter. If anything fails, Ctrl-C included, the
old adapter is restored.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lora_inject.core.files.disk import (
    create_file,
    fsync_dir,
    remedy_for,
    rename_folder,
    replace_file,
    temporary_name,
    write_new,
)
from lora_inject.errors import FormatError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuse a target that holds anything, unless it may be replaced; return it, links resolved."""
    target = Path(os.path.realpath(path))
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        remedy = "Choose another path, or pass overwrite=True to replace an adapter"
        raise FormatError(f"write '{target}'", "it exists already", remedy)
    return target


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
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for name, content in files.items():
                write_new(temporary / name, content)
            fsync_dir(temporary)
            _put_in_place(temporary, target)
        finally:
            # after an exchange the old adapter, after a failure unfinished files
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_dir(target.parent)
    return target


def write_file(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Write one file in one step, as `write_directory` does a directory."""
    target = check_free(path, overwrite=overwrite)
    if target.is_dir():
        raise FormatError(f"write '{target}'", "it is a directory", "Give the name of a file")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            replace_file(target, content)
            return target
        try:
            create_file(target, content)
        except FileExistsError:
            check_free(target)
    return target


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raise an error of the system, such as a full disk, as a `FormatError`."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        raise FormatError(f"write '{target}'", problem, remedy_for(error)) from error


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

"""What the system may do to a program that writes: stop it at any call, fill the disk, lose power.

Only functions of `os` are replaced, whoever calls them.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMING = ("mkdir", "link", "rename", "replace")
REMOVING = ("unlink", "rmdir")


class StoppedError(BaseException):
    """Like KeyboardInterrupt: no `except Exception` sees it."""


@contextlib.contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, n: int, *, for_good: bool) -> Iterator[list[str]]:
    """Raise at the n-th call that names or syncs a file; yields the calls.

    For good, as by a kill: from then on nothing is removed or named either. Else once, as by
    Ctrl-C, and the program can tidy up.
    """
    calls: list[str] = []

    def replaced(name: str, real: Any, counts: bool) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if counts:
                calls.append(name)
            if len(calls) > n if for_good else counts and len(calls) == n + 1:
                raise StoppedError
            return real(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for name in (*NAMING, "fsync"):
            patch.setattr(os, name, replaced(name, getattr(os, name), counts=True))
        for name in REMOVING if for_good else ():
            patch.setattr(os, name, replaced(name, getattr(os, name), counts=False))
        with contextlib.suppress(StoppedError):
            yield calls


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let the system refuse every file that grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def power_may_fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold that every file is synced before it gets its name, and the name afterwards."""
    synced: set[str] = set()
    named: list[str] = []

    def fsync(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        synced.add(path)
        named[:] = [name for name in named if str(Path(name).parent) != path]

    def naming(real: Any) -> Any:
        def called(source: Any, target: Any, **kwargs: Any) -> Any:
            old, new = os.path.realpath(source), os.path.realpath(target)
            files = [old] if Path(old).is_file() else map(str, Path(old).rglob("*"))
            lost = [file for file in files if Path(file).is_file() and file not in synced]
            assert not lost, f"renamed before they are on the disk: {lost}"
            synced.update({path.replace(old, new, 1) for path in synced if path.startswith(old)})
            named.append(new)
            return real(source, target, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in ("link", "rename", "replace"):
            patch.setattr(os, name, naming(getattr(os, name)))
        yield
    assert synced, "nothing was synced"
    assert not named, f"names that may be lost: {named}"


def content(path: Path) -> bytes | dict[str, bytes]:
    """The bytes of a file, or of a folder's files by their names."""
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def visible(folder: Path) -> list[str]:
    """The names in a folder that do not begin with a dot."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")

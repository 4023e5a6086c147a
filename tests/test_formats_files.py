"""Atomic writing: whatever fails, and wherever, the old adapter is there and nothing else is."""

import os
from pathlib import Path

import pytest

from lora_inject.core.files import atomic
from lora_inject.core.files import atomic_folder as files
from lora_inject.core.files.atomic import write_file
from lora_inject.core.files.atomic_folder import write_directory
from lora_inject.errors import FormatError

OLD, NEW = {"config": b"old", "model": b"old"}, {"config": b"new", "model": b"new"}


def content(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_as_a_whole(exchange, tmp_path, monkeypatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write_directory(tmp_path / "a", {**OLD, "extra": b""})
    write_directory(tmp_path / "a", NEW, overwrite=True, replaceable={"extra"})
    assert content(tmp_path / "a") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class Killed(BaseException):
    """Like KeyboardInterrupt: no `except Exception` sees it."""


def kill_at(calls: int, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let the n-th call of a function raise."""
    real, seen = getattr(owner, name), []

    def wrapped(*args: object, **kwargs: object) -> object:
        seen.append(1)
        if len(seen) == calls:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


STEPS = [
    (os, "fsync", 1),
    (os, "fsync", 2),
    (os, "fsync", 3),
    (files, "write_new", 1),
    (files, "write_new", 2),
    (files, "_put_in_place", 1),
]
RENAMES = [(Path, "rename", 1), (Path, "rename", 2)]


@pytest.mark.parametrize(
    ("owner", "name", "call", "exists"),
    [(*step, exists) for step in STEPS + RENAMES[:1] for exists in (True, False)]
    + [(*RENAMES[1], True)],  # a new directory takes one rename only
)
def test_a_kill_leaves_the_old_adapter(owner, name, call, exists, tmp_path, monkeypatch) -> None:
    if exists:
        write_directory(tmp_path / "a", OLD)
    if name == "rename":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    kill_at(call, monkeypatch, owner, name)
    with pytest.raises(Killed):
        write_directory(tmp_path / "a", NEW, overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if exists else [])
    if exists:
        assert content(tmp_path / "a") == OLD


@pytest.mark.parametrize(
    "write", [lambda a: write_directory(a, NEW), lambda a: write_file(a, b"x")]
)
def test_a_full_disk_is_told_and_nothing_is_left(write, tmp_path, monkeypatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_new", full)
    monkeypatch.setattr(atomic, "write_new", full)
    with pytest.raises(FormatError, match=r"write '.*a': No space left .*\. Free some space"):
        write(tmp_path / "a")
    assert [*tmp_path.iterdir()] == []


def test_an_exchange_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch) -> None:
    write_directory(tmp_path / "a", OLD)

    def fail(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_exchange", fail)
    with pytest.raises(FormatError, match=r"write '.*a': No space left .*\. Free some space"):
        write_directory(tmp_path / "a", NEW, overwrite=True)
    assert content(tmp_path / "a") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"weeks of work")
    with pytest.raises(FormatError, match=r"optimizer\.pt"):
        write_directory(tmp_path, NEW, overwrite=True)
    assert content(tmp_path) == {"optimizer.pt": b"weeks of work"}


def test_a_directory_is_not_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(FormatError, match="it is a file"):
        write_directory(tmp_path / "a", NEW, overwrite=True)


def test_a_directory_is_written_over_an_empty_one_and_into_missing_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_directory(tmp_path / "empty", NEW)
    write_directory(tmp_path / "x" / "y" / "z", NEW)
    assert content(tmp_path / "empty") == content(tmp_path / "x" / "y" / "z") == NEW


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    write_directory(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")
    made = write_directory(tmp_path / "link", NEW, overwrite=True)
    assert made == (tmp_path / "real").resolve()
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == NEW
    (tmp_path / "f").symlink_to("g")
    write_file(tmp_path / "f", b"1")
    assert (tmp_path / "f").is_symlink()
    assert (tmp_path / "g").read_bytes() == b"1"


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_kill_leaves_the_old_file(owner, name, tmp_path, monkeypatch) -> None:
    write_file(tmp_path / "f", b"old")
    kill_at(1, monkeypatch, owner, name)
    with pytest.raises(Killed):
        write_file(tmp_path / "f", b"new", overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path) == {"f": b"old"}


def test_a_file_is_replaced_only_when_told(tmp_path: Path) -> None:
    write_file(tmp_path / "f", b"old")
    with pytest.raises(FormatError, match="overwrite=True"):
        write_file(tmp_path / "f", b"new")
    with pytest.raises(FormatError, match="it is a directory"):
        write_file(tmp_path, b"new", overwrite=True)
    assert content(tmp_path) == {"f": b"old"}

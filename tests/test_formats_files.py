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


STEPS = [*((os, "fsync", n) for n in (1, 2, 3)), (files, "write_new", 1), (files, "write_new", 2)]
STEPS += [(files, "_put_in_place", 1), (Path, "rename", 1)]


@pytest.mark.parametrize(
    ("owner", "name", "call", "exists"),
    [(*step, exists) for step in STEPS for exists in (True, False)]
    + [(Path, "rename", 2, True)],  # a new directory takes one rename only
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


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_kill_leaves_the_old_file(owner, name, tmp_path, monkeypatch) -> None:
    write_file(tmp_path / "f", b"old")
    kill_at(1, monkeypatch, owner, name)
    with pytest.raises(Killed):
        write_file(tmp_path / "f", b"new", overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path) == {"f": b"old"}


@pytest.mark.parametrize("owner", ["write_new", "_exchange"])
def test_a_full_disk_is_told_and_leaves_the_old_adapter(owner, tmp_path, monkeypatch) -> None:
    write_directory(tmp_path / "a", OLD)

    def full(path: Path, *_: object) -> None:
        if not path.is_dir():
            path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, owner, full)
    with pytest.raises(FormatError, match=r"write '.*a': No space left .*\. Free some space"):
        write_directory(tmp_path / "a", NEW, overwrite=True)
    monkeypatch.setattr(atomic, "write_new", full)
    with pytest.raises(FormatError, match=r"write '.*b': No space left .*\. Free some space"):
        write_file(tmp_path / "b", b"x")
    assert content(tmp_path / "a") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_nothing_is_replaced_that_was_not_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"weeks of work")
    write_file(tmp_path / "f", b"old")
    for write, words in (
        (lambda: write_directory(tmp_path / "run", NEW, overwrite=True), r"optimizer\.pt"),
        (lambda: write_directory(tmp_path / "f", NEW, overwrite=True), "it is a file"),
        (lambda: write_file(tmp_path / "f", b"new"), "overwrite=True"),
        (lambda: write_file(tmp_path / "run", b"new", overwrite=True), "it is a directory"),
    ):
        with pytest.raises(FormatError, match=words):
            write()
    assert content(tmp_path / "run") == {"optimizer.pt": b"weeks of work"}
    assert (tmp_path / "f").read_bytes() == b"old"


def test_empty_folders_missing_parents_and_symbolic_links_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "x" / "y" / "z"):
        write_directory(path, NEW)
        assert content(path) == NEW
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


def test_of_two_processes_that_write_one_file_at_once_one_succeeds(tmp_path, monkeypatch) -> None:
    """The other one wrote over it, and neither was told."""
    target, real = tmp_path / "a.safetensors", atomic.write_new

    def write_later(path: Path, data: bytes) -> None:
        real(path, data)
        target.write_bytes(b"theirs")

    monkeypatch.setattr(atomic, "write_new", write_later)
    with pytest.raises(FormatError, match="it exists already"):
        write_file(target, b"mine")
    assert content(tmp_path) == {"a.safetensors": b"theirs"}
    write_file(target, b"mine", overwrite=True)
    assert content(tmp_path) == {"a.safetensors": b"mine"}

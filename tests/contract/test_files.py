"""Adapters on disk: whole or not at all, and no header of a file that lies is believed."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import content, full_disk, power_may_fail, stopped, visible
from helpers.merging import save_checkpoint
from helpers.models import IDS, Several
from helpers.refusals import refused
from helpers.states import SITES, metadata, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import lora_inject as li

OLD, NEW = (state_of(SITES["linear"], seed=seed) for seed in (1, 2))
PLACES = {"peft": "a", "native": "a.safetensors"}
every_place = pytest.mark.parametrize("layout", PLACES)


def write(state: li.AdapterState, path: Path, layout: str) -> Path:
    return li.write_adapter(state, path, layout, overwrite=True)


# Whole or not at all ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Whoever writes an adapter, or what comes of merging it."""

    write: Callable[[li.AdapterState, Path], object]
    place: str
    error: type[li.LoraInjectError]
    full: tuple[int, ...]  # bytes of the largest file that the disk still takes
    due: Mapping[str, Any]  # what is there once it was written in peace


@pytest.fixture(scope="module", params=[*PLACES, "merge"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    base, peace = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("peace")
    layout, tensors = request.param, {"h.0.fc.weight": torch.ones(7, 5), "norm": torch.ones(900)}
    save_checkpoint(base, tensors, shards=2)
    (base / "tokenizer.json").write_text("{}")
    how = {"error": li.FormatError, "full": (200,), "place": PLACES.get(layout, "out")}
    run: Any = partial(write, layout=layout)
    if layout == "merge":
        how |= {"error": li.CheckpointError, "full": (90, 500, 2800)}

        def run(state: li.AdapterState, path: Path) -> object:
            return li.merge_checkpoint(base, [state], path, overwrite=True)

    for name, state in (("old", OLD), ("new", NEW)):
        run(state, peace / name / how["place"])
    due = {name: content(peace / name / how["place"]) for name in ("old", "new")}
    return Writer(run, due=due, **how)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("for_good", [True, False], ids=["killed", "interrupted"])
def test_stopped_at_any_call_of_the_system_the_old_one_or_the_new_one_is_there(
    writer: Writer, exists: bool, for_good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(60):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / writer.place
        if exists:
            writer.write(OLD, path)
        with stopped(monkeypatch, n, for_good=for_good) as calls:
            writer.write(NEW, path)
        if not path.exists():  # a folder that is replaced has no name for a moment
            assert not exists or (for_good and path.suffix == "")
        elif content(path) != writer.due["new"]:
            assert exists
            assert content(path) == writer.due["old"]
        found = visible(folder) if for_good else [p.name for p in folder.iterdir()]
        assert found == ([path.name] if path.exists() else [])
        writer.write(NEW, path)
        assert content(path) == writer.due["new"]
        if len(calls) <= n:
            break
    assert 3 < n < 60


def test_a_full_disk_is_told_and_leaves_the_old_one(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / writer.place
    writer.write(OLD, path)
    for target in (path, tmp_path / f"new {path.name}"):
        for n_bytes in writer.full:
            with full_disk(n_bytes), refused(writer.error, str(target)):
                writer.write(NEW, target)
    assert content(path) == writer.due["old"]
    assert visible(tmp_path) == [path.name]
    writer.write(NEW, path)
    assert content(path) == writer.due["new"]


def test_data_is_on_the_disk_before_it_gets_its_name(writer: Writer, tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / writer.place
    with power_may_fail(monkeypatch):
        for name, state in (("old", OLD), ("new", NEW)):
            writer.write(state, path)
            assert content(path) == writer.due[name]


def test_permissions_follow_the_umask(writer: Writer, tmp_path: Path) -> None:
    path, before = tmp_path / writer.place, os.umask(0o027)
    try:
        writer.write(NEW, path)
    finally:
        os.umask(before)
    files = [*path.iterdir()] if path.is_dir() else [path]
    assert {p.stat().st_mode & 0o777 for p in files} == {0o640}
    assert path.is_file() or path.stat().st_mode & 0o777 == 0o750


@every_place
def test_of_two_that_write_at_once_one_succeeds_and_the_other_is_told(layout, tmp_path) -> None:
    for k in range(10):
        path, told = tmp_path / str(k) / PLACES[layout], []
        both = threading.Barrier(2)

        def run(state: li.AdapterState, path: Path = path, told: list[Any] = told) -> None:
            both.wait()  # noqa: B023
            with contextlib.suppress(li.FormatError):
                li.write_adapter(state, path, layout)
                told.append(state)

        threads = [threading.Thread(target=run, args=(state,)) for state in (OLD, NEW)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == [li.read_adapter(path)]
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_is_replaced_as_a_whole_and_an_older_file_of_it_goes(tmp_path: Path) -> None:
    path = write(OLD, tmp_path / "a", "peft")
    (path / "adapter_model.bin").write_bytes(b"")
    write(NEW, path, "peft")
    assert visible(path) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert li.read_adapter(path) == NEW


def test_nothing_is_replaced_that_was_not_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"weeks of work")
    file = write(OLD, tmp_path / "f.safetensors", "native")
    before = content(tmp_path)
    for path, layout, named in (
        (tmp_path / "run", "peft", "optimizer.pt"),
        (file, "peft", "is a file"),
        (tmp_path / "run", "native", "run.safetensors"),
    ):
        (tmp_path / "run.safetensors").mkdir(exist_ok=True)
        with refused(li.FormatError, named):
            write(NEW, path, layout)
    assert content(tmp_path) == before


def test_empty_folders_missing_parents_and_links_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "x" / "y" / "z"):
        assert li.read_adapter(li.write_adapter(NEW, path)) == NEW
    for layout, place in PLACES.items():
        real, link = tmp_path / f"real {place}", tmp_path / place
        write(OLD, real, layout)
        link.symlink_to(real.name)
        assert write(NEW, link, layout) == real.resolve()
        assert link.is_symlink()
        assert li.read_adapter(real) == NEW


@every_place
def test_what_was_read_stays_whatever_becomes_of_the_files(layout: str, tmp_path: Path) -> None:
    path = write(OLD, tmp_path / PLACES[layout], layout)
    read = li.read_adapter(path)
    write(NEW, path, layout)
    assert read == OLD
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read == OLD


@every_place
def test_a_mount_that_cannot_sync_a_folder_does_not_fail_a_save(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network and FUSE mounts: EINVAL for folders only."""

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    assert li.read_adapter(write(NEW, tmp_path / PLACES[layout], layout)) == NEW


def test_a_file_that_nobody_wrote_is_not_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's file was there at the link, and is gone again."""

    def link(*_: Any) -> None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    with refused(li.FormatError, "sql"):
        li.write_adapter(NEW, tmp_path / "sql.safetensors", "native")
    assert not (tmp_path / "sql.safetensors").exists()


@every_place
def test_what_a_killed_save_left_goes_with_the_next_one(layout: str, tmp_path: Path) -> None:
    """After a day: younger ones may be of a save that goes on."""
    name = PLACES[layout]
    names = (f".{name}.0123456789ab.tmp", f".{name}.ba9876543210.tmp", ".else.0123456789ab.tmp")
    left, young, other = (tmp_path / each for each in names)
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.utime(left, (10**9, 10**9))
    os.utime(other, (10**9, 10**9))
    write(NEW, tmp_path / name, layout)
    assert {path.name for path in tmp_path.iterdir()} == {name, young.name, other.name}


@pytest.fixture(params=["pipe", "socket", "device"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What is neither a file nor a folder; who opens it and waits is interrupted."""
    path = tmp_path / f"{request.param}.yaml"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        if request.param == "socket":
            bound.bind(str(path))
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits"))
        signal.alarm(20)
        yield path
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_what_is_no_file_is_refused_before_it_is_opened(
    no_file: Path, tmp_path: Path, run: Any
) -> None:
    """A pipe was waited for, and endless data read until the memory was full."""
    adapter = li.write_adapter(NEW, tmp_path / "adapter")
    (tmp_path / "lora.yaml").write_text("targets: [q_proj]")
    for words in (
        ("plan", no_file, adapter),
        ("plan", tmp_path / "lora.yaml", no_file),
        ("inspect", no_file),
        ("merge", no_file, adapter, "-o", tmp_path / "out"),
        ("rename", adapter, "a=b", "--output", no_file),
    ):
        ran = run(*words)
        assert ran.code == 1
        assert "neither a file nor a folder" in ran.err
    for verb in (li.inject, li.load_adapter):
        with refused(li.LoraInjectError, no_file.name, "neither a file nor a folder"):
            verb(Several(), no_file)


# Which format holds an adapter is said before it is trained, and one call always works ------------

ROOT = {"rank": 2, "targets": ["mix", "fc"]}  # PEFT has no place for parameters of the root
PLAIN = {"rank": 2, "targets": ["fc"]}
CALL = 'save_adapter(model, path, format="native")'


def test_the_plan_and_the_summary_say_what_the_default_format_cannot_hold() -> None:
    text = " ".join(str(li.plan(Several(), ROOT)).split())
    assert CALL in text
    assert "'mix'" in text
    assert "save_adapter" not in str(li.plan(Several(), PLAIN))
    model = li.inject(li.inject(Several(), ROOT, "hard"), PLAIN, "easy")
    (line,) = [line for line in li.summary(model).splitlines() if "save_adapter" in line]
    assert line.startswith("hard: ")
    assert "'mix'" in line


def test_the_refusal_names_the_call_that_works(tmp_path: Path) -> None:
    plain = Several()
    model = li.inject(Several(), ROOT)
    model.load_state_dict(plain.state_dict(), strict=False)
    with refused(li.FormatError, "'mix'", CALL):
        li.save_adapter(model, tmp_path / "out", unused=[".*"])
    written = li.save_adapter(model, tmp_path / "out", format="native", unused=[".*"])
    assert written == tmp_path / "out.safetensors"
    with refused(li.FormatError, "out.safetensors"):
        li.load_adapter(plain, tmp_path / "out")
    assert torch.equal(li.load_adapter(plain, written)(IDS), model(IDS))
    for name, options in (("out.bin", {}), ("versions", {"version": 3})):
        with refused(li.FormatError):
            li.save_adapter(model, tmp_path / name, format="native", unused=[".*"], **options)
    assert visible(tmp_path) == ["out.safetensors"]


# Headers ------------------------------------------------------------------------------------------


def with_header(text: str | bytes, data: bytes) -> bytes:
    """A safetensors file: the length of its header, the header, the data."""
    held = text if isinstance(text, bytes) else text.encode()
    return len(held).to_bytes(8, "little") + held + data


def edited(**changes: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    """Other values in the entry of the file's last tensor."""

    def edit(table: dict[str, Any], data: bytes) -> bytes:
        name = max(table.keys() - {"__metadata__"}, key=lambda n: table[n]["data_offsets"][1])
        entry = {k: v for k, v in {**table[name], **changes}.items() if v is not ...}
        return with_header(json.dumps({**table, name: entry}), data)

    return edit


def text_edited(old: str, new: str) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda table, data: with_header(json.dumps(table).replace(old, new, 1), data)


def added(name: str, **entry: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda table, data: with_header(json.dumps({**table, name: entry}), data)


NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
BAD: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "empty file": lambda table, data: b"",
    "length past the end": lambda table, data: (1 << 20).to_bytes(8, "little") + b"{}",
    "length beyond memory": lambda table, data: (1 << 62).to_bytes(8, "little") + b"{}",
    "not json": lambda table, data: with_header("{nope", data),
    "not utf-8": lambda table, data: with_header(b'{"\xff', data),
    "a list": lambda table, data: with_header("[]", data),
    "nested too deeply": lambda table, data: with_header("[" * 100_000, data),
    "a tensor twice": text_edited("{", f'{{"a":{json.dumps(NOTHING)},"a":{json.dumps(NOTHING)},'),
    "metadata twice": text_edited("{", '{"__metadata__":{},"__metadata__":{},'),
    "text twice": text_edited("{", '{"__metadata__":{"a":"b","a":"c"},'),
    "a shape twice": text_edited('"shape"', '"shape":[9],"shape"'),
    "metadata not strings": lambda table, data: with_header(
        json.dumps({**table, "__metadata__": {**table.get("__metadata__", {}), "a": 1}}), data
    ),
    "unknown dtype": edited(dtype="F33"),
    "entry a list": lambda table, data: with_header(json.dumps({**table, "a": []}), data),
    "no shape": edited(shape=...),
    "boolean dimension": edited(shape=[True, 2]),
    "huge dimensions": edited(shape=[2**60, 2**60]),
    "huge dimension of nothing": added("a", **{**NOTHING, "shape": [0, 2**62]}),
    "too many dimensions": edited(shape=[1] * 40),
    "size lie": edited(shape=[3]),
    "offsets swapped": added("a", **{**NOTHING, "data_offsets": [8, 0]}),
    "trailing bytes": lambda table, data: with_header(json.dumps(table), data + b"0"),
    "name not printable": added("a\x00b", **NOTHING),
    "name a lone surrogate": text_edited("{", f'{{"\\ud800":{json.dumps(NOTHING)},'),
    "number with 5000 digits": edited(shape=["N"]),
}


def bad(case: str, whole: bytes) -> bytes:
    """A file with such a header in place of its own."""
    length = int.from_bytes(whole[:8], "little")
    made = BAD[case](json.loads(whole[8 : 8 + length]), whole[8 + length :])
    return made.replace(b'"N"', b"9" * 5000)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"h.0.fc.weight": torch.randn(7, 5)}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize("case", BAD)
def test_headers_that_lie_are_refused_and_nothing_is_allocated_by_them(
    case, base, tmp_path
) -> None:
    file = write(OLD, tmp_path / "a.safetensors", "native")
    li.merge_checkpoint(base, [file], tmp_path / "right")  # as they are
    weights = base / "model.safetensors"
    file.write_bytes(bad(case, file.read_bytes()))
    with refused(li.FormatError, "a.safetensors"):
        li.read_adapter(file, format="native")
    weights.write_bytes(bad(case, weights.read_bytes()))
    with refused(li.CheckpointError, "model.safetensors"):
        li.merge_checkpoint(base, [OLD], tmp_path / "out")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_file_is_read_that_the_reference_refuses(tmp_path: Path, data: st.DataObject) -> None:
    """Any change of bytes: an error of ours, or a file that the reference library reads too."""
    file = write(OLD, tmp_path / "a.safetensors", "native")
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from(list(b'{}[]",:0123456789-eaF \\\x00\xff')))
    file.write_bytes(whole[: data.draw(st.integers(len(whole) - 3, len(whole)))])
    try:
        ours = li.read_adapter(file, format="native")
    except li.FormatError:
        return
    try:
        with safe_open(file, "pt") as opened:
            assert len([*opened.keys()]) == 2 * len(ours.sites)
    except SafetensorError as error:
        pytest.fail(f"we accept what safetensors refuses: {error}")


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=9)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tables)
def test_any_tensors_are_written_and_read_as_by_the_library(tmp_path: Path, table: Any) -> None:
    trained = {
        f"t{i}.weight": torch.randint(0, 2, shape).to(dtype)
        for i, (shape, dtype) in enumerate(table)
    }
    strided = {name: t.t() if t.ndim == 2 else t for name, t in trained.items()}
    file = write(li.AdapterState({}, strided), tmp_path / "a.safetensors", "native")
    theirs = {key[key.index("t") :]: t for key, t in load_file(file).items()}
    for read in (li.read_adapter(file).trained, theirs):
        for name, tensor in strided.items():
            (found,) = (t for key, t in read.items() if key.endswith(name))
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
    # As a program of others lays them out.
    save_file(
        {k: t.contiguous() for k, t in reversed(load_file(file).items())}, file, metadata(file)
    )
    assert all(torch.equal(t, strided[n]) for n, t in li.read_adapter(file).trained.items())

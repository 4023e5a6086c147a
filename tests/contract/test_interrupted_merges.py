"""A merge that is stopped, killed, refused or runs out of disk leaves no output."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.faults import content, visible
from helpers.merging import (
    LLAMA,
    adapter_of,
    dense,
    hold_merged,
    llama_tensors,
    load_checkpoint,
    merge,
    save_checkpoint,
)
from helpers.refusals import refused
from helpers.states import effect, linear, state_of

import lora_inject as li


class Case(NamedTuple):
    base: Path
    tensors: Any
    state: li.AdapterState
    out: Path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    return Case(base, tensors, adapter_of(tensors), tmp_path / "out")


def hold_whole(case: Case) -> None:
    """Hold that the output is complete, and that nothing else is left beside it."""
    hold_merged(case.out, case.tensors, case.state)
    assert content(case.out).keys() == content(case.base).keys()
    assert {p.name for p in case.out.parent.iterdir()} == {"base", "out"}


def at(share: float, act: Callable[[], Any]) -> Callable[[int, int], None]:
    """A callback that does something once, when so much is written."""
    left = [act]

    def progress(done: int, total: int) -> None:
        if left and done >= share * total:
            left.pop()()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


# Stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_an_interrupted_merge_leaves_nothing_and_is_started_again(case: Case, share: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(case.base, [case.state], case.out, at(share, interrupt))
    assert [path.name for path in case.out.parent.iterdir()] == ["base"]
    merge(case.base, [case.state], case.out)
    hold_whole(case)


@pytest.mark.parametrize("command", ["merge", "convert", "extract"])
@pytest.mark.parametrize("there", ["free", "taken"])
def test_what_stops_once_the_output_is_there_says_that_it_is_complete(
    command: str, there: str, case: Case, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = li.write_adapter(case.state, tmp_path / "adapter")
    tuned = tmp_path / "tuned"
    merge(case.base, [case.state], tuned)
    words = {
        "merge": ("merge", case.base, adapter, "--output", case.out),
        "convert": ("convert", adapter, case.out, "--to", "portable"),
        "extract": ("extract", case.base, tuned, "--rank", 2, "--output", case.out),
    }[command]
    if there == "taken":
        half, words = li.combine([case.state], [0.5]), (*words, "--overwrite")
        merge(case.base, [half], case.out) if command == "merge" else li.write_adapter(
            half, case.out
        )
    before = {path.name for path in tmp_path.iterdir()}
    real = os.rename

    def rename(source: Any, target: Any, **kwargs: Any) -> None:
        real(source, target, **kwargs)
        if Path(target) == case.out:
            monkeypatch.undo()
            interrupt()

    monkeypatch.setattr(os, "rename", rename)
    ran = run(*words)
    assert ran.code == 130
    assert f"'{case.out}' is complete" in ran.err
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
    if command == "merge":
        hold_merged(case.out, case.tensors, case.state)
    else:
        li.read_adapter(case.out)


def test_too_little_space_is_known_before_anything_is_written(case: Case, monkeypatch) -> None:
    usage = shutil.disk_usage(case.base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with refused(li.CheckpointError, "5,000"):
        merge(case.base, [case.state], case.out)
    assert not case.out.exists()


def merge_alone(base: Path, out: Path) -> None:
    state = adapter_of(load_checkpoint(base))
    print("begun", flush=True)
    li.merge_checkpoint(base, [state], out, options=li.classes.MergeOptions(workers=1))


@pytest.mark.slow
def test_killed_at_moments_all_over_the_merge_the_output_is_absent_or_complete(
    tmp_path: Path, forks: Any
) -> None:
    tensors = llama_tensors(layers=6, hidden=256, inner=512, vocab=1024)
    base = save_checkpoint(tmp_path / "base", tensors, 6, LLAMA)
    out, state = tmp_path / "out", adapter_of(load_checkpoint(base))

    def run(delay: float | None = None) -> float:
        child = forks.start(merge_alone, base, out)
        while "begun" not in child.out():
            time.sleep(0.001)
        began = time.monotonic()
        if delay is not None:
            time.sleep(delay)
            os.kill(child.pid, signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL)
        return time.monotonic() - began

    whole = run()
    shutil.rmtree(out)
    for k in range(8):
        run((k * 0.618 + 0.06) % 1 * whole)
        if not out.exists() and k != 2:  # and one is started again after two kills
            merge(base, [state], out)
            assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
        if out.exists():
            hold_merged(out, tensors, state)
        shutil.rmtree(out, ignore_errors=True)


def merge_until_interrupted(base: Path, out: Path) -> None:
    state = adapter_of(load_checkpoint(base))
    said = li.classes.MergeOptions(workers=2)
    while True:
        try:
            li.merge_checkpoint(
                base, [state], out, options=said, progress=lambda *_: print("writing", flush=True)
            )
        except KeyboardInterrupt:
            return
        shutil.rmtree(out)


@pytest.mark.slow
def test_ctrl_c_stops_all_threads_and_leaves_no_half_file(tmp_path: Path, forks: Any) -> None:
    tensors = llama_tensors(layers=4, hidden=512, inner=2048, vocab=2048)
    base = save_checkpoint(tmp_path / "base", tensors, 4, LLAMA)
    out = tmp_path / "out"
    child = forks.start(merge_until_interrupted, base, out)
    while child.out().count("writing") < 30:
        assert not child.err()
    os.kill(child.pid, signal.SIGINT)
    child.result()
    assert visible(tmp_path) == ["base"]
    state = adapter_of(load_checkpoint(base))
    merge(base, [state], out)
    hold_merged(out, tensors, state)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


# Several at once ----------------------------------------------------------------------------------


def test_a_second_merge_into_one_output_never_mixes(case: Case) -> None:
    """Whichever began later has it, and the other says so."""
    other = adapter_of(case.tensors, seed=5)

    def merge_too() -> None:
        merge(case.base, [other], case.out)

    with refused(li.CheckpointError, "another merge"):
        merge(case.base, [case.state], case.out, at(0.4, merge_too))
    hold_merged(case.out, case.tensors, other)
    assert {p.name for p in case.out.parent.iterdir()} == {"base", "out"}


def test_two_merges_at_once_leave_torch_its_threads(case: Case, tmp_path: Path) -> None:
    """The second one found one thread, and left it so."""
    before, found = torch.get_num_threads(), list[int]()
    both, left = threading.Barrier(2, timeout=60), threading.Event()

    def run(out: Path, last: bool) -> None:
        def progress(done: int, total: int) -> None:
            if done < total and out not in waited:
                waited.append(out)
                both.wait()
                assert not last or left.wait(60)  # the first one ends while this one computes

        merge(case.base, [case.state], out, progress, verify=False)
        found.append(torch.get_num_threads())
        left.set()

    waited = list[Path]()
    torch.set_num_threads(3)
    try:
        threads = [threading.Thread(target=run, args=(tmp_path / f"{n}", n)) for n in (False, True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert [*found, torch.get_num_threads()] == [3, 3, 3, 3]
    finally:
        torch.set_num_threads(before)


def write_notes(case: Case) -> None:
    case.out.mkdir()
    (case.out / "notes.txt").write_text("mine")


MEANWHILE: dict[str, tuple[Callable[[Case], Any], Any]] = {
    "another merge": (lambda case: merge(case.base, [case.state], case.out), None),
    "somebody else": (write_notes, {"notes.txt": b"mine"}),
    "somebody": (lambda case: case.out.write_text("mine"), b"mine"),
}


@pytest.mark.parametrize("who", MEANWHILE)
def test_an_output_that_another_writes_meanwhile_is_left_as_it_is(case: Case, who: str) -> None:
    act, left = MEANWHILE[who]
    with refused(li.CheckpointError, who):
        merge(case.base, [case.state], case.out, at(1.0, lambda: act(case)), verify=False)
    if left is None:
        hold_merged(case.out, case.tensors, case.state)
    else:
        assert content(case.out) == left


def test_a_base_that_changes_underneath_is_noticed(case: Case) -> None:
    first = case.base / "model-00001-of-00003.safetensors"
    with refused(li.CheckpointError, first.name):
        merge(case.base, [case.state], case.out, at(0.5, lambda: os.utime(first, ns=(1, 1))))
    assert not case.out.exists()


# Where it may write -------------------------------------------------------------------------------


def test_an_output_that_would_touch_the_base_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(case.base)
    before = content(case.base)
    places = (case.base, case.base / "sub", case.base / ".." / "base", tmp_path / "link", tmp_path)
    for output in places:
        with refused(li.CheckpointError, "base"):
            merge(case.base, [case.state], output)
    assert content(case.base) == before


@pytest.mark.parametrize("folder", ["merged", "deep/er"])
def test_a_base_of_one_file_may_have_the_output_beside_it(
    folder: str, tmp_path: Path, run: Any
) -> None:
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path, tensors, stem="base") / "base.safetensors"
    adapter = adapter_of(tensors, "q_proj")
    for out in (tmp_path / folder, tmp_path / "again"):  # which takes nothing of the first one
        merge(base, [adapter], out)
        assert [path.name for path in out.iterdir()] == ["base.safetensors"]
    with refused(li.CheckpointError, str(tmp_path)):
        merge(base, [adapter], tmp_path)


OCCUPIED: dict[str, tuple[Callable[[Case], Any], str]] = {
    "a file": (lambda case: case.out.write_text("a file"), "file"),
    "a folder": (write_notes, "notes.txt"),
    "a checkpoint": (lambda case: merge(case.base, [case.state], case.out), "overwrite"),
}


@pytest.mark.parametrize("what", OCCUPIED)
def test_an_output_with_something_in_it_is_refused_and_kept(case: Case, what: str) -> None:
    occupy, named = OCCUPIED[what]
    occupy(case)
    before = content(case.out)
    with refused(li.CheckpointError, str(case.out), named):
        merge(case.base, [case.state], case.out)
    assert content(case.out) == before


# Verifying ----------------------------------------------------------------------------------------


@pytest.fixture
def files(case: Case, tmp_path: Path) -> Any:
    """The output, and the words that verify it."""
    adapter = li.write_adapter(case.state, tmp_path / "adapter")
    merge(case.base, [adapter], case.out)
    return ("verify", case.base, adapter, case.out, "--json")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize(("byte", "bit"), [(1, 16), (0, 1)], ids=["an exponent", "the last digit"])
def test_one_wrong_bit_is_found_and_named(
    name: str, byte: int, bit: int, case: Case, files: Any, run: Any
) -> None:
    assert run(*files).code == 0
    for path in case.out.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if name in (table := json.loads(data[8:start])):
            data[start + table[name]["data_offsets"][0] + byte] ^= bit
            path.write_bytes(data)
    ran = run(*files)
    assert ran.code == 1
    assert name in ran.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sums_of_another_machine_are_verified(
    dtype: torch.dtype, tmp_path: Path, run: Any
) -> None:
    """In another order they are off in the last bits, by more than one where W and delta cancel."""
    torch.manual_seed(0)
    state = state_of(linear("q", 300, 200, rank=24), size=0.3)
    (site,) = state.sites.values()
    W = (0.01 * torch.randn(200, 300) - effect(site)).to(dtype)
    base = save_checkpoint(tmp_path / "base", {"q.weight": W})
    adapter = li.write_adapter(state, tmp_path / "adapter")
    total = W.float().clone()
    for a, b in zip(site.A.flip(0), site.B.T.flip(0), strict=True):
        total += torch.outer(b * site.scale, a)
    ours = dense({"q.weight": W}, (state, 1.0))["q.weight"]
    theirs = total.to(dtype)
    assert not torch.equal(ours, theirs)
    for values, is_right in ((ours, True), (theirs, True), (W, False)):
        merged = save_checkpoint(tmp_path / "merged", {"q.weight": values})
        assert run("verify", base, adapter, merged).code == int(not is_right)


def test_other_adapters_and_files_that_are_missing_or_were_added_are_told(
    case: Case, files: Any, run: Any, tmp_path: Path
) -> None:
    other = li.write_adapter(adapter_of(case.tensors, seed=5), tmp_path / "other")
    assert run(*files[:2], other, case.out).code == 1
    assert run(*files, "-w", 0.5).code == 1
    for name in (".git/config", "adapter_config.json", "sub/a.py", "model-strange.safetensors"):
        (case.out / name).parent.mkdir(exist_ok=True)
        (case.out / name).write_text("{}")
    said = run(*files).out
    for name in ("'adapter_config.json'", "'sub/a.py'", "'model-strange.safetensors'"):
        assert name in said
    assert ".git" not in said
    (case.out / "tokenizer.json").unlink()
    assert "'tokenizer.json'" in run(*files).out
    (case.out / "model-00002-of-00003.safetensors").unlink()
    ran = run(*files)
    assert ran.code == 1
    assert "model-00002-of-00003" in ran.out + ran.err


def test_verifying_a_merge_in_another_dtype_names_the_option(
    case: Case, files: Any, run: Any, tmp_path: Path
) -> None:
    words = (*files[:3], tmp_path / "wide")
    assert run("merge", *files[1:3], "-o", words[-1], "--dtype", "float32").code == 0
    ran = run(*words)
    assert ran.code == 1
    assert "F32 and not BF16" in " ".join((ran.out + ran.err).split())
    assert "--dtype" in ran.out + ran.err
    assert run(*words, "--dtype", "float32").code == 0


def test_a_merge_verifies_before_it_publishes(case: Case, monkeypatch) -> None:
    """What a failing disk does: a bit of a finished file turns before it is read back."""
    real = os.fsync

    def turn(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "model-00002-of-00003.safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 64
            path.write_bytes(data)

    monkeypatch.setattr(os, "fsync", turn)
    with refused(li.CheckpointError, "verify"):
        merge(case.base, [case.state], case.out)
    assert not case.out.exists()

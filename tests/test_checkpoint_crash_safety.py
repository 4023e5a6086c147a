"""A merge that is killed, refused or runs out of disk leaves no output, and can go on."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checkpoints import (
    LLAMA,
    assert_merged,
    assert_verified,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    merge,
    save_checkpoint,
)

from lora_inject.checkpoint import (
    MergeOptions,
    WeightedAdapter,
    merge_checkpoint,
    verify_checkpoint,
)
from lora_inject.checkpoint import merge_files as merging
from lora_inject.checkpoint.merge_files import Staging, free_bytes
from lora_inject.errors import CheckpointError


@pytest.fixture
def case(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    return base, tensors, llama_adapter(tensors), tmp_path / "out"


def content(path):
    """The bytes of a file, or of a folder's files by their names."""
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def at_writing(monkeypatch, n, act, *, after=False):
    """Do something with the temporary name of the n-th weight file before or after writing."""
    real, calls = merging.write_shard, []

    def write_shard(*args):
        calls.append(args)
        now = len(calls) == n
        if now and not after:
            act(args[2])
        result = real(*args)
        if now and after:
            act(args[2])
        return result

    monkeypatch.setattr(merging, "write_shard", write_shard)


def fail_at(monkeypatch, n, error):
    """Make writing the n-th weight file fail."""

    def act(partial):
        partial.write_bytes(b"half")
        raise error

    at_writing(monkeypatch, n, act)


def staging(out):
    return Staging(out).folder


def test_output_that_would_touch_the_base_is_refused(case, tmp_path):
    base, _, state, _ = case
    (tmp_path / "link").symlink_to(base)
    before = content(base)
    for output in (base, base / "sub", base / ".." / "base", tmp_path / "link", tmp_path):
        with pytest.raises(CheckpointError, match="it is the base"):
            merge(base, [state], output)
    assert content(base) == before


@pytest.mark.parametrize("there", ["a file", "other files", "a finished merge"])
def test_output_with_something_in_it_is_refused_and_kept(case, there):
    base, _, state, out = case
    if there == "a file":
        out.write_text("a file")
    elif there == "a finished merge":
        merge(base, [state], out)
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    before = content(out)
    found = {"a file": "it is a file", "other files": r"not empty \(thesis\.txt\)"}
    with pytest.raises(CheckpointError, match=found.get(there, "not empty")):
        merge(base, [state], out)
    assert content(out) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_failure_leaves_nothing_or_a_merge_that_goes_on(case, monkeypatch, n, error):
    base, tensors, state, out = case
    with monkeypatch.context() as patch:
        fail_at(patch, n, error)
        with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
            merge(base, [state], out)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert "Free some space" in str(caught.value)
    assert not out.exists()
    assert staging(out).exists() == (n > 1)
    assert not list(staging(out).rglob("*.partial"))
    report = merge(base, [state], out)
    assert len(report.resumed) == n - 1
    assert len(report.tensors) == 6  # those of resumed files included
    assert_merged(out, tensors, state)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in base.iterdir())
    assert not staging(out).exists()


def unfinished(case, monkeypatch):
    base, _, state, out = case
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(base, [state], out)
    return base, state, out


CHANGES = {
    "another adapter": (
        lambda b, s: ([WeightedAdapter(replace(s, sites=dict(list(s.sites.items())[:5])))], None)
    ),
    "another value": (lambda b, s: ([changed(s)], None)),
    "another weight": (lambda b, s: ([WeightedAdapter(s, 0.5)], None)),
    "another dtype": (lambda b, s: ([s], MergeOptions(dtype="float32"))),
    "base touched": (lambda b, s: (touch(b), ([s], None))[1]),
}


def changed(state):
    sites = dict(state.sites)
    name = next(iter(sites))
    A = sites[name].A.clone()
    A[0, 0] += 1e-3
    return replace(state, sites={**sites, name: replace(sites[name], A=A)})


def touch(base):
    path = base / "model-00001-of-00003.safetensors"
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_something_else_is_refused_and_kept(case, monkeypatch, change):
    base, state, out = unfinished(case, monkeypatch)
    before = content(out)
    parts, options = CHANGES[change](base, state)
    with pytest.raises(CheckpointError, match="it was of something else"):
        merge_checkpoint(base, parts, out, options=options)
    assert content(out) == before


def test_damaged_finished_file_is_made_again(case, monkeypatch):
    base, state, out = unfinished(case, monkeypatch)
    path = Staging(out).files / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = merge(base, [state], out)
    assert report.resumed == ("model-00002-of-00003.safetensors",)
    assert_verified(base, [state], out)


class PowerCutError(BaseException):
    """Ends a merge at once."""


def test_stopped_at_any_rename_the_output_is_absent_or_complete(case, monkeypatch):
    base, _, state, out = case
    for step in range(100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(staging(out), ignore_errors=True)
        if step % 2:
            out.mkdir()  # an empty folder may be there
        left = [step]

        def stop(real, left=left):
            def renamed(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise PowerCutError
                return real(*args, **kwargs)

            return renamed

        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(Path, name, stop(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", stop(shutil.rmtree))
            with contextlib.suppress(PowerCutError):
                merge(base, [state], out)
        if not out.exists() or not any(out.iterdir()):
            merge(base, [state], out)
        assert content(out).keys() == content(base).keys()
        assert_verified(base, [state], out)
        if left[0] >= 0:
            break
    assert 8 < step < 100


def test_what_a_kill_left_after_the_last_rename_is_removed(case, monkeypatch):
    base, _, state, out = case
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "remove", lambda self: None)
        merge(base, [state], out)
    assert staging(out).exists()
    with pytest.raises(CheckpointError, match="not empty"):
        merge(base, [state], out)
    assert not staging(out).exists()


def test_second_merge_into_one_output_never_mixes(case, monkeypatch):
    """Another adapter is refused; the same merge may finish, and then the first says so."""
    base, tensors, state, out = case

    def merge_too(_):
        with pytest.raises(CheckpointError, match="it was of something else"):
            merge(base, [llama_adapter(tensors, seed=5)], out)
        merge(base, [state], out)

    at_writing(monkeypatch, 1, merge_too, after=True)
    with pytest.raises(CheckpointError, match="another merge works on the same output"):
        merge(base, [state], out)
    assert_verified(base, [state], out)


def before_publishing(monkeypatch, act):
    """Do something when all weight files of the first merge are complete."""
    real, calls = Staging.publish, []

    def publish(self, side_files):
        calls.append(self)
        if len(calls) == 1:
            act()
        real(self, side_files)

    monkeypatch.setattr(Staging, "publish", publish)


def test_a_merge_that_another_has_overtaken_says_so(case, monkeypatch):
    base, _, state, out = case
    before_publishing(monkeypatch, lambda: merge(base, [state], out))
    with pytest.raises(CheckpointError, match="was removed: another merge works on the same outp"):
        merge(base, [state], out)
    assert_verified(base, [state], out)
    assert not staging(out).exists()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_output_that_somebody_writes_meanwhile_is_left_as_it_is(case, monkeypatch, what):
    base, _, state, out = case
    kept = out / "notes.txt" if what == "folder" else out

    def write():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("mine")

    before_publishing(monkeypatch, write)
    with pytest.raises(CheckpointError, match="since this merge began somebody else has written"):
        merge(base, [state], out)
    assert kept.read_text() == "mine"


def test_side_file_with_the_longest_name_there_is_comes_along(case):
    base, _, state, out = case
    name = "a" * 250 + ".json"
    (base / name).write_text("{}")
    merge(base, [state], out.with_name("o" * 255))
    assert (out.with_name("o" * 255) / name).read_text() == "{}"


def test_base_that_changes_underneath_is_noticed(case, monkeypatch):
    base, _, state, out = case
    at_writing(monkeypatch, 2, lambda _: touch(base))  # a shard that is finished already
    with pytest.raises(CheckpointError, match=r"model-00001.*changed while it was being merged"):
        merge(base, [state], out)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_read_only_folder_is_one_clear_error(case, tmp_path):
    base, _, state, _ = case
    folder = tmp_path / "ro"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="may write to"):
        merge(base, [state], folder / "out")


def test_too_little_space_is_known_before_anything_is_written(case, monkeypatch):
    base, _, state, out = case
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(CheckpointError, match="only 5,000 are free"):
        merge(base, [state], out)
    assert not out.exists()


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    assert free_bytes(tmp_path / "a" / "b" / "c") > 10


# Several processes ------------------------------------------------------------------------------


def share_a_merge(base, out):
    """One of two processes, of which the second fails at first."""
    rank = int(os.environ["RANK"])
    part = WeightedAdapter(llama_adapter(load_checkpoint(base)))
    real = merging.write_shard

    def fail(*args):
        raise CheckpointError("write", "the disk of one burned", "Wait")

    if rank == 1:
        merging.write_shard = fail
    said = "the disk of one burned" if rank == 1 else "process 1 failed"
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoint(base, [part], out)
    assert not out.exists()
    merging.write_shard = real
    report = merge_checkpoint(base, [part], out)
    return len(report.tensors), len(report.resumed)


@pytest.mark.slow
def test_processes_of_torchrun_share_a_merge_and_fail_together(case, forks):
    base, tensors, state, out = case
    found = [rank.result() for rank in forks.start_ranks(2, share_a_merge, base, out)]
    assert all(n_tensors == 6 and n_resumed for n_tensors, n_resumed in found)
    assert_merged(out, tensors, state)
    assert not staging(out).exists()


# Kills ------------------------------------------------------------------------------------------


def merge_alone(base, out):
    part = WeightedAdapter(llama_adapter(load_checkpoint(base)))
    print("begun", flush=True)
    merge_checkpoint(base, [part], out, options=MergeOptions(workers=1))


@pytest.mark.slow
def test_killed_at_moments_all_over_the_merge_the_output_is_absent_or_complete(tmp_path, forks):
    tensors = llama_tensors(layers=6, hidden=256, inner=512, vocab=1024)
    base = save_checkpoint(tmp_path / "base", tensors, 6, LLAMA)
    out, part = tmp_path / "out", WeightedAdapter(llama_adapter(tensors))

    def run(delay=None):
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
    n_resumed = n_killed = 0
    # On a fast machine few moments lie between the first finished file and the rename: some
    # more are tried until two were hit. Which moment is hit decides nothing else.
    while n_killed < 8 or (n_resumed < 2 and n_killed < 60):
        k, n_killed = n_killed, n_killed + 1
        run((k * 0.618 + 0.06) % 1 * whole)
        if out.exists():
            assert_verified(base, [part], out)
        elif staging(out).exists() and k != 2:  # and one goes on after two kills
            report = merge(base, [part], out)
            n_resumed += bool(report.resumed)
            assert_verified(base, [part], out)
        shutil.rmtree(out, ignore_errors=True)


# A full disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_full_disk_is_one_clear_error_and_the_merge_goes_on_afterwards(
    tmp_path, small_disk, monkeypatch
):
    tensors = llama_tensors(hidden=256, inner=256, vocab=512)  # 0.9 MB in bfloat16
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    state = llama_adapter(tensors)
    hog = small_disk / "hog"
    hog.write_bytes(bytes(1_500_000))
    with pytest.raises(CheckpointError, match="are free"):
        merge(base, [state], small_disk / "out")
    # Somebody fills the disk after the check.
    monkeypatch.setattr(merging, "_check_space", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"No space left.*Free some space"):
        merge(base, [state], small_disk / "out")
    assert not list(small_disk.rglob("*.partial"))
    assert not (small_disk / "out").exists()
    hog.unlink()
    merge(base, [state], small_disk / "out")
    assert_verified(base, [state], small_disk / "out")


def test_disk_that_becomes_read_only_is_one_clear_error(tmp_path, small_disk):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*not read-only"):
        merge(base, [llama_adapter(tensors)], small_disk / "out")


# Verification -----------------------------------------------------------------------------------


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_one_wrong_bit_is_found_and_named(case, name):
    base, _, state, out = case
    merge(base, [state], out)
    plan = merging.plan_merge(out, [state])
    shard = plan.base.shard_of[name]
    flip(out / shard, plan.base.tensors[name].start + 1, bit=16)
    problems = verify_checkpoint(base, [state], out).problems
    assert len(problems) == 1
    assert name in problems[0]


def test_verification_tells_other_adapters_missing_and_strange_files(case):
    base, tensors, state, out = case
    merge(base, [state], out)
    assert verify_checkpoint(base, [llama_adapter(tensors, seed=5)], out).problems
    assert verify_checkpoint(base, [WeightedAdapter(state, 0.5)], out).problems
    (out / "tokenizer.json").unlink()
    (out / "model-strange.safetensors").write_bytes(b"")
    found = " ".join(verify_checkpoint(base, [state], out).problems)
    assert "'tokenizer.json' is missing" in found
    assert "'model-strange.safetensors' does not belong there" in found
    (out / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        verify_checkpoint(base, [state], out).check()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "pytorch_model.bin", "modeling.py", "sub/model.bin"]
)
def test_verification_names_files_that_were_added(case, name):
    base, _, state, out = case
    merge(base, [state], out)
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("")
    assert_verified(base, [state], out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    assert verify_checkpoint(base, [state], out).problems == (f"'{name}' does not belong there",)


def test_merge_verifies_before_it_publishes(case, monkeypatch):
    base, _, state, out = case
    report = merge(base, [state], out, verify=True)
    assert report.verified
    shutil.rmtree(out)
    # What a failing disk does:
    at_writing(monkeypatch, 2, lambda path: flip(path, -1, bit=64), after=True)
    with pytest.raises(CheckpointError, match="verify the merged checkpoint"):
        merge(base, [state], out, verify=True)
    assert not out.exists()

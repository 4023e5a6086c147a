"""Never half-done: refusals, resuming, two at once, ranks, kills at random, a full disk."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint_helpers import (
    LLAMA,
    assert_equal_to_dense,
    dense,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    save_checkpoint,
)

from lora_inject.checkpoint import MergeOptions, Part, Ranks, merge_checkpoint, verify_checkpoint
from lora_inject.checkpoint import merge_files as merging
from lora_inject.checkpoint.journal import STAGING, check_space
from lora_inject.errors import CheckpointError
from lora_inject.storage import disk

ALONE = Ranks()


@pytest.fixture
def case(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    return base, tensors, llama_adapter(tensors), tmp_path / "out"


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def fail_at(monkeypatch, n, error):
    """Make writing the n-th shard fail."""
    real, calls = merging.write_shard, []

    def write_shard(*args):
        calls.append(args)
        if len(calls) == n:
            args[2].write_bytes(b"half")
            raise error
        return real(*args)

    monkeypatch.setattr(merging, "write_shard", write_shard)
    return calls


def test_output_that_would_touch_the_base_is_refused(case, tmp_path):
    base, _, state, _ = case
    (tmp_path / "link").symlink_to(base)
    before = content(base)
    for output in (base, base / "sub", base / ".." / "base", tmp_path / "link", tmp_path):
        with pytest.raises(CheckpointError, match="it is the base"):
            merge_checkpoint(base, [Part(state)], output)
    assert content(base) == before


def test_output_with_something_in_it_is_refused_and_kept(case):
    base, _, state, out = case
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"not empty \(thesis\.txt\)"):
        merge_checkpoint(base, [Part(state)], out)
    assert content(out) == {"thesis.txt": b"years of work"}


def test_finished_output_is_not_written_again(case):
    base, _, state, out = case
    merge_checkpoint(base, [Part(state)], out)
    before = content(out)
    with pytest.raises(CheckpointError, match="not empty"):
        merge_checkpoint(base, [Part(state)], out)
    assert content(out) == before


def test_output_that_is_a_file_is_refused(case):
    base, _, state, out = case
    out.write_text("a file")
    with pytest.raises(CheckpointError, match="it is a file"):
        merge_checkpoint(base, [Part(state)], out)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_failure_leaves_nothing_or_a_merge_that_goes_on(case, monkeypatch, n, error):
    base, tensors, state, out = case
    with monkeypatch.context() as patch:
        fail_at(patch, n, error)
        with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
            merge_checkpoint(base, [Part(state)], out)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert "Free some space" in str(caught.value)
    if n == 1:
        assert not out.exists()
    else:
        assert [p.name for p in out.iterdir()] == [STAGING]
        assert not list(out.rglob("*.partial"))
    report = merge_checkpoint(base, [Part(state)], out)
    assert len(report.resumed) == n - 1
    assert len(report.tensors) == 6  # those of resumed shards included
    touched = {name + ".weight" for name in state.sites}
    assert_equal_to_dense(load_checkpoint(out), dense(tensors, (state, 1.0)), touched)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in base.iterdir())


def unfinished(case, monkeypatch):
    base, _, state, out = case
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(base, [Part(state)], out)
    return base, state, out


CHANGES = {
    "another adapter": (
        lambda b, s: ([Part(replace(s, sites=dict(list(s.sites.items())[:5])))], None)
    ),
    "another value": (lambda b, s: ([Part(changed(s))], None)),
    "another weight": (lambda b, s: ([Part(s, 0.5)], None)),
    "another dtype": (lambda b, s: ([Part(s)], MergeOptions(dtype="float32"))),
    "base touched": (lambda b, s: (touch(b), ([Part(s)], None))[1]),
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
        merge_checkpoint(base, parts, out, options)
    assert content(out) == before


def test_damaged_finished_shard_is_made_again(case, monkeypatch):
    base, state, out = unfinished(case, monkeypatch)
    path = out / STAGING / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = merge_checkpoint(base, [Part(state)], out)
    assert report.resumed == ("model-00002-of-00003.safetensors",)
    assert verify_checkpoint(base, [Part(state)], out).problems == ()


@pytest.mark.parametrize("step", range(1, 12))
def test_crash_while_publishing_is_never_loadable_half_done(case, monkeypatch, step):
    """Stop at the n-th rename, as a power cut would, then look and resume."""
    base, _, state, out = case

    class PowerCutError(BaseException):
        pass

    renames, real = [], Path.replace

    def rename(self, target):
        renames.append(target)
        if len(renames) >= first + step:
            raise PowerCutError
        return real(self, target)

    first = 1_000_000
    real_publish = merging.Staging.publish

    def publish(self, *args):
        nonlocal first
        first = len(renames)
        return real_publish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        patch.setattr(merging.Staging, "publish", publish)
        with contextlib.suppress(PowerCutError):
            merge_checkpoint(base, [Part(state)], out)
    if (out / "config.json").exists():
        assert verify_checkpoint(base, [Part(state)], out).problems == ()
    if (out / STAGING).exists():
        merge_checkpoint(base, [Part(state)], out)
    assert verify_checkpoint(base, [Part(state)], out).problems == ()
    assert content(out).keys() == content(base).keys()


def test_base_that_changes_underneath_is_noticed(case, monkeypatch):
    base, _, state, out = case
    real, calls = merging.write_shard, []

    def write_shard(*args):
        calls.append(args)
        if len(calls) == 2:
            touch(base)  # a shard that is finished already
        return real(*args)

    monkeypatch.setattr(merging, "write_shard", write_shard)
    with pytest.raises(CheckpointError, match=r"model-00001.*changed while it was being merged"):
        merge_checkpoint(base, [Part(state)], out)
    assert not (out / "config.json").exists()


def test_second_merge_into_one_output_is_refused(case, monkeypatch):
    base, _, state, out = case
    real, errors = merging.write_shard, []

    def write_shard(*args):
        if not errors:
            errors.append(None)
            with pytest.raises(CheckpointError, match="another merge is writing there"):
                merge_checkpoint(base, [Part(state)], out)
        return real(*args)

    monkeypatch.setattr(merging, "write_shard", write_shard)
    merge_checkpoint(base, [Part(state)], out)
    assert errors
    assert verify_checkpoint(base, [Part(state)], out).problems == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_read_only_folder_is_one_clear_error(case, tmp_path):
    base, _, state, _ = case
    folder = tmp_path / "ro"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="may write to"):
        merge_checkpoint(base, [Part(state)], folder / "out")


def test_too_little_space_is_known_before_anything_is_written(case, monkeypatch):
    base, _, state, out = case
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(CheckpointError, match="only 5,000 are free"):
        merge_checkpoint(base, [Part(state)], out)
    assert not out.exists()


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    assert check_space(tmp_path / "a" / "b" / "c", 10) > 10


# Ranks ------------------------------------------------------------------------------------------


class FakeMsvcrt:
    """Byte locks of Windows: each byte of a file belongs to at most one open descriptor."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.owners = {}

    def locking(self, fd, mode, n_bytes):
        start, inode = os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_ino
        keys = [(inode, start + k) for k in range(n_bytes)]
        if mode == self.LK_UNLCK:
            assert all(self.owners.pop(key) == fd for key in keys)
        elif any(key in self.owners for key in keys):
            raise PermissionError(13, "Permission denied")
        else:
            self.owners |= dict.fromkeys(keys, fd)


@pytest.mark.parametrize("platform", ["posix", "windows"])
def test_locks_exclude_and_are_shared(tmp_path, monkeypatch, platform):
    if platform == "windows":
        monkeypatch.setattr(disk, "fcntl", None)
        monkeypatch.setattr(disk, "msvcrt", FakeMsvcrt())
    files = [disk.open_write(tmp_path / "lock") for _ in range(3)]

    def answers(*shared):
        with contextlib.ExitStack() as stack:
            pairs = zip(files, shared, strict=False)
            return [stack.enter_context(disk.try_lock(fd, shared=s)) for fd, s in pairs]

    assert answers(False, False, True) == [True, False, False]
    assert answers(True, True, False) == [True, True, False]
    assert answers(False) == [True]  # all of them were given back
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("world", [1, 2])
def test_merge_with_the_locks_of_windows(case, monkeypatch, world):
    fake = FakeMsvcrt()
    monkeypatch.setattr(disk, "fcntl", None)
    monkeypatch.setattr(disk, "msvcrt", fake)
    base, _, state, out = case
    for rank in range(world):
        merge_checkpoint(base, [Part(state)], out, ranks=Ranks(rank, world))
    assert verify_checkpoint(base, [Part(state)], out).problems == ()
    assert not fake.owners


def test_ranks_share_the_shards_and_the_last_one_publishes(case):
    base, tensors, state, out = case
    first = merge_checkpoint(base, [Part(state)], out, ranks=Ranks(0, 2))
    assert not first.complete
    assert [p.name for p in out.iterdir()] == [STAGING]
    second = merge_checkpoint(base, [Part(state)], out, ranks=Ranks(1, 2))
    assert second.complete
    assert len(second.tensors) == 6
    touched = {name + ".weight" for name in state.sites}
    assert_equal_to_dense(load_checkpoint(out), dense(tensors, (state, 1.0)), touched)


RANK = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_checkpoint_helpers import llama_adapter, load_checkpoint
from lora_inject.checkpoint import Part, merge_checkpoint
def progress(done, total):
    if "DIE" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
part = Part(llama_adapter(load_checkpoint(sys.argv[1])))
print(merge_checkpoint(sys.argv[1], [part], sys.argv[2], progress=progress).complete)
"""


def start_rank(base, out, environment):
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "SLURM"))}
    return subprocess.Popen(
        [sys.executable, "-c", RANK.format(path=path), str(base), str(out)],
        env=clean | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ],
    ids=lambda names: names[0],
)
def test_processes_share_a_merge_and_a_killed_one_is_redone(case, names):
    """Two processes at once, the second killed in the middle of a shard; then it alone again."""
    base, tensors, state, out = case
    variables = [dict(zip(names, (str(rank), "2"), strict=True)) for rank in range(2)]
    first = start_rank(base, out, variables[0])
    second = start_rank(base, out, variables[1] | {"DIE": "1"})
    assert first.communicate()[0].strip() == "False"
    second.communicate()
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL)
    assert [path.name for path in out.iterdir()] == [STAGING]  # nothing that loads
    again = start_rank(base, out, variables[1])
    assert again.communicate()[0].strip() == "True"
    assert verify_checkpoint(base, [Part(state)], out).problems == ()
    touched = {name + ".weight" for name in state.sites}
    assert_equal_to_dense(load_checkpoint(out), dense(tensors, (state, 1.0)), touched)


@pytest.mark.slow
def test_processes_that_end_together_publish_once(case):
    base, _, state, out = case
    ranks = [start_rank(base, out, {"RANK": str(r), "WORLD_SIZE": "3"}) for r in range(3)]
    said = [rank.communicate()[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert said.count("True") == 1
    assert not (out / STAGING).exists()
    assert verify_checkpoint(base, [Part(state)], out).problems == ()


def test_only_one_of_two_ranks_that_end_together_publishes(case, monkeypatch):
    base, _, state, out = case
    merge_checkpoint(base, [Part(state)], out, ranks=Ranks(0, 2))
    real, others = merging.Staging.publish, []

    def publish(self, *args):
        if not others:
            others.append(None)
            others[0] = merge_checkpoint(base, [Part(state)], out, ranks=Ranks(0, 2))
        real(self, *args)

    monkeypatch.setattr(merging.Staging, "publish", publish)
    assert merge_checkpoint(base, [Part(state)], out, ranks=Ranks(1, 2)).complete
    assert not others[0].complete
    assert verify_checkpoint(base, [Part(state)], out).problems == ()


def test_every_shard_is_dealt_once():
    sizes = [(f"s{i}", 100 + i % 7) for i in range(50)]
    for world in (1, 2, 3, 64):
        dealt = [name for rank in range(world) for name in Ranks(rank, world).mine(sizes)]
        assert sorted(dealt) == sorted(name for name, _ in sizes)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "-1", "SLURM_NTASKS": "2"},
    ],
)
def test_impossible_ranks_are_refused(environment):
    with pytest.raises(CheckpointError, match="share the merge"):
        Ranks.from_environment(environment)


def test_ranks_come_from_the_environment():
    assert Ranks.from_environment({}) == Ranks(0, 1)
    assert Ranks.from_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "5"}) == Ranks(3, 5)


def test_a_rank_that_died_is_redone_alone(case):
    base, _, state, out = case
    merge_checkpoint(base, [Part(state)], out, ranks=Ranks(1, 3))
    report = merge_checkpoint(base, [Part(state)], out, ranks=ALONE)
    assert report.complete
    assert len(report.resumed) == 1
    assert verify_checkpoint(base, [Part(state)], out).problems == ()


# Kills ------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
from test_checkpoint_helpers import llama_adapter, load_checkpoint
from lora_inject.checkpoint import MergeOptions, Part, Ranks, merge_checkpoint
tensors = load_checkpoint(sys.argv[1])
part = Part(llama_adapter(tensors))
for line in sys.stdin:
    pid = __import__("os").fork()
    if pid == 0:
        first = []
        def progress(done, total):
            if not first:
                first.append(1)
                print("writing", flush=True)
        options = MergeOptions(workers=1)
        merge_checkpoint(sys.argv[1], [part], sys.argv[2], options, progress, Ranks())
        print("published", flush=True)
        __import__("os")._exit(0)
    print(pid, flush=True)
    __import__("os").waitpid(pid, 0)
    print("over", flush=True)
"""


def kill_at_random(server, delay):
    """Run one merge, kill it `delay` seconds after its first byte; returns how far it got, when."""
    server.stdin.write("go\n")
    server.stdin.flush()
    said, pid, began = [], None, 0.0
    while True:
        line = server.stdout.readline().strip()
        if line.isdigit():
            pid = int(line)
        elif line:
            said.append(line)
        if line == "over":
            return said, time.monotonic() - began
        if line == "writing":
            began = time.monotonic()
        if line == "writing" and delay is not None:
            while time.monotonic() - began < delay:
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments_the_output_is_absent_resumable_or_complete(tmp_path):
    tensors = llama_tensors(layers=6, hidden=512, inner=1024, vocab=2048)
    base = save_checkpoint(tmp_path / "base", tensors, 6, LLAMA)
    out, part = tmp_path / "out", Part(llama_adapter(tensors))
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    server = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(path=path), str(base), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        kills, inside, resumed = kill_many_times(server, base, part, out)
        server.stdin.close()
    print(
        f"{inside} of {kills} kills between the first byte and the last rename, {resumed} resumed"
    )
    assert kills >= 50
    assert inside >= 40
    assert resumed >= 5


def kill_many_times(server, base, part, out):
    """At least 50 kills, and more until 40 hit the writing: how many do depends on the machine."""
    rng = random.Random(0)
    whole = 60.0
    for _ in range(3):  # the first one also warms up
        whole = min(whole, kill_at_random(server, None)[1])
        shutil.rmtree(out)
    kills = inside = resumed = 0
    while kills < 50 or ((inside < 40 or resumed < 5) and kills < 500):
        said, _ = kill_at_random(server, rng.random() * 0.7 * whole)
        kills += 1
        inside += "writing" in said and "published" not in said
        if (out / "config.json").exists():
            assert verify_checkpoint(base, [part], out).problems == ()
        if out.exists():
            names = {p.name for p in out.iterdir()} - {STAGING, STAGING + "-removed"}
            assert names <= {p.name for p in base.iterdir()}
        if rng.random() < 0.5 and (out / STAGING).exists():
            report = merge_checkpoint(base, [part], out, ranks=ALONE)
            resumed += bool(report.resumed)
            assert verify_checkpoint(base, [part], out).problems == ()
        if not (out / STAGING).exists():
            shutil.rmtree(out, ignore_errors=True)
    return kills, inside, resumed


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
        merge_checkpoint(base, [Part(state)], small_disk / "out")
    # Somebody fills the disk after the check.
    monkeypatch.setattr(merging, "check_space", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"No space left.*Free some space"):
        merge_checkpoint(base, [Part(state)], small_disk / "out")
    assert not list(small_disk.rglob("*.partial"))
    assert not (small_disk / "out" / "config.json").exists()
    hog.unlink()
    merge_checkpoint(base, [Part(state)], small_disk / "out")
    assert verify_checkpoint(base, [Part(state)], small_disk / "out").problems == ()


def test_disk_that_becomes_read_only_is_one_clear_error(tmp_path, small_disk):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*not read-only"):
        merge_checkpoint(base, [Part(llama_adapter(tensors))], small_disk / "out")


# Verification -----------------------------------------------------------------------------------


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_one_wrong_bit_is_found_and_named(case, name):
    base, _, state, out = case
    merge_checkpoint(base, [Part(state)], out)
    plan = merging.plan_merge(out, [Part(state)])
    shard = plan.base.shard_of[name]
    flip(out / shard, plan.base.tensors[name].start + 1, bit=16)
    problems = verify_checkpoint(base, [Part(state)], out).problems
    assert len(problems) == 1
    assert name in problems[0]


def test_verification_tells_other_adapters_missing_and_strange_files(case):
    base, tensors, state, out = case
    merge_checkpoint(base, [Part(state)], out)
    assert verify_checkpoint(base, [Part(llama_adapter(tensors, seed=5))], out).problems
    assert verify_checkpoint(base, [Part(state, 0.5)], out).problems
    (out / "tokenizer.json").unlink()
    (out / "model-strange.safetensors").write_bytes(b"")
    found = " ".join(verify_checkpoint(base, [Part(state)], out).problems)
    assert "'tokenizer.json' is missing" in found
    assert "'model-strange.safetensors' does not belong there" in found
    (out / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        verify_checkpoint(base, [Part(state)], out).check()


def test_base_with_other_bytes_of_the_same_time_is_noticed_with_verify(case, monkeypatch):
    base, _, state, out = case
    with monkeypatch.context() as patch:
        fail_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(base, [Part(state)], out, MergeOptions(verify=True))
    path = base / "model-00001-of-00003.safetensors"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip(path, -1)
    os.utime(path, ns=times)
    with pytest.raises(CheckpointError, match=r"base's bytes are not what they were.*model-00001"):
        merge_checkpoint(base, [Part(state)], out, MergeOptions(verify=True))


def test_merge_verifies_before_it_publishes(case, monkeypatch):
    base, _, state, out = case
    report = merge_checkpoint(base, [Part(state)], out, MergeOptions(verify=True))
    assert report.verified
    shutil.rmtree(out)
    real = merging.write_shard

    def write_shard(*args):
        result = real(*args)
        flip(args[2], -1, bit=64)  # what a failing disk does
        return result

    monkeypatch.setattr(merging, "write_shard", write_shard)
    with pytest.raises(CheckpointError, match="verify the merged checkpoint"):
        merge_checkpoint(base, [Part(state)], out, MergeOptions(verify=True))
    assert not (out / "config.json").exists()


def test_identity_is_json(case, monkeypatch):
    _, _, out = unfinished(case, monkeypatch)
    journal = json.loads((out / STAGING / "journal.json").read_text())
    assert set(journal) == {"format", "tool", "plan", "options", "adapters", "base"}
    assert len(journal["base"]) == 3
    assert torch.is_tensor(torch.zeros(1))

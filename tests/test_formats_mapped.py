"""Large adapter files left on disk: the same tensors, a private copy, memory given back."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint_helpers import LLAMA, llama_adapter, llama_tensors, save_checkpoint

from lora_inject.checkpoint import Checkpoint, load_part, plan_merge
from lora_inject.checkpoint.parts import digest
from lora_inject.errors import FormatError
from lora_inject.formats import write_adapter
from lora_inject.storage import mapped
from lora_inject.storage.mapped import left_on_disk
from lora_inject.storage.tensors import read_tensors

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="needs madvise")

TENSORS = {
    "float": torch.randn(7, 5),
    "half": torch.randn(3).bfloat16(),
    "int": torch.arange(11),
    "bool": torch.tensor([[True], [False]]),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    save_file(TENSORS, tmp_path / "a.safetensors", {"k": "v"})
    return tmp_path / "a.safetensors"


def equal(found):
    assert found.keys() == TENSORS.keys()
    for name, wanted in TENSORS.items():
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name


def test_the_same_tensors_either_way(file):
    tensors, metadata = read_tensors(file)
    equal(tensors)
    with left_on_disk() as keeper:
        views, same = read_tensors(file)
    assert metadata == same == {"k": "v"}
    equal(views)
    keeper.release()
    equal(views)  # read again where they are used again


def test_nobody_can_change_or_cut_what_is_mapped(file):
    with left_on_disk():
        views, _ = read_tensors(file)
    file.write_bytes(b"")
    equal(views)


@pytest.mark.parametrize("damage", [lambda d: d[:-4], lambda d: d + b"1234", lambda d: d[:20]])
def test_damaged_files_are_refused_either_way(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError):
        read_tensors(file)
    with left_on_disk(), pytest.raises(FormatError):
        read_tensors(file)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_copy_is_whole_without_the_kernels_help(file, monkeypatch, kernel):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    if not kernel:
        monkeypatch.setattr(mapped.os, "copy_file_range", refuse, raising=False)
    with left_on_disk():
        equal(read_tensors(file)[0])


def test_small_files_and_live_models_are_read_into_memory(file, monkeypatch):
    monkeypatch.setattr(mapped.Mapped, "map", lambda *_: pytest.fail("was mapped"))
    read_tensors(file)
    monkeypatch.setattr(mapped, "LEAST_BYTES", 1 << 20)
    with left_on_disk():
        read_tensors(file)


def test_no_room_for_the_copy_means_memory(file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_copy", full)
    with left_on_disk():
        equal(read_tensors(file)[0])


def test_planning_releases_and_changes_no_digest(tmp_path, monkeypatch):
    tensors = llama_tensors()
    base = Checkpoint.open(save_checkpoint(tmp_path / "base", tensors, 1, LLAMA))
    folder = write_adapter(llama_adapter(tensors), tmp_path / "adapter")
    in_memory = load_part(folder, base)
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    released = []
    monkeypatch.setattr(mapped.Mapped, "release", lambda self: released.append(self))
    on_disk = load_part(folder, base)
    assert digest(on_disk) == digest(in_memory)
    assert released
    assert plan_merge(base, [on_disk]).digest == plan_merge(base, [in_memory]).digest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_of_what_was_read_is_given_back(tmp_path):
    save_file({"w": torch.ones(16 << 20)}, tmp_path / "a.safetensors")

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with left_on_disk() as keeper:
        views, _ = read_tensors(tmp_path / "a.safetensors")
    before = resident_bytes()
    assert float(views["w"].sum()) == 16 << 20
    assert resident_bytes() - before > 48 << 20
    keeper.release()
    assert resident_bytes() - before < 16 << 20

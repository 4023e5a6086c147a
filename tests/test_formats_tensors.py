"""The tensors of a safetensors file, compared with the reference library in both directions."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.files.tensors_on_disk import in_memory
from lora_inject.errors import FormatError

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12).map(
    lambda kinds: {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)
    }
)


def assert_equal(tensors: dict[str, Tensor], due: dict[str, Tensor]) -> None:
    assert tensors.keys() == due.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == due[name].dtype
        assert torch.equal(tensor, due[name]), name


def views(t: Tensor) -> list[Tensor]:
    made = [t, t.reshape(-1)[1::2], t.mT if t.ndim > 1 else t, t[..., None].expand(*t.shape, 3)]
    return made + ([t[-1], t.transpose(0, -1)[-1:], *t.unbind(0)] if t.ndim and len(t) else [])


@given(tensors=tables)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tensors_are_read_and_written_as_by_the_library(tensors, tmp_path) -> None:
    path = tmp_path / "any.safetensors"
    save_file(tensors, path, {"k": "v"})
    mine, metadata = read_tensors(path)
    assert metadata == {"k": "v"}
    theirs = load_file(path)
    assert_equal(mine, theirs)
    for name, tensor in mine.items():
        for view, due in zip(views(tensor), views(theirs[name]), strict=True):
            assert (type(view), view.shape) == (type(tensor), due.shape)
            assert type(in_memory(view)) is Tensor
            assert torch.equal(in_memory(view), due)
            assert torch.equal(view.to(torch.float64) + 1, due.to(torch.float64) + 1)
    strided = {name: t.t() if t.ndim == 2 else t for name, t in tensors.items()}
    content = serialize(strided, {"format": "pt"})
    assert_equal(load(content), strided)
    assert content == serialize(dict(reversed(strided.items())), {"format": "pt"})


WRITES: list[Callable[[Tensor], object]] = [
    Tensor.zero_,
    lambda w: w.__setitem__(0, 0.0),
    lambda w: torch.zeros(1000, out=w[:]),
    lambda w: save_file({"w": w}, "/dev/null"),
    lambda w: setattr(w, "data", torch.zeros(1000)),
    torch.nn.Parameter,
]


@pytest.mark.parametrize("write", WRITES)
def test_what_is_read_from_a_file_cannot_be_written_to(write, tmp_path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    w = read_tensors(tmp_path / "a.safetensors")[0]["w"]
    with pytest.raises(FormatError, match=r"its values are in the file. Use a copy"):
        write(w)
    assert not w.requires_grad
    for copied in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert type(copied) is Tensor
        copied.zero_()
    assert w.all()


def written(path: Path, value: float, *, old: bool = True) -> Path:
    save_file({"w": torch.full((1000,), value)}, path)
    if old:
        os.utime(path, (0, 0))
    return path


def test_a_tensor_outlives_the_name_of_its_file_and_not_its_bytes(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a.safetensors", 1.0), tmp_path / "b.safetensors"
    w = read_tensors(path)[0]["w"]
    path.rename(other)
    assert w.sum() == 1000
    other.write_bytes(written(path, 0.0).read_bytes())
    with pytest.raises(FormatError, match="written to after it was opened"):
        w.sum()
    os.truncate(other, 2000)
    with pytest.raises(FormatError, match=r"the file ends after \d+ of them"):
        w.sum()


def test_a_file_that_may_be_written_again_at_the_same_time_is_read_at_once(tmp_path: Path) -> None:
    for value in range(200):
        path = written(tmp_path / "a.safetensors", float(value), old=False)
        w, time = read_tensors(path)[0]["w"], path.stat().st_mtime_ns
        written(path, -1.0, old=False)
        os.utime(path, ns=(time, time))  # what a coarse clock does
        assert w.unique().tolist() == [value]


def n_open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_any_number_of_files_may_be_read(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{i}.safetensors", float(i)) for i in range(200)]
    before = n_open()
    held = [read_tensors(path)[0]["w"] for path in paths]
    assert n_open() - before <= 64
    for path in paths:
        written(path.with_suffix(".new"), -1.0).replace(path)
    assert [w[3:].mean().item() for w in held] == list(range(200))
    del held
    assert n_open() == before

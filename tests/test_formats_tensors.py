"""The tensors of a safetensors file, compared with the reference library in both directions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import FORMATS, Format, read_adapter
from lora_inject.storage.tensors import in_memory, read_tensors, serialize

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12).map(
    lambda kinds: {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)
    }
)


def assert_equal(found: dict[str, Tensor], due: dict[str, Tensor]) -> None:
    assert found.keys() == due.keys()
    for name, tensor in found.items():
        assert tensor.dtype == due[name].dtype
        assert torch.equal(tensor, due[name]), name


@given(tensors=tables)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tensors_are_read_as_the_library_reads_them(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "any.safetensors"
    save_file(tensors, path, {"k": "v"})
    found, metadata = read_tensors(path)
    assert metadata == {"k": "v"}
    assert_equal(found, load_file(path))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


@given(tensors=tables)
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written(tensors: dict[str, Tensor]) -> None:
    strided = {name: t.t() if t.ndim == 2 else t for name, t in tensors.items()}
    content = serialize(strided, {"format": "pt"})
    assert_equal(load(content), strided)
    assert content == serialize(dict(reversed(strided.items())), {"format": "pt"})


def views(t: Tensor) -> list[Tensor]:
    flat = t.reshape(-1)
    found = [
        t.detach(),
        flat[1:],
        flat[::2],
        t.mT if t.ndim > 1 else t,
        t[..., None].expand(*t.shape, 3),
    ]
    return found + ([t[-1], t.transpose(0, -1)[-1:], *t.unbind(0)] if t.ndim and len(t) else [])


@given(tensors=tables)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tensors_on_disk_and_their_views_hold_what_is_read(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "any.safetensors"
    save_file(tensors, path)
    found, due = read_tensors(path, on_disk=True)[0], read_tensors(path)[0]
    for name, tensor in found.items():
        with torch.inference_mode():
            inferred = views(tensor)
        for mine, theirs in zip(views(tensor) + inferred, views(due[name]) * 2, strict=True):
            assert type(mine) is type(tensor)
            assert mine.shape == theirs.shape
            assert type(in_memory(mine)) is Tensor
            assert torch.equal(in_memory(mine), theirs)
            assert torch.equal(mine.to(torch.float64) + 1, theirs.to(torch.float64) + 1)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_file_is_not_changed_by_what_is_read_from_it(on_disk: bool, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    w = read_tensors(tmp_path / "a.safetensors", on_disk=on_disk)[0]["w"]
    in_memory(w).zero_()
    if on_disk:
        with pytest.raises(FormatError, match="its values are in the file"):
            w.zero_()
    assert load_file(tmp_path / "a.safetensors")["w"].all()


def test_a_tensor_on_disk_outlives_the_name_of_its_file_and_not_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    os.utime(path, (0, 0))  # clocks of files are coarse
    w = read_tensors(path, on_disk=True)[0]["w"]
    path.rename(tmp_path / "b.safetensors")
    assert w.sum() == 1000
    save_file({"w": torch.zeros(1000)}, tmp_path / "c.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes())
    with pytest.raises(FormatError, match="written to after it was opened"):
        w.sum()
    os.truncate(tmp_path / "b.safetensors", 2000)
    with pytest.raises(FormatError, match=r"the file ends after \d+ of them"):
        w.sum()


def test_a_format_of_ones_own_need_not_leave_values_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = AdapterState({})
    own = Format(
        lambda state, path, facts: b"",
        lambda path, facts: state,
        lambda path: path.suffix == ".own",
    )
    monkeypatch.setitem(FORMATS, "own", own)
    (tmp_path / "a.own").touch()
    assert read_adapter(tmp_path / "a.own", on_disk=True) is state

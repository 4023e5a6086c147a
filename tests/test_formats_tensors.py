"""The tensors of a safetensors file, beside the reference library in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from lora_inject.storage.tensors import read_tensors, serialize

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
    assert_equal(read_tensors(path, on_disk=True)[0], found)


@given(tensors=tables)
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written(tensors: dict[str, Tensor]) -> None:
    strided = {name: t.t() if t.ndim == 2 else t for name, t in tensors.items()}
    content = serialize(strided, {"format": "pt"})
    assert_equal(load(content), strided)
    assert content == serialize(dict(reversed(strided.items())), {"format": "pt"})


@pytest.mark.parametrize("on_disk", [True, False])
def test_values_on_disk_take_no_memory_until_they_are_used(on_disk: bool, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    w = read_tensors(tmp_path / "a.safetensors", on_disk=on_disk)[0]["w"]
    assert w.untyped_storage().resizable() is not on_disk  # memory that is mapped cannot grow
    w.zero_()
    assert load_file(tmp_path / "a.safetensors")["w"].all()

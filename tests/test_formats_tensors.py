"""Reading a safetensors file: small neighbours in one go, each tensor in memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_inject.storage import tensors as reading
from lora_inject.storage.tensors import read_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
STEP_BYTES = 64

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(kinds=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tensors_are_read_as_the_library_reads_them(
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a step of 64 bytes: tensors below, at and above it, empty ones, scalars, all dtypes."""
    monkeypatch.setattr(reading, "_STEP_BYTES", STEP_BYTES)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)
    }
    path = tmp_path / "any.safetensors"
    save_file(tensors, path)
    found, due = read_tensors(path)[0], load_file(path)
    assert found.keys() == due.keys()
    for name, tensor in found.items():
        assert tensor.dtype == due[name].dtype
        assert torch.equal(tensor, due[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.is_contiguous()
    places = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
    assert len(set(places)) == len(places)


def test_a_file_that_is_cut_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({f"t{i}": torch.ones(8) for i in range(4)}, path)
    checked = reading._checked_header

    def then_cut(path: Path) -> object:
        found = checked(path)
        path.write_bytes(path.read_bytes()[:-8])
        return found

    monkeypatch.setattr(reading, "_checked_header", then_cut)
    with pytest.raises(reading.FormatError, match="it was cut while it was read"):
        read_tensors(path)

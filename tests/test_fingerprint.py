"""The fingerprint: the same base in another dtype passes, another base does not."""

import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_inject as li
from lora_inject.core.adapter.fingerprint import (
    Fingerprint,
    compare,
    sample_positions,
    samples,
    unverifiable,
)
from lora_inject.errors import FormatError


def sample(weight: torch.Tensor) -> tuple[float, ...]:
    return samples({"": weight})[""]


@given(st.lists(st.integers(0, 9), max_size=4))
def test_positions_are_distinct_ends_included(shape: list[int]) -> None:
    positions, numel = sample_positions(tuple(shape)), math.prod(shape)
    assert len(positions) == min(numel, 16)
    assert list(positions) == sorted(set(positions))
    if numel:
        assert (positions[0], positions[-1]) == (0, numel - 1)
        gaps = [b - a for a, b in pairwise(positions)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("shape", [(), (1,), (5,), (40,), (7, 9), (3, 4, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_samples_are_the_values_at_the_positions(shape: tuple[int, ...], transposed: bool) -> None:
    weight = torch.randn(shape)
    weight = weight.mT if transposed and weight.ndim > 1 else weight
    due = [float(weight.flatten()[p]) for p in sample_positions(tuple(weight.shape))]
    assert list(sample(weight)) == due


def test_many_are_sampled_as_each_alone() -> None:
    """Weights alike are sampled together; names, order, dtypes and shapes must not mix."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    weights = {
        f"{i}": torch.randn(shape, dtype=dtype)
        for i, (shape, dtype) in enumerate(2 * list(product([(7, 9), (63,), (), (0, 4)], dtypes)))
    }
    weights["turned"] = torch.randn(9, 7).mT
    found = samples(weights)
    assert [*found] == [*weights]
    assert found == {name: sample(weight) for name, weight in weights.items()}
    assert all(len(found[name]) == min(w.numel(), 16) for name, w in weights.items())


def fingerprint_of(weight: torch.Tensor) -> Fingerprint:
    return Fingerprint({"w": tuple(weight.shape)}, {"w": sample(weight)})


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 10.0])
def test_the_same_base_in_another_dtype(first, second, scale) -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    assert compare(fingerprint_of(weight.to(first)), fingerprint_of(weight.to(second))) == {}


def test_another_base_and_a_slightly_other_base() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 30) * 0.02
    other = fingerprint_of(torch.randn(30, 30) * 0.02)
    assert "16 of 16" in compare(fingerprint_of(weight), other)["w"]
    assert compare(fingerprint_of(weight), fingerprint_of(weight * 1.02)) != {}


def test_other_shapes_names_and_values() -> None:
    one = Fingerprint({"w": (2, 3)}, {})
    turned = compare(one, Fingerprint({"w": (3, 2)}, {}))["w"]
    assert "has shape (2, 3) in the file and (3, 2) here" in turned
    assert compare(one, Fingerprint({}, {}))["w"] == "is not in this model"
    nan = Fingerprint({"w": (1,)}, {"w": (math.nan,)})
    zero = Fingerprint({"w": (1,)}, {"w": (0.0,)})
    assert compare(nan, nan) == {}
    assert compare(nan, zero) != {}
    assert compare(Fingerprint({"w": (1,)}, {"w": ()}), zero) != {}


def test_quantized_weights_are_named_not_compared() -> None:
    plain = Fingerprint({"w": (1,), "v": (1,)}, {"w": (1.0,), "v": (1.0,)})
    packed = Fingerprint({"w": (1,), "v": (1,)}, {"v": (1.0,)}, {"w": "int8"})
    for pair in ((plain, packed), (packed, plain)):
        assert unverifiable(*pair) == ("w",)
        assert compare(*pair) == {}


# Adapters without sites -------------------------------------------------------------------------


def base(head: float, body: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight.fill_(head)
        model[0].weight.add_(body)
    return model


@pytest.mark.parametrize("train", [r"\d\.bias", "3"], ids=["biases", "head"])
@pytest.mark.parametrize("layout", ["native", "peft"])
def test_an_adapter_without_sites_knows_its_base(train: str, layout: str, tmp_path: Path) -> None:
    model = li.inject(base(head=1.0), {"targets": [], "train": [train]})
    path = tmp_path / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(model, path, format=layout)
    loaded = li.load_adapter(base(head=1.0 if train != "3" else 7.0), path)
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))
    other = base(head=1.0, body=0.5)
    with pytest.raises(FormatError, match=r"another base: '0\.weight'"):
        li.load_adapter(other, path)
    li.load_adapter(other, path, base="any")

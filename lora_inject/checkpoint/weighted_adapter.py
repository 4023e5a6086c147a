"""Adapters to merge: values, each with a mixing weight, checked before the base is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import CheckpointError
from lora_inject.functional import all_finite
from lora_inject.storage.tensors import in_memory

_STEP_ELEMENTS = 1 << 20
_FACTS = attrgetter(
    *("weight", "kind", "in_features", "out_features", "rank", "alpha", "scaling", "transposed"),
    *("experts", "spans", "variant"),
)
"""Fields of a site that affect its update, besides name and tensors."""


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter to fold in.

    Attributes:
        state: The adapter.
        weight: Mixing weight: the base gets `weight` times its delta.
        label: What to call it in messages, such as its path.
    """

    state: AdapterState
    weight: float = 1.0
    label: str = "the adapter"


def tensors_of(adapter: WeightedAdapter) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter with a name for messages and for the digest."""
    state = adapter.state
    for name, site in state.sites.items():
        yield from ((f"{name} {role}", tensor) for role, tensor in site.tensors.items())
    yield from ((f"{name}{state.rows.get(name, '')}", t) for name, t in state.trained.items())
    yield from state.base_copies.items()


def check_adapters(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse what cannot be merged into anything: none, nothing in one, weight 0, NaN or Inf."""
    if not adapters:
        raise CheckpointError("merge", "no adapter was given", "Name at least one")
    for adapter in adapters:
        asked = f"merge {adapter.label}"
        if not math.isfinite(adapter.weight) or adapter.weight == 0:
            found, remedy = (
                f"its weight is {adapter.weight}",
                "Give a finite weight other than zero",
            )
            raise CheckpointError(asked, found, remedy)
        if not (adapter.state.sites or adapter.state.trained):
            remedy = "It is not a trained adapter; check the path"
            raise CheckpointError(asked, "it holds no tensors", remedy)
        for name, tensor in tensors_of(adapter):
            if tensor.is_meta:
                found = f"'{name}' is on the meta device"
                raise CheckpointError(asked, found, "Load the adapter's values first")
            if not all(map(all_finite, _steps(tensor))):
                remedy = "Its training diverged; take an earlier checkpoint of the adapter"
                raise CheckpointError(asked, f"'{name}' holds NaN or Inf", remedy)
    _check_different(adapters)


def _check_different(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse the same adapter twice."""
    seen: dict[str, WeightedAdapter] = {}
    for adapter in adapters if len(adapters) > 1 else ():
        first = seen.setdefault(digest(replace(adapter, weight=1.0)), adapter)
        if first is not adapter:
            raise CheckpointError(
                f"merge {first.label} and {adapter.label}",
                "they are the same adapter, which would count twice",
                "Give it once, with the weight that is meant",
            )


def _steps(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's values in their order, in pieces that memory does not notice."""
    flat = tensor.detach().contiguous().flatten()
    for start in range(0, flat.numel(), _STEP_ELEMENTS):
        yield in_memory(flat[start : start + _STEP_ELEMENTS])


def digest(adapter: WeightedAdapter) -> str:
    """Return the SHA-256 of an adapter's numbers and its weight; in any order of its sites."""
    sha = hashlib.sha256(repr(adapter.weight).encode())
    for name, site in sorted(adapter.state.sites.items()):
        sha.update(repr((name, *_FACTS(site.spec))).encode())
    for name, tensor in sorted(tensors_of(adapter), key=lambda row: row[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for step in _steps(tensor):
            buffer = bytearray(step.numel() * step.element_size())  # without numpy
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(step.view(torch.uint8))
            sha.update(buffer)
    return sha.hexdigest()

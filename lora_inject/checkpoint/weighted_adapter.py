"""Adapters to merge: values, each with a mixing weight, read and checked before the base is read.

A PEFT file of stacked experts does not say which of a module's parameters a pair belongs to; their
order in the model does. It does not say their orientation either; the model's class does.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.formats import read_adapter
from lora_inject.functional import all_finite
from lora_inject.storage.strict_json import read_json
from lora_inject.storage.tensors import bytes_of, in_memory

_STEP_ELEMENTS = 1 << 20
_FACTS = attrgetter(
    *("weight", "kind", "in_features", "out_features", "rank", "alpha", "scaling", "transposed"),
    *("experts", "spans", "variant"),
)
"""Fields of a site that affect its update, besides name and tensors."""


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter to merge.

    Attributes:
        state: The adapter.
        weight: Mixing weight: the base gets `weight` times its delta.
        label: Its name in messages, such as its path.
    """

    state: AdapterState
    weight: float = 1.0
    label: str = "the adapter"


Given = WeightedAdapter | AdapterState | str | os.PathLike[str]
"""An adapter as a caller may give it: with a weight, as a value, or by its path."""


def weighted_adapter(given: Given, base: Checkpoint) -> WeightedAdapter:
    """Return an adapter with its weight, 1 by default."""
    if isinstance(given, WeightedAdapter):
        return given
    return WeightedAdapter(given) if isinstance(given, AdapterState) else read_weighted(given, base)


def read_weighted(
    path: str | os.PathLike[str], base: Checkpoint, weight: float = 1.0, **options: Any
) -> WeightedAdapter:
    """Read an adapter from files, for merging into a base.

    Args:
        path: The adapter, in any format of `formats`.
        base: What it will be merged into.
        weight: Mixing weight.
        options: Of the format's `read`.

    Returns:
        The adapter, labeled with its path.

    Raises:
        FormatError: The adapter cannot be read correctly.
    """
    path = Path(path)
    facts = base.facts
    config_file = path / "adapter_config.json"
    if config_file.is_file():
        said = read_json(config_file, f"read adapter '{path}', {config_file.name}")
        if isinstance(said, dict) and said.get("target_parameters"):  # building a class is slow
            with contextlib.suppress(CheckpointError):  # a class that cannot be built
                facts = BaseClass(base).facts()
    return WeightedAdapter(read_adapter(path, facts=facts, **options), weight, str(path))


def _tensors_of(adapter: WeightedAdapter) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter with a name for messages and for the digest."""
    state = adapter.state
    for name, site in state.sites.items():
        yield from ((f"{name} {role}", tensor) for role, tensor in site.tensors.items())
    yield from ((f"{name}{state.rows.get(name, '')}", t) for name, t in state.trained.items())
    yield from state.base_copies.items()


def check_adapters(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse what cannot be merged: nothing, an adapter twice, one of weight 0, of NaN or Inf."""
    if not adapters:
        raise CheckpointError("merge", "no adapter was given", "Name at least one")
    seen: dict[str, WeightedAdapter] = {}
    for adapter in adapters:
        _check_values(adapter)
        if len(adapters) == 1:
            return
        first = seen.setdefault(digest(replace(adapter, weight=1.0)), adapter)
        if first is not adapter:
            found = "they are the same adapter, which would count twice"
            remedy = "Give it once, with the weight that is meant"
            raise CheckpointError(f"merge {first.label} and {adapter.label}", found, remedy)


def _check_values(adapter: WeightedAdapter) -> None:
    asked = f"merge {adapter.label}"
    if not math.isfinite(adapter.weight) or adapter.weight == 0:
        found, remedy = f"its weight is {adapter.weight}", "Give a finite weight other than zero"
        raise CheckpointError(asked, found, remedy)
    if not (adapter.state.sites or adapter.state.trained):
        remedy = "It is not a trained adapter; check the path"
        raise CheckpointError(asked, "it holds no tensors", remedy)
    for name, tensor in _tensors_of(adapter):
        if tensor.is_meta:
            found = f"'{name}' is on the meta device"
            raise CheckpointError(asked, found, "Load the adapter's values first")
        if not all(map(all_finite, _steps(tensor))):
            remedy = "Its training diverged; take an earlier checkpoint of the adapter"
            raise CheckpointError(asked, f"'{name}' holds NaN or Inf", remedy)


def _steps(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's values in their order, in small pieces."""
    flat = tensor.detach().contiguous().flatten()
    for start in range(0, flat.numel(), _STEP_ELEMENTS):
        yield in_memory(flat[start : start + _STEP_ELEMENTS])


def digest(adapter: WeightedAdapter) -> str:
    """Return the SHA-256 of an adapter's numbers and its weight; in any order of its sites."""
    sha = hashlib.sha256(repr(adapter.weight).encode())
    for name, site in sorted(adapter.state.sites.items()):
        sha.update(repr((name, *_FACTS(site.spec))).encode())
    for name, tensor in sorted(_tensors_of(adapter), key=lambda row: row[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for step in _steps(tensor):
            sha.update(bytes_of(step))
    return sha.hexdigest()

"""A loss that writes into a batch which other trials read as well: they would get what it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lora_inject.errors import StateError
from lora_inject.trees import tree_leaves


def shared_by_trials(batches: Mapping[str, Any]) -> frozenset[str]:
    """Return the trials whose batch has a tensor in memory that another trial's batch has, too."""
    owners: dict[int, set[str]] = {}
    for name, batch in batches.items():
        for tensor in _tensors(batch):
            owners.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return frozenset(name for names in owners.values() if len(names) > 1 for name in names)


@contextmanager
def unwritten(batch: Any, asked: str) -> Iterator[None]:
    """Check that the body writes into no tensor of a batch.

    Raises:
        StateError: It does.
    """
    before = _versions(batch)
    yield
    if _versions(batch) != before:
        raise StateError(
            asked,
            "it writes into its batch, which other trials read as well",
            "Let it work on a copy, or give each trial tensors of its own",
        )


def _versions(batch: Any) -> list[int]:
    """Return how often each tensor was written to in place."""
    return [t._version for t in _tensors(batch) if not t.is_inference()]


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]

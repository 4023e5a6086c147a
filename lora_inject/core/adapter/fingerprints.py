"""Fingerprints of a base under other names, or of its parts together; copies of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lora_inject.core.adapter.fingerprint import Fingerprint


def renamed_fingerprint(mark: Fingerprint, change: Callable[[str], str]) -> Fingerprint:
    """Return a fingerprint with other names of the weights."""
    return Fingerprint(*({change(k): v for k, v in each.items()} for each in mark.parts))


def union_of(several: Iterable[Fingerprint]) -> Fingerprint:
    """Return the union of fingerprints of one base."""
    known = zip(*(mark.parts for mark in several), strict=True)
    return Fingerprint(*({k: v for each in part for k, v in each.items()} for part in known))


def same_values(one: Tensor, two: Tensor) -> bool:
    """Compare two copies of a tensor in the narrower of their dtypes: one may have been rounded."""
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(narrow), two.to(narrow))

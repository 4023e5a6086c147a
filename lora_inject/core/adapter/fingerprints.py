"""Fingerprints of a base's parts together, and copies of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled


def union_of(several: Iterable[Fingerprint]) -> Fingerprint:
    """Return the union of fingerprints of one base, which may have been packed in some."""
    known: dict[str, Sampled] = {}
    for mark in several:
        for name, sampled in mark.items():
            known[name] = _both(sampled, known.get(name, sampled))
    return known


def _both(one: Sampled, other: Sampled) -> Sampled:
    plain = other if one.values is None else one
    return plain._replace(packed=one.packed or other.packed)


def same_values(one: Tensor, two: Tensor) -> bool:
    """Compare two copies of a tensor in the narrower of their dtypes: one may have been rounded."""
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(narrow), two.to(narrow))

"""Equality of values that hold tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with tensors in mappings compared bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape, one.is_meta) == (other.dtype, other.shape, other.is_meta)
        return alike and (one.is_meta or torch.equal(one, other.to(one.device)))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)

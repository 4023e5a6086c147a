"""Trained tensors and copies of base tensors of several adapters that become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from lora_inject.errors import StateError


def mixed(several: Sequence[tuple[Mapping[str, Tensor], float]], asked: str) -> dict[str, Tensor]:
    """Return trained tensors T mixed by their weights, `W + sum of w (T - W)`.

    W is not known here, so the weights of a tensor must add up to 1: then W cancels out.
    """
    found = {}
    for name in dict.fromkeys(name for trained, _ in several for name in trained):
        there = [(trained[name], weight) for trained, weight in several if name in trained]
        tensors, where = [tensor for tensor, _ in there], f"{asked}, trained tensor '{name}'"
        if not math.isclose(sum(weight for _, weight in there), 1, rel_tol=1e-9):
            added = " + ".join(f"{weight:g}" for _, weight in there)
            raise StateError(
                where,
                f"it is a full copy of the base's tensor, with weight {added}: its change from the "
                "base is not known here",
                "Fold the adapters into the base with `lora-inject merge`, give weights that add "
                "up to 1, or leave it out (select)",
            )
        if len({tensor.shape for tensor in tensors}) > 1:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
            raise StateError(where, f"its shapes are {shapes}", "Give adapters of one base")
        if len(there) == 1:
            found[name] = tensors[0]
            continue
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        products = [weight * tensor.detach().double() for tensor, weight in there]
        found[name] = torch.stack(products).sum(0).to(dtype)
    return found


def same_values(one: Tensor, two: Tensor) -> bool:
    """Compare two copies of a tensor in the narrower of their dtypes: one may have been rounded."""
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(narrow), two.to(narrow))


def common_copies(several: Sequence[Mapping[str, Tensor]], asked: str) -> dict[str, Tensor]:
    """Return the copies of the base's tensors that any of several adapters carries."""
    found: dict[str, Tensor] = {}
    for copies in several:
        for name, tensor in copies.items():
            held = found.setdefault(name, tensor)
            if not same_values(held, tensor):
                different = "the adapters hold different copies of this base tensor"
                raise StateError(f"{asked}, '{name}'", different, "Give adapters of one base")
    return found

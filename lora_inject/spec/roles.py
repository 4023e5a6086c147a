"""The variants by name, and the tensors that each trains besides A and B.

Planning, counting and the checks of a config need only these rows. The computations are in
`adapter.variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Shape = tuple[int, ...]
ShapeOf = Callable[[Shape, Shape], Shape]
"""The shape of a tensor, by those of A `(..., rank, in)` and B `(..., out, rank)`."""


class Roles(NamedTuple):
    """A variant as planning sees it."""

    further: Mapping[str, ShapeOf]  # tensors besides A and B, by role
    gained: bool = False  # whether its outputs have a gain besides the update of W


ROLES = {
    "lora": Roles({}),
    "dora": Roles({"m": lambda a, b: b[:-1]}, gained=True),  # noqa: ARG005 - one for each output
}

FROM_WEIGHT = ("pissa", "olora")
"""Inits that are derived from W: the site keeps a frozen copy A0, B0 of its start."""


def shapes_of(variant: str, a: Shape, b: Shape, lora_bias: bool = False) -> dict[str, Shape]:
    """Return the shapes of the trainable tensors of a site; `lora_bias` is that of B.

    Examples:
        >>> shapes_of("lora", (2, 4), (6, 2))
        {'A': (2, 4), 'B': (6, 2)}
    """
    further = {role: shape(a, b) for role, shape in ROLES[variant].further.items()}
    return {"A": a, "B": b, **further, **({"b": b[:-1]} if lora_bias else {})}

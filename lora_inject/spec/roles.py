"""The names of the variants, and the tensors that each trains besides A and B, by role and shape.

Planning, counting and the checks of a config need only these. The computations are in
`adapter.variants`, whose `register_variant` also adds a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Shape = tuple[int, ...]

FURTHER: dict[str, Mapping[str, Callable[[Shape, Shape], Shape]]] = {
    "lora": {},
    "dora": {"m": lambda a, b: b[:-1]},  # noqa: ARG005 - one magnitude for each adapted output
}
"""Variant to role to its shape, by the shapes of A `(..., rank, in)` and B `(..., out, rank)`."""

GAINED = {"dora"}
"""Variants whose outputs have a gain besides the update of W."""

FROM_WEIGHT = ("pissa", "olora")
"""Inits that are derived from W: the site keeps a frozen copy A0, B0 of its start."""


def shapes_of(variant: str, a: Shape, b: Shape, lora_bias: bool = False) -> dict[str, Shape]:
    """Return the shapes of the trainable tensors of a site; `lora_bias` is that of B.

    Examples:
        >>> shapes_of("lora", (2, 4), (6, 2))
        {'A': (2, 4), 'B': (6, 2)}
    """
    further = {role: shape(a, b) for role, shape in FURTHER[variant].items()}
    return {"A": a, "B": b, **further, **({"b": b[:-1]} if lora_bias else {})}

"""A mixture of experts, as planning sees it."""

from __future__ import annotations

from typing import NamedTuple


class Mixture(NamedTuple):
    """A block that sends each token to a few of its experts."""

    name: str  # of the block
    n_experts: int
    top_k: int | None  # to how many experts a token goes, where it is known
    experts: tuple[str, ...]  # names of the candidates that are experts, or stacks of them
    routers: tuple[str, ...]  # names of what chooses
    shared: tuple[str, ...]  # names of the other linear layers of the block

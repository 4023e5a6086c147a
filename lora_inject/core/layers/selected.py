"""Who takes part in a forward, and how: the seam between a layer and what is selected.

A layer asks its selection which object is in force, and that object computes the layer's output
and what reads of its weights give. The core has one way of taking part, a mix of adapters. Another
way (an adapter for each row, the runs of a pass) is a class like `Mix` in a room of its own, and
touches no layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

ENTERED: ContextVar[tuple[Any, ...]] = ContextVar("lora_inject_contexts", default=())
"""The contexts that the caller runs in, the innermost last (`layers.contexts`)."""


class Selected:
    """One way of taking part; what it computes from never changes, as threads and layers keep it.

    Attributes:
        names: The adapters that take part, with their weights.
        in_graph: The same in the form that compiled graphs read; None before the first.
    """

    names: Mapping[str, float]
    in_graph: Any = None

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an adapted layer for one call with these arguments."""
        raise NotImplementedError

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return what whoever reads a parameter gets.

        Args:
            layer: The adapted module.
            param: The name of its parameter.
            raw: The parameter.
            entries: The layer's entries on it, by adapter.
            outside: Whether another module reads it while the layer itself does not run.
        """
        raise NotImplementedError

    def drops(self, layer: nn.Module) -> bool:
        """Return whether dropout of adapters acts in a layer."""
        return layer.training

    def forget_use(self) -> None:
        """Let the next forward of each layer note again which entries it uses."""


class Mix(Selected):
    """Adapters with weights, the same for the whole batch: `W + sum of w * scale * B @ A`.

    An empty mix is the plain base.

    Examples:
        >>> Mix({"sql": 0.7}) == Mix({"sql": 0.7})
        True
    """

    def __init__(self, names: Mapping[str, float] | None = None) -> None:
        self.names = dict(names or {})

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the sum of the updates of the mix."""
        return layer._lora_mixed(self, args, kwargs)

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return W with the updates and trained copies of the mix."""
        taking = [(entries[name], w) for name, w in self.names.items() if name in entries]
        return layer._lora_read_mixed(param, raw, taking, outside=outside) if taking else raw

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mix) and other.names == self.names

    def __reduce__(self) -> tuple[Any, ...]:
        return Mix, (self.names,)  # without what graphs read

    __hash__ = None  # type: ignore[assignment]  # what keeps one compares by identity

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.names!r})"

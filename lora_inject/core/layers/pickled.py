"""What of a layer with adapters is pickled and copied: its plain class, and the mixin on top."""

from __future__ import annotations

from typing import Any

from lora_inject.core.layers.adapted import Adapted
from lora_inject.errors import LayerError


def reduction_of(layer: Adapted, reduced: Any) -> tuple[tuple[Any, ...], Any]:
    """Return what a swapped class is made from again, and the state of the layer.

    `reduced` is what `__reduce_ex__` of the plain class returns.

    Raises:
        LayerError: The layer's own state leaves out its adapters.
    """
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else layer.__dict__
    attributes = state[0] if isinstance(state, tuple) and state else state
    if not isinstance(attributes, dict) or "_lora" not in attributes:
        asked = f"a copy or pickle of a {type(layer).__name__}"
        problem = "its own __getstate__ leaves out what carries the adapters"
        raise LayerError(asked, problem, "Let it return all of __dict__, or eject first")
    return (layer._lora_plain, layer._lora_mixin, tuple(sorted(layer._lora_reads))), state

"""The gradients of a linear layer with updates, where its backward is itself differentiated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_inject.core.functional.dropout import mask
from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.plain_operations import differentiate, plain_updates
from lora_inject.core.functional.products import as_matrix


def differentiable_gradients(
    y: Tensor,
    inputs: tuple[Tensor | None, ...],
    updates: Sequence[Update],
    dropped: Sequence[Tensor | None],
    float32: bool,
    needs: Sequence[bool],
    g: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of the Function, with a graph.

    `y` is the output of the frozen layer, zeros where it is an input. `needs` says which gradients
    are wanted.
    """
    x = inputs[0]
    assert x is not None
    masks = [None if d is None else mask(d, as_matrix(x)) for d in dropped]
    out = plain_updates(y, x, updates, masks, float32)
    gx, _, *others = differentiate(out, inputs, (needs[0], False, *needs[2:]), g)
    return gx, g if needs[1] else None, *others

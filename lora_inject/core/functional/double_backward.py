"""The backward of a linear layer with updates, where that backward is itself differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.dropout import mask
from lora_inject.core.functional.linear import frozen_output, saved
from lora_inject.core.functional.plain_operations import differentiate, plain_updates
from lora_inject.core.functional.products import as_matrix


def differentiable_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients with a graph, for a backward that is itself differentiated."""
    how, needs = ctx.how, ctx.needs_input_grad
    x, weight, bias, factors, kept = saved(ctx)
    if weight is None:
        y = torch.zeros_like(g)
    else:
        y = frozen_output(x, weight, bias, how.transposed, how.dtype)
    dropped = [one.dropped for one in kept]
    masks = [None if d is None else mask(d, as_matrix(x)) for d in dropped]
    out = plain_updates(y, x, how.updates(factors), masks, how.float32)
    inputs, wanted = (x, None, weight, bias, None, *factors), (needs[0], False, *needs[2:])
    gx, _, *others = differentiate(out, inputs, wanted, g)
    return gx, g if needs[1] else None, *others

"""Updates of slices of an output: each has its own columns, and a part of `x A^T` and of B."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lora_inject.core.functional import cpu
from lora_inject.core.functional.factors import Spans
from lora_inject.core.functional.products import add_product, scaled_product
from lora_inject.core.spec.sites import adapted_parts


def add_to_slices(y2: Tensor, spans: Spans, h: Tensor, B: Tensor, scale: float) -> None:
    """Add an update, whose `x A^T` is h, to slices of y `(n, out)` in place."""
    for y_part, h_part, B_part in _parts(spans, y2, h, B):
        add_product(y_part, h_part, B_part.mT, scale)


def gradients_of_slices(
    g2: Tensor, spans: Spans, h: Tensor, B: Tensor, scale: float, *, to_B: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of h without the scale, and that of B where it is asked for."""
    gh = torch.empty_like(h)
    for g_part, gh_part, B_part in _parts(spans, g2, gh, B):
        torch.matmul(g_part, B_part, out=gh_part)
    if not to_B:
        return gh, None
    gB = torch.empty_like(B)
    for g_part, h_part, gB_part in _parts(spans, g2, h, gB):
        scaled_product(g_part.mT, h_part, scale, out=gB_part)
    return gh, gB


def _parts(
    spans: Spans, wide: Tensor, thin: Tensor, B: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return matching views of the output, of `x A^T` or its gradient, and of B.

    Of `(n, out)`, `(n, rank * parts)` and `(adapted out, rank)` there is one matrix for each span.
    If the spans are equal in size and evenly spaced, it is one stack, which needs only one product.
    """
    starts, widths = [a for a, _ in spans], [b - a for a, b in spans]
    rank, n_parts, width = B.shape[1], len(spans), widths[0]
    steps = {b - a for a, b in pairwise(starts)}
    # oneDNN, which multiplies in 16 bits on a CPU, does not support matrices side by side.
    one_product = not (wide.element_size() == 2 and cpu.is_cpu(wide))
    if one_product and len(steps) == len(set(widths)) == 1:
        rows, cols = wide.stride()
        strides, offset = (steps.pop() * cols, rows, cols), wide.storage_offset() + starts[0] * cols
        stack = wide.as_strided((n_parts, wide.shape[0], width), strides, offset)
        return [(stack, thin.view(-1, n_parts, rank).transpose(0, 1), B.view(-1, width, rank))]
    parts = adapted_parts(spans, rank)
    return [(wide[:, part.start : part.stop], thin[:, part.a], B[part.b]) for part in parts]

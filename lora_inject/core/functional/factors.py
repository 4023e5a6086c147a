"""Definitions of the arithmetic: one update, and which operations to use.

| an update is | where | it has |
|---|---|---|
| `Update` | a forward adds it to an output | A, B, a scale, the spans of the output, dropout |
| `Patch` | a weight that is read or merged takes it | A, B, the site, the weight in a mix |
| `layers.attached.Recipe` | nothing is looked up yet | an `Update` with the names of A and B |
| `weight.LowRank` | a weight is multiplied with | W and all of its patches, as matrices |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.torch_inside import in_trace
from lora_inject.core.spec.sites import SiteSpec

Spans = tuple[tuple[int, int], ...]


class Update(NamedTuple):
    """One low-rank update as a forward uses it.

    Attributes:
        A: `(rank * parts, in)`.
        B: `(adapted out, rank)`.
        scale: Factor on `B @ A`, mixing weight included.
        spans: `(start, stop)` along the output of each part; None for the whole output.
        dropout: Probability of dropping an element of the input of A; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scale: float
    spans: Spans | None = None
    dropout: float = 0.0


class Patch(NamedTuple):
    """One low-rank update as a weight takes it: what is added to W that is read, or merged into it.

    Attributes:
        spec: The site.
        A: `spec.a_shape`.
        B: `spec.b_shape`.
        weight: Mixing weight; negative for the frozen start of a weight-derived init.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    weight: float = 1.0

    @property
    def scale(self) -> float:
        """The factor on `B @ A`."""
        return self.spec.scale * self.weight


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapters for a base of `dtype`: float32, or float64 for float64.

    In 16 bits, rounding would lose small optimizer steps.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(dtype: torch.dtype, float32: bool) -> torch.dtype:
    """Return the dtype of the low-rank arithmetic for an output of `dtype`."""
    return torch.float32 if float32 and dtype != torch.float64 else dtype


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t.to(dtype)`; if the dtype is right already, this costs only a comparison."""
    return t if t.dtype == dtype else t.to(dtype)


def cast_stack(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `cast(t, dtype)`; a matrix that a whole stack shares is cast once."""
    if t.dim() == 3 and len(t) > 1 and t.stride(0) == 0:
        return cast(t[:1], dtype).expand_as(t)
    return cast(t, dtype)


def as_matrix(t: Tensor) -> Tensor:
    """Return a tensor `(..., width)` as `(n, width)`, a view where it can be one."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def no_view(out: Tensor, shape: torch.Size) -> Tensor:
    """Return a new tensor in another shape that autograd does not take for a view of it.

    The memory is not copied where torch can do without. A trace of torch.jit would keep the shape
    that an operator gets by its own name as a constant.
    """
    if in_trace():
        return out.reshape(shape).clone()
    return torch.ops.aten._unsafe_view.default(out, shape)  # type: ignore[no-any-return]


def without_autocast(y: Tensor) -> torch.autocast | None:
    """Return a context that is needed only inside autocast, because entering it is slow."""
    kind = y.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises for meta
        return None
    return torch.autocast(kind, enabled=False)

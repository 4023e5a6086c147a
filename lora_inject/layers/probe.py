"""Is this subclass linear in its weight the plain way?

One idea: ask it. A layer that is linear in W answers `f(x; W + D) = f(x; W) + D x` for any D; a
scaled embedding or a layer with an activation inside does not. The question is put to one module of
each class with a few random inputs, without touching the module: the trial weight goes in by
`torch.func.functional_call`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["linear_in_weight"]

ROWS = 3


def linear_in_weight(module: nn.Module, transposed: bool, ids: bool) -> bool:
    """Return whether a layer's output moves by `D x` where its weight moves by D.

    Args:
        module: A layer with a floating point `weight` on a real device.
        transposed: Whether the weight is `(in, out)`.
        ids: Whether the layer takes integer ids: an embedding.

    Returns:
        True where it holds to the precision of the dtype. False where it does not, and where the
        layer cannot be called with one tensor.
    """
    weight = module._parameters["weight"]
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A delta as large as W, so that a difference in treatment shows above rounding.
        D = torch.randn(weight.shape, device=weight.device).to(weight.dtype)
        D = D * (weight.float().std().nan_to_num().clamp_min(1e-3)).to(weight.dtype)
        x = _input(weight, transposed, ids)
        try:
            plain = torch.func.functional_call(module, {"weight": weight}, (x,))
            moved = torch.func.functional_call(module, {"weight": weight + D}, (x,))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            return False
        if not isinstance(plain, Tensor):
            return False
        expected = F.embedding(x, D) if ids else F.linear(x, D.t() if transposed else D)
        if moved.shape != expected.shape:
            return False
        scale = max(float(moved.abs().max()), float(expected.abs().max()))
        tolerance = 64 * torch.finfo(weight.dtype).eps * scale
        return float((moved - plain - expected).abs().max()) <= tolerance


def _input(weight: Tensor, transposed: bool, ids: bool) -> Tensor:
    if ids:
        return torch.arange(min(ROWS, weight.shape[0]), device=weight.device)
    n_in = weight.shape[0] if transposed else weight.shape[1]
    return torch.randn(ROWS, n_in, device=weight.device).to(weight.dtype)

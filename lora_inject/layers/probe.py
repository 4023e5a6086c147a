"""Is this layer linear in its weight the plain way?

Ask it. A layer that is linear in W answers `f(x; W + D) = f(x; W) + D x` for any D; a
scaled embedding, a layer with an activation inside or one that drops its output does not. Only
layers whose class has a forward of its own are asked, each of them, since one class may have scaled
and unscaled instances. The trial weight goes in by `torch.func.functional_call` over copies, so the
module is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 3
# Above the rounding of float32 inside a layer, below any factor that matters.
TOLERANCE = 1e-4

# What a foreign forward may answer to one tensor that it did not expect.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def linear_in_weight(module: nn.Module, transposed: bool, ids: bool, name: str = "weight") -> bool:
    """Return whether a layer's output moves by `D x` where its weight moves by D.

    Args:
        module: A layer with a floating point weight.
        transposed: Whether the weight is `(in, out)`.
        ids: Whether the layer takes integer ids: an embedding.
        name: Name of the weight among the module's parameters.

    Returns:
        True where it holds to `TOLERANCE`, in training and in eval mode. False where it does not,
        where the layer cannot be called with one tensor, and where the weight has no values.
    """
    weight = module._parameters[name]
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _modes(module) as modes:
        torch.manual_seed(0)
        W = weight.to(_wide(weight.dtype))
        # As large as W, so that a difference in treatment shows above rounding.
        D = torch.outer(torch.randn(len(W)), torch.randn(W.shape[1])).to(W)
        D *= float(W.std().nan_to_num().clamp_min(1e-3))
        x = _input(W, transposed, ids)
        expected = F.embedding(x, D) if ids else F.linear(x, D.t() if transposed else D)
        return all(_moves_by(module, {name: W + D}, x, expected) for _ in modes)


def _moves_by(module: nn.Module, trial: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    try:
        plain = torch.func.functional_call(module, _copies(module), (x,))
        moved = torch.func.functional_call(module, _copies(module) | trial, (x,))
    except _FOREIGN:
        return False
    if not isinstance(plain, Tensor) or moved.shape != expected.shape:
        return False
    scale = max(float(moved.abs().max()), float(expected.abs().max()))
    return float((moved - plain - expected).abs().max()) <= TOLERANCE * scale


@contextmanager
def _modes(module: nn.Module) -> Iterator[Iterator[None]]:
    """Give an iterator that puts the module into eval and then into training mode."""
    before = [(m, m.training) for m in module.modules()]

    def steps() -> Iterator[None]:
        for training in (False, True):
            for m, _ in before:
                m.training = training
            yield

    try:
        yield steps()
    finally:
        for m, training in before:
            m.training = training


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _copies(module: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers, which a forward may write; in float32 or wider."""
    return {
        key: t.detach().to(_wide(t.dtype), copy=True)
        for key, t in (*module.named_parameters(), *module.named_buffers())
    }


def _input(W: Tensor, transposed: bool, ids: bool) -> Tensor:
    if ids:
        return torch.arange(min(ROWS, W.shape[0]), device=W.device)
    n_in = W.shape[0] if transposed else W.shape[1]
    return torch.randn(ROWS, n_in).to(W)

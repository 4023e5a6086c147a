"""Checkpoints of torch and of others, by one call each: `recompute(run, x)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class Foreign(torch.autograd.Function):
    """A checkpoint as Unsloth, Megatron and DeepSpeed have one of their own."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: torch.Tensor) -> Any:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, g)
        return None, x.grad


def by_hooks(run: Any, x: torch.Tensor) -> torch.Tensor:
    """A checkpoint by hooks on saved tensors: each runs its part again to get what it needs."""
    saved, numbers = x.detach(), iter(range(100))
    hooks = torch.autograd.graph.saved_tensors_hooks

    def unpack(number: int) -> torch.Tensor:
        again: list[torch.Tensor] = []
        with torch.enable_grad(), hooks(lambda t: again.append(t.detach()), lambda t: t):
            run(saved.detach().requires_grad_())
        return again[number]

    with hooks(lambda _: next(numbers), unpack):
        y: torch.Tensor = run(x)
    return y


RECOMPUTE: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a Function": lambda run, x: Foreign.apply(run, x),  # type: ignore[no-any-return, no-untyped-call]
    "hooks": by_hooks,
    "torch's, reentrant": partial(checkpoint, use_reentrant=True),
    "torch's": partial(checkpoint, use_reentrant=False),
}

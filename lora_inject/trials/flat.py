"""The trainable tensors of each trial as two flat vectors; the Parameters are views of them.

An optimizer then steps two tensors for each trial, whatever the number of sites: for 32 trials one
fused AdamW takes half the time of 32 optimizers. All vectors are in one buffer, and their gradients
at the same offsets in another, so the tensors of trials with equal shapes are evenly spaced. One
launch sets the gradients of all of them to zero, and one launch adds to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_inject.trials.trial import Trial


class Buffer:
    """The memory of all trials; the memory of a dropped trial is freed with the whole buffer.

    Args:
        members: The Parameters of all trials.
    """

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self._values = members[0].new_empty(sum(member.numel() for member in members))
        self._grads = torch.zeros_like(self._values)
        self._end = 0
        self._runs: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}

    def vector(self, members: Sequence[nn.Parameter]) -> nn.Parameter:
        """Move Parameters into the buffer and return one vector of all of them."""
        begin = self._end
        for member in members:
            start, self._end = self._end, self._end + member.numel()
            place = self._values[start : self._end].view(member.shape)
            member.data = place.copy_(member.data)
            member.grad = self._grads[start : self._end].view(member.shape)
        vector = nn.Parameter(self._values[begin : self._end])
        vector.grad = self._grads[begin : self._end]
        return vector

    def zero_grad(self) -> None:
        """Set all gradients to zero in place: the Parameters' gradients are views of them."""
        self._grads.zero_()

    def forget(self) -> None:
        """Forget the known runs, because Parameters were removed or frozen."""
        self._runs.clear()

    def stack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return `torch.stack(tensors)` of Parameters; the first tensor may be zeros instead.

        The backward adds to their gradients in one launch for each run of evenly spaced Parameters.
        """
        start = 0 if tensors[0].requires_grad else 1
        members = tensors[start:]
        plainly = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if plainly or not all(t.is_leaf and t.grad is not None for t in members):
            return torch.stack(tensors)
        key = tuple(map(id, members))
        if key not in self._runs:
            self._runs[key] = _runs(members)
        found: Tensor = _Stacked.apply(start, self._runs[key], *tensors)  # type: ignore[no-untyped-call]
        return found


def _runs(members: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Return the start of each run of evenly spaced members, and its gradients as one view."""
    grads = [member.grad for member in members if member.grad is not None]
    at = [grad.storage_offset() for grad in grads]
    found, start = [], 0
    while start < len(grads):
        end, apart = start + 1, at[min(start + 1, len(at) - 1)] - at[start]
        while end < len(grads) and at[end] - at[end - 1] == apart:
            end += 1
        size, strides = (end - start, *grads[start].shape), (apart, *grads[start].stride())
        found.append((start, grads[start].as_strided(size, strides)))
        start = end
    return found


class _Stacked(torch.autograd.Function):
    """A stack whose backward adds directly to the gradients of its tensors."""

    @staticmethod
    def forward(ctx: Any, first: int, runs: list[tuple[int, Tensor]], *tensors: Tensor) -> Tensor:
        ctx.first, ctx.runs = first, runs
        return torch.stack(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        for start, grads in ctx.runs:
            grads.add_(g[ctx.first + start : ctx.first + start + len(grads)])
        return (None,) * len(ctx.needs_input_grad)


class Flat:
    """The tensors of a trial, and their groups for an optimizer.

    Args:
        parameters: Names such as `SITE.lora_A` to Parameters, which become views.
        trial: The settings.
        buffer: The memory that the tensors move to.

    Attributes:
        vectors: Two flat Parameters, of all A and of all B.
        groups: Their groups for AdamW.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], trial: Trial, buffer: Buffer
    ) -> None:
        self._lr = (trial.lr, trial.lr * trial.b_lr_ratio)
        # By identity: the copy of a tied tensor is listed under each of its names.
        of_B = dict.fromkeys(p for key, p in parameters.items() if key.endswith("lora_B"))
        rest = dict.fromkeys(p for p in parameters.values() if p not in of_B)
        self._members = [list(rest), list(of_B)]
        self.vectors = [buffer.vector(members) for members in self._members]
        self.groups: list[dict[str, Any]] = [
            {"params": [vector], "lr": lr, "betas": trial.betas, "weight_decay": trial.weight_decay}
            for vector, lr in zip(self.vectors, self._lr, strict=True)
        ]

    @property
    def n_parameters(self) -> int:
        """The number of trained parameters."""
        return sum(vector.numel() for vector in self.vectors)

    def set_rate(self, factor: float) -> None:
        """Set the learning rates to the trial's own, times a factor."""
        for group, lr in zip(self.groups, self._lr, strict=True):
            group["lr"] = lr * factor

    def freeze(self) -> None:
        """Remove the gradients, so that an optimizer skips the vectors."""
        for vector, members in zip(self.vectors, self._members, strict=True):
            vector.grad = None
            for member in members:
                member.grad = None
                member.requires_grad_(False)

    def fill(self, vectors: Sequence[Tensor]) -> None:
        """Write values into the vectors."""
        for mine, value in zip(self.vectors, vectors, strict=True):
            mine.data.copy_(value)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Set A to NaN within the context."""
        kept = self.vectors[0].detach().clone()
        self.vectors[0].data.fill_(float("nan"))
        try:
            yield
        finally:
            self.vectors[0].data.copy_(kept)


def norms(flats: Sequence[Flat]) -> list[float]:
    """Return the norm of each trial's gradient. The host waits for the device once."""
    grads: Any = [vector.grad for flat in flats for vector in flat.vectors]
    each = torch.stack(torch._foreach_norm(grads)).view(len(flats), -1)
    return [float(norm) for norm in each.norm(dim=1).tolist()]


def clip(flats: Sequence[Flat], found: Sequence[float], most: Sequence[float | None]) -> None:
    """Scale the gradients whose norm is above its limit, as torch's `clip_grad_norm_` does."""
    factors = [
        1.0 if m is None else min(1.0, m / (n + 1e-6)) for n, m in zip(found, most, strict=True)
    ]
    pairs = [
        (v.grad, f) for flat, f in zip(flats, factors, strict=True) if f < 1.0 for v in flat.vectors
    ]
    if pairs:
        grads, each = zip(*pairs, strict=True)
        torch._foreach_mul_(grads, each)

"""Errors: how far outputs and gradients of each path are from the same layer in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Options, Result
from benchmarks.models import ALPHA, RANK, with_peft
from lora_inject import inject

OURS, FLOAT32 = "lora_inject", "lora_inject, compute: float32"
NAMES = ("y", "gradient of A", "gradient of B", "gradient of x")


def errors(options: Options) -> Result:
    """Compare y and the gradients of A, B and x with float64, for each path of the arithmetic."""
    result = Result()
    width, tokens = (64, 32) if options.quick else (768, 512)
    for case, dtype, autocast in (
        ("float32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("autocast over float32", torch.float32, True),
    ):
        for who in (OURS, FLOAT32, "PEFT"):
            found, wanted = _both(who, dtype, autocast, width, tokens)
            for name, a, b in zip(NAMES, found, wanted, strict=True):
                relative = float((a.double() - b).norm() / b.norm())
                result.add(case, who, f"{name}, relative error", relative)
    result.notes.append(
        f"One layer of width {width}, {tokens} tokens, rank {RANK}; W, x and the gradient of y are "
        "exact in the layer's dtype, A and B in float32. The norm of the error over the norm."
    )
    return result


def _both(
    who: str, dtype: torch.dtype, autocast: bool, width: int, tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and the gradients, and the same in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width, bias=False)).to(dtype)
    W = net[0].weight.detach()
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    low = torch.bfloat16 if autocast else dtype
    g = torch.randn(tokens, width).to(low)
    A, B = torch.randn(RANK, width) / width**0.5, torch.randn(width, RANK) * 0.1
    model: Any
    if who == "PEFT":
        model = with_peft(net, target_modules=["0"], fan_in_fan_out=False)
    else:
        compute = "float32" if who == FLOAT32 else "base"
        config = {"rank": RANK, "alpha": ALPHA, "targets": ["0"], "compute": compute}
        model = inject(net, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    a, b = (next(p for n, p in trained.items() if f"lora_{role}" in n) for role in "AB")
    with torch.no_grad():
        a.copy_(A)
        b.copy_(B)
    context: AbstractContextManager[Any] = (
        torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext()
    )
    with context:
        y = model(x)
    found = [y, *torch.autograd.grad(y, (a, b, x), g)]
    wide = [t.detach().double().requires_grad_() for t in (A, B, x)]
    y64 = wide[2] @ (W.double() + ALPHA / RANK * wide[1] @ wide[0]).T
    wanted = [y64, *torch.autograd.grad(y64, wide, g.double())]
    return [t.detach() for t in found], [t.detach() for t in wanted]

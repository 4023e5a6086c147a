"""torch.compile: the compiled step against the compiled floor, and what makes it compile again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import AGAIN, BARE, Options, Result, interleave
from benchmarks.models import ALPHA, LLAMA, RANK, randomise, with_peft
from lora_inject import activate, adapter_parameters, inject

OURS = "lora_inject"
# Target, over the textbook formula, compiled: what an autograd Function in the graph may cost.
COMPILED = 1.02


class _Block(nn.Module):
    """A Llama block in plain torch."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (
            p(n).view(*n.shape[:2], self.heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        n = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


class _Written(nn.Module):
    """The textbook formula around a frozen layer, for the compiler to fuse."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.plain = plain.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(RANK, plain.in_features) / plain.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(plain.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return self.plain(x) + ALPHA / RANK * F.linear(F.linear(x, A), B)


def _with_formula(model: nn.Sequential) -> nn.Sequential:
    model.requires_grad_(False)
    for block in model:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, _Written(child))
    return model


def _blocks(n: int, hidden: int, inner: int, heads: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block(hidden, inner, heads) for _ in range(n)))


def compiled(options: Options) -> Result:
    """Time compiled steps, and count recompilations."""
    result = Result()
    sizes = (1, 64, 176, 2) if options.quick else (3, 768, 2048, 12)
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        _steps(result, options, label, _blocks(*sizes).to(dtype), sizes[1])
        if options.quick:
            break
    _recompilations(result)
    result.notes.append(
        "Inductor makes as many kernels of a layer's step as of the formula: 3 forward and 8 "
        "backward in float32, where the formula has 4 and 7, and 5 and 7 in bfloat16, where it has "
        "6 and 7. The scale multiplies two thin gradients, in the formula one of the output's size."
    )
    return result


def _steps(result: Result, options: Options, label: str, base: nn.Sequential, hidden: int) -> None:
    config = {"rank": RANK, "alpha": ALPHA, "targets": [LLAMA]}
    x = torch.randn(4, 16 if options.quick else 128, hidden, dtype=base[0].q_proj.weight.dtype)
    x.requires_grad_()
    made = {
        "floor": copy.deepcopy(base).requires_grad_(False),
        AGAIN: copy.deepcopy(base).requires_grad_(False),
        OURS: inject(copy.deepcopy(base), config),
        BARE: _with_formula(copy.deepcopy(base)),
    }
    if not options.quick:
        made["PEFT"] = with_peft(
            copy.deepcopy(base), target_modules=f".*{LLAMA}", fan_in_fan_out=False
        )
    eager = {"floor, eager": made["floor"], f"{OURS}, eager": made[OURS]}
    runs = {
        name: _step(torch.compile(model, fullgraph=True), model, x) for name, model in made.items()
    }
    runs |= {name: _step(model, model, x) for name, model in eager.items()}
    times = interleave(runs, options.n_rounds(5), warm_up=2)
    case = f"{len(base)} blocks of width {hidden} {label}, compiled"
    result.ratios(case, times, "time / compiled floor")
    result.over_bare(case, times, {OURS: None if options.quick else COMPILED})
    ratio = [a / b for a, b in zip(times[f"{OURS}, eager"], times["floor, eager"], strict=True)]
    result.add(case, f"{OURS}, eager", "time / eager floor", ratio)
    torch.compiler.reset()


def _step(call: Any, model: nn.Module, x: Tensor) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    model.train()

    def step() -> None:
        call(x).float().square().mean().backward()
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _recompilations(result: Result) -> None:
    """Count how often a compiled model is compiled again as adapters change."""
    from torch._dynamo.testing import CompileCounter

    torch._logging.set_logs(dynamo=logging.ERROR)
    names = [f"a{i}" for i in range(12)]
    model = _blocks(1, 64, 176, 2)
    for name in names:
        inject(model, {"rank": RANK, "targets": [LLAMA]}, name)
        randomise(adapter_parameters(model, name).values())
    x = torch.randn(2, 16, 64)
    for training in (False, True):
        torch.compiler.reset()
        counter = CompileCounter()
        call = torch.compile(model, backend=counter, fullgraph=True)
        case = "12 adapters, " + ("with gradients" if training else "inference")
        activate(model, names[0])
        with torch.set_grad_enabled(training):
            call(x)
            first = counter.frame_count
            result.add(case, OURS, "graphs at first", float(first), 1.0)
            randomise(adapter_parameters(model, names[0]).values(), std=0.5)
            call(x)
            changed = counter.frame_count - first
            result.add(case, OURS, "recompilations as A and B change", float(changed), 0.0)
            counts = _switched(call, counter, model, names, x)
        for metric, count in counts.items():
            # What trains is a constant of a graph: when idle it gets no gradient, not even 0.
            allowed = float(training and metric.startswith("recompilations"))
            result.add(case, OURS, metric, float(count), allowed)
    torch.compiler.reset()
    torch._logging.set_logs()


def _switched(
    call: Any, counter: Any, model: nn.Module, names: list[str], x: Tensor
) -> dict[str, int]:
    """Switch through all adapters twice, and count what happens."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    before, refused, wrong = counter.frame_count, 0, 0
    for name in (*names, *names):
        activate(model, name)
        try:
            found, right = call(x), model(x)
            wrong += bool((found - right).norm() > 1e-5 * right.norm())
        except FailOnRecompileLimitHit:
            refused += 1
    return {
        "recompilations as 12 adapters switch": counter.frame_count - before,
        "of 24 switches, refused by torch": refused,
        "of 24 switches, outputs unlike eager": wrong,
    }

"""Stage `memory`: bytes and speed of a training step, full against LoRA (section 4.2).

Bytes are counted, not sampled: weights, gradients and optimizer state by their tensors,
activations by what autograd keeps, and the peak by torch's own allocations during a step. Speed is
timed in rounds that take all variants in turn.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks import measure
from data.pairs import target_log_probs
from torch import Tensor

import lora_inject

from .document import HOLDS, Claim, Section, n_bytes, table, verdict_above
from .lab import Lab, Result

VARIANTS: dict[str, tuple[str, int]] = {
    "full fine-tuning": ("", 0),
    "LoRA q, v, r = 4": (r"self_attn\.[qv]_proj", 4),
    "LoRA all linears, r = 8": (r"(self_attn|mlp)\.\w+_proj", 8),
}
PARTS = ("weights", "gradients", "optimizer", "activations")

# what `__main__.py` chooses: of one thread the processor's, which leaves out waiting for a core
CLOCK = {True: "processor time", False: "time by the clock"}


def do(lab: Lab) -> None:
    """Bytes and times of all variants, in one run."""
    settings = lab.settings("memory_tokens", "rounds")
    lab.run("memory/decoder", settings, lambda: compare(lab))


def compare(lab: Lab) -> Result:
    """Each variant's bytes, then the times of all in turn."""
    shape = lab.sizes.memory_tokens
    tokens = torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, : shape[1] * 3 // 4] = -100  # the prompt's share in the pairs, near enough
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, Any] = {}
    for title, (targets, rank) in VARIANTS.items():
        model, _ = lab.decoder()
        if rank:
            lora_inject.inject(model, {"rank": rank, "targets": [targets]})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        steps[title] = step_of(model, optimizer, tokens, labels)
        found[title] = bytes_of(model, optimizer, steps[title], tokens, labels)
        gc.collect()
    times = measure.interleave(steps, lab.sizes.rounds)
    for title, seconds in times.items():
        found[title]["seconds"] = seconds
    return {
        "variants": found,
        "tokens": tokens.numel(),
        "threads": torch.get_num_threads(),
        "clock": CLOCK[torch.get_num_threads() == 1],
    }


def step_of(
    model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor
) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        (-target_log_probs(model, tokens, labels).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_of(
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    tokens: Tensor,
    labels: Tensor,
) -> Result:
    """What a step needs, by kind."""
    step()  # the optimizer makes its state in the first
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for kept in optimizer.state.values() for t in kept.values()]
    weights = size(model.parameters())
    return {
        "weights": weights,
        "gradients": size(trained),
        "optimizer": size(t for t in state if isinstance(t, Tensor)),
        "activations": measure.saved_bytes(
            model, lambda: target_log_probs(model, tokens, labels).mean()
        ),
        "peak": weights
        + size(t for t in state if isinstance(t, Tensor))
        + measure.peak_bytes(step),
        "trained": sum(p.numel() for p in trained),
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.nbytes for t in tensors)


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    record = lab.record("memory/decoder")
    if record is None:
        return None
    variants, tokens = record["result"]["variants"], record["result"]["tokens"]
    full, small = (variants[name] for name in list(VARIANTS)[:2])
    rows = [
        (
            title,
            f"{v['trained']:,}",
            *(n_bytes(v[part]) for part in PARTS),
            n_bytes(v["peak"]),
            f"{tokens / statistics.median(v['seconds']):.0f}",
        )
        for title, v in variants.items()
    ]
    static = [sum(v[part] for part in PARTS[:3]) for v in (full, small)]
    speedups = [a / b for a, b in zip(full["seconds"], small["seconds"], strict=True)]
    middle = statistics.median(speedups)
    error = (max(speedups) - min(speedups)) / 2 / len(speedups) ** 0.5
    share = small["peak"] / full["peak"]
    claims = [
        Claim(
            "Training with Adam needs about a third of the memory",
            "1.2 TB to 350 GB: 0.29",
            f"{share:.2f} at the peak, {static[1] / static[0]:.2f} without activations",
            HOLDS if share < 0.4 else "**does not hold** at this batch",
        ),
        Claim(
            "Training is 25 % faster",
            "43.1 against 32.5 tokens/s on a GPU: 1.33",
            f"{middle:.2f} (rounds from {min(speedups):.2f} to {max(speedups):.2f})",
            verdict_above(middle, error, 1.25),
        ),
    ]
    shape = " x ".join(map(str, lab.sizes.memory_tokens))
    text = [
        (
            f"SmolLM2-135M in float32, batch {shape}, the loss on the last quarter; AdamW. Bytes "
            "of "
            "weights, gradients and optimizer state are those of their tensors. Activations are "
            "what autograd keeps for the backward. The peak is the most that torch has allocated "
            "during a step."
        ),
        table(("", "trained", *PARTS, "peak", "tokens/s"), rows),
    ]
    clock = record["result"].get("clock", CLOCK[False])
    note = f"{record['result']['threads']} thread(s), median of {len(speedups)} rounds; {clock}."
    return Section("Memory and speed of training (section 4.2)", claims, text, [note])

"""Stage `counting`: parameters, checkpoints and training memory of GPT-3 175B (sections 1, 4.2).

The model is built on the meta device, in GPT-2's layout with GPT-3's numbers, and planned
with the paper's configs; what remains is multiplication.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lora_inject

from .document import FAILS, HOLDS, PARTLY, Claim, Section, n_bytes, table
from .lab import Lab, Result

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ("qv_r1", "qv_r4", "qv_r8", "qkvo_r2")
LAYERS, DIM, HEADS = 96, 12288, 96
# bytes for each parameter, (weights, gradients, Adam's two moments and master weights)
LAYOUTS = {"all at 16 bits": (2, 2, 4), "16 bits, Adam at 32 bits": (2, 2, 12)}


def do(lab: Lab) -> None:
    """Plan all of the paper's configs."""
    lab.run("counting/gpt3", {"configs": NAMES}, count)


def count() -> Result:
    """Parameters of the model, and of the adapters by config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=LAYERS, n_embd=DIM, n_head=HEADS, n_positions=2048)
    with torch.device("meta"):
        model: Any = GPT2LMHeadModel(config)
    plans = {name: lora_inject.plan(model, CONFIGS / f"gpt3_175b_{name}.yaml") for name in NAMES}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "adapters": {name: plan.n_trainable for name, plan in plans.items()},
    }


def training_bytes(whole: int, trained: int, layout: tuple[int, int, int]) -> int:
    """Bytes of weights, gradients and optimizer state; activations are left out."""
    weights, gradients, state = layout
    return whole * weights + trained * (weights * (trained < whole) + gradients + state)


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What comes out."""
    record = lab.record("counting/gpt3")
    if record is None:
        return None
    whole, adapters = record["result"]["parameters"], record["result"]["adapters"]
    rows = [
        (name.replace("_", ", "), f"{n:,}", f"{whole / n:,.0f}", n_bytes(2 * n))
        for name, n in adapters.items()
    ]
    small = adapters["qv_r4"]
    memory = [
        (
            title,
            n_bytes(training_bytes(whole, whole, layout)),
            n_bytes(training_bytes(whole, small, layout)),
            f"{training_bytes(whole, whole, layout) / training_bytes(whole, small, layout):.1f}",
        )
        for title, layout in LAYOUTS.items()
    ]
    low, high = memory[0][1], memory[1][1]
    most, least = whole / adapters["qv_r1"], whole / adapters["qv_r8"]
    claims = [
        Claim(
            "10,000 times fewer parameters train; 0.01 % of GPT-3 175B",
            "4.7 M (q, v, r = 1) to 37.7 M (r = 8)",
            f"{adapters['qv_r1']:,} to {adapters['qv_r8']:,} of {whole:,}: "
            f"{most:,.0f} to {least:,.0f} times fewer",
            HOLDS if least < 10_000 < most else FAILS,
        ),
        Claim(
            "A checkpoint shrinks from 350 GB to 35 MB (q, v at r = 4, 16 bits)",
            "350 GB; 35 MB",
            f"{n_bytes(2 * whole)}; {n_bytes(2 * small)} ({2 * small / 2**20:.0f} MiB)",
            HOLDS if abs(small / 2**19 - 35) < 3.5 else FAILS,
        ),
        Claim(
            "Memory to train GPT-3 175B falls from 1.2 TB to 350 GB",
            "1.2 TB; 350 GB",
            f"{low} or {high}, by how Adam is kept; {memory[0][2]}; both without activations",
            PARTLY,
        ),
    ]
    text = [
        (
            f"GPT-3 in GPT-2's layout on the meta device: {whole:,} parameters, "
            f"{n_bytes(2 * whole)} at 16 bits."
        ),
        table(("config", "trainable", "times fewer", "bytes at 16 bits"), rows),
        "Weights, gradients and optimizer state, by count, without activations:",
        table(("layout", "full", "LoRA q, v r = 4", "ratio"), memory),
        (
            "Both are more than the paper's 1.2 TB, so the paper kept fewer bytes for each "
            "parameter. Its 350 GB are the frozen weights at 16 bits; that figure holds."
        ),
    ]
    return Section("Counting GPT-3 175B (sections 1, 4.2)", claims, text)

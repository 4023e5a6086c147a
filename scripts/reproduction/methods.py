"""The ways to fine-tune that are compared, and the training that they share.

A method leaves a model with exactly what trains requiring a gradient, a classifier's head aside.
Adapter layers, the paper's main rival, are written here: no kept library of them runs with
transformers 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import lora_inject as li

ALPHA = 16  # of RoBERTa in the paper's scripts; for every rank, as in the paper
WEIGHT_DECAY, WARM_UP = 0.01, 0.06
Q, K, V = (rf"attention\.self\.{name}" for name in ("query", "key", "value"))
O = r"attention\.output\.dense"  # noqa: E741 - the paper's name
UP, DOWN = r"intermediate\.dense", r"layer\.\d+\.output\.dense"
TARGETS = {
    "q": [Q], "k": [K], "v": [V], "o": [O], "qk": [Q, K], "qv": [Q, V],
    "qkvo": [Q, K, V, O], "all": [Q, K, V, O, UP, DOWN],
}  # fmt: skip
TITLES = {name: ", ".join(name) for name in TARGETS} | {"all": "all linears"}
RANKS = (1, 2, 4, 8, 64)
Batch = TypeVar("Batch")


class Method(NamedTuple):
    """How what trains is set up, the learning rates to try, and which method is tuned instead."""

    title: str
    apply: Callable[[Any], object]
    rates: tuple[float, ...]
    like: str = ""


def train(
    groups: Any, batches: Sequence[Batch], loss: Callable[[Batch], Tensor], rate: float = 0.0
) -> None:
    """One pass of AdamW over batches, with the paper's schedule: up, then down to nothing."""
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    up = max(1, round(len(batches) * WARM_UP))

    def factor(step: int) -> float:
        return min((step + 1) / up, (len(batches) - step) / (len(batches) - up + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in batches:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def top_two(model: Any, layers: Any) -> None:
    """The last two layers."""
    model.requires_grad_(False)
    layers[-2:].requires_grad_(True)


def prefix(model: Any, body: str, n_tokens: int) -> None:
    """Trained keys and values in front of every layer's own, by PEFT."""
    from peft import PrefixTuningConfig, get_peft_model

    # PEFT hands over the prefix by a name that transformers is about to change
    warnings.filterwarnings("ignore", category=FutureWarning)
    model.requires_grad_(False)
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=n_tokens)
    setattr(model, body, get_peft_model(getattr(model, body), config))


def lora(model: Any, sites: str, rank: int, also: Sequence[str] = ()) -> None:
    """LoRA of one rank on the matrices that `sites` names."""
    config = {"rank": rank, "alpha": ALPHA, "targets": TARGETS[sites]}
    li.inject(model, {**config, "train": [r"head\..*", *also]})


def prefix_and_lora(model: Any) -> None:
    """Both at once: LoRA on the model that PEFT has wrapped, the prefix among what trains."""
    prefix(model, "encoder", 16)
    lora(model, "qv", 8, [r"prompt_encoder\..*"])


def attach(model: nn.Module, names: Sequence[str], dim: int, width: int, *, normed: bool) -> None:
    """Put an adapter layer, `x + U f(D x + d) + u`, behind each named one, and freeze all else."""
    model.requires_grad_(False)
    for name in names:
        down, up = nn.Linear(dim, width), nn.Linear(width, dim)
        for start in up.parameters():
            nn.init.zeros_(start)
        layer: Any = model.get_submodule(name)
        layer.behind = nn.Sequential(*[nn.LayerNorm(dim)] * normed, down, nn.GELU(), up)
        layer.register_forward_hook(lambda layer, _, x: x + layer.behind(x))


def adapter_layers(model: Any, width: int, parts: Sequence[str], *, normed: bool) -> None:
    """H (Houlsby 2019): after attention and MLP, LayerNorms train; L (Lin 2020): after the MLP."""
    config = model.encoder.config
    layers = range(config.num_hidden_layers)
    names = [f"encoder.layer.{i}.{part}.dense" for i in layers for part in parts]
    norms = [m for m in model.encoder.encoder.modules() if isinstance(m, nn.LayerNorm)]
    attach(model.encoder, names, config.hidden_size, width, normed=normed)
    for norm in norms if not normed else ():
        norm.requires_grad_(True)


H = partial(adapter_layers, width=8, parts=("attention.output", "output"), normed=False)
L = partial(adapter_layers, width=16, parts=("output",), normed=True)
BITFIT = {"targets": [], "bias": "all", "train": [r"head\..*"]}  # a config without sites
PREFIX = partial(prefix, body="encoder", n_tokens=16)
RATES, LORA_RATES = (1e-3, 3e-3, 1e-2), (2e-3, 5e-3, 1.2e-2)


def _lora(sites: str, rank: int) -> Method:
    """LoRA with the rate of the nearest that is tuned: q and v or all linears, r = 1, 8 or 64."""
    near = 64 if rank == 64 else 1 if rank < 4 and sites != "all" else 8
    like = f"lora-{'all' if sites == 'all' else 'qv'}-r{near}"
    rates = (1e-3, *LORA_RATES) if near == 1 else LORA_RATES
    title = f"LoRA {TITLES[sites]}, r = {rank}"
    return Method(title, partial(lora, sites=sites, rank=rank), rates, like)


METHODS = {
    "head": Method("head only", lambda m: m.requires_grad_(False), (3e-3, 1e-2, 3e-2)),
    "full": Method("full fine-tuning", lambda m: m.requires_grad_(True), (1e-4, 2e-4, 4e-4)),
    "top2": Method(
        "top two layers", lambda m: top_two(m, m.encoder.encoder.layer), (1e-4, 3e-4, 1e-3)
    ),
    "bitfit": Method("BitFit: all biases", lambda m: li.inject(m, BITFIT), RATES),
    "adapter-h": Method("Adapter-H, width 8", H, RATES),
    "adapter-l": Method("Adapter-L, width 16", L, (*RATES, 3e-2)),
    "prefix": Method("prefix tuning, 16 tokens (PEFT)", PREFIX, (3e-3, 1e-2, 3e-2, 1e-1)),
    "both": Method("LoRA q, v, r = 8, and prefix tuning", prefix_and_lora, LORA_RATES),
    **{f"lora-{sites}-r{rank}": _lora(sites, rank) for sites in TARGETS for rank in RANKS},
}

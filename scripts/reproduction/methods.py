"""The ways to fine-tune that are compared: what trains in each, besides the head.

A method leaves a classifier with exactly what trains requiring a gradient. Adapter layers, the
paper's main rival, are written here: no kept library of them runs with transformers 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

import lora_inject

ALPHA = 16  # of RoBERTa in the paper's scripts; for every rank, as in the paper
Q, K, V = (rf"attention\.self\.{name}" for name in ("query", "key", "value"))
O = r"attention\.output\.dense"  # noqa: E741 - the paper's name
UP, DOWN = r"intermediate\.dense", r"layer\.\d+\.output\.dense"
TARGETS = {
    "q": [Q], "k": [K], "v": [V], "o": [O], "qk": [Q, K], "qv": [Q, V],
    "qkvo": [Q, K, V, O], "all": [Q, K, V, O, UP, DOWN],
}  # fmt: skip
TITLES = {"qk": "q, k", "qv": "q, v", "qkvo": "q, k, v, o", "all": "all linears"}
RANKS = (1, 2, 4, 8, 64)


class Method(NamedTuple):
    """One way to fine-tune.

    Attributes:
        name: As in the names of records.
        title: As in tables.
        apply: Sets up what trains on a classifier.
        like: Name of the method whose learning rate it takes; its own name where it is tuned.
        rates: Learning rates to try, where it is tuned.
    """

    name: str
    title: str
    apply: Callable[[Any], object]
    like: str
    rates: tuple[float, ...] = ()


def top_two(model: Any) -> None:
    """The last two layers."""
    model.requires_grad_(False)
    model.encoder.encoder.layer[-2:].requires_grad_(True)


def bitfit(model: Any) -> None:
    """Every bias, by a config without sites."""
    lora_inject.inject(model, {"targets": [], "bias": "all", "train": [r"head\..*"]})


def lora(model: Any, sites: str, rank: int, also: Sequence[str] = ()) -> None:
    """LoRA of one rank on the matrices that `sites` names."""
    train = [r"head\..*", *also]
    config = {"rank": rank, "alpha": ALPHA, "targets": TARGETS[sites], "train": train}
    lora_inject.inject(model, config)


def prefix(model: Any, n_tokens: int) -> None:
    """Trained keys and values in front of every layer's own, by PEFT."""
    from peft import PrefixTuningConfig, get_peft_model

    # PEFT hands over the prefix by a name that transformers is about to change
    warnings.filterwarnings("ignore", category=FutureWarning)
    model.requires_grad_(False)
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=n_tokens)
    model.encoder = get_peft_model(model.encoder, config)


def prefix_and_lora(model: Any) -> None:
    """Both at once: LoRA on the model that PEFT has wrapped, the prefix among what trains."""
    prefix(model, 16)
    lora(model, "qv", 8, [r"prompt_encoder\..*"])


class Bottleneck(nn.Module):
    """An adapter layer, `x + U f(D x + d) + u` with U and u zero at the start."""

    def __init__(self, dim: int, width: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(self.norm(x))))


def attach(model: nn.Module, names: Sequence[str], dim: int, width: int, *, normed: bool) -> None:
    """Put an adapter layer behind each named layer, and freeze all else."""
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = Bottleneck(dim, width, normed=normed)
        setattr(owner, last, nn.Sequential(getattr(owner, last), layer))


def adapter_layers(model: Any, width: int, parts: Sequence[str], *, normed: bool) -> None:
    """H (Houlsby 2019): after attention and MLP, LayerNorms train; L (Lin 2020): after the MLP."""
    config = model.encoder.config
    layers = range(config.num_hidden_layers)
    names = [f"encoder.layer.{i}.{part}.dense" for i in layers for part in parts]
    norms = [m for m in model.encoder.encoder.modules() if isinstance(m, nn.LayerNorm)]
    attach(model.encoder, names, config.hidden_size, width, normed=normed)
    for norm in norms if not normed else ():
        norm.requires_grad_(True)


def _lora(sites: str, rank: int, like: str = "", rates: tuple[float, ...] = ()) -> Method:
    name, title = f"lora-{sites}-r{rank}", f"LoRA {TITLES.get(sites, sites)}, r = {rank}"
    return Method(name, title, partial(lora, sites=sites, rank=rank), like or name, rates)


def _like(sites: str, rank: int) -> str:
    """The tuned method that is nearest to these sites and this rank."""
    if sites == "all":
        return "lora-all-r8" if rank < 64 else "lora-all-r64"
    return "lora-qv-r1" if rank < 4 else "lora-qv-r8" if rank < 64 else "lora-qv-r64"


def _tuned(name: str, title: str, apply: Callable[[Any], object], *rates: float) -> Method:
    return Method(name, title, apply, name, rates)


LORA_RATES = (2e-3, 5e-3, 1.2e-2)
H = partial(adapter_layers, width=8, parts=("attention.output", "output"), normed=False)
L = partial(adapter_layers, width=16, parts=("output",), normed=True)
TUNED = (
    _tuned("head", "head only", lambda model: model.requires_grad_(False), 3e-3, 1e-2, 3e-2),
    _tuned("full", "full fine-tuning", lambda m: m.requires_grad_(True), 1e-4, 2e-4, 4e-4),
    _lora("qv", 8, rates=LORA_RATES),
    _lora("qv", 1, rates=(1e-3, *LORA_RATES)),
    _tuned("bitfit", "BitFit: all biases", bitfit, 1e-3, 3e-3, 1e-2),
    _lora("qv", 64, rates=LORA_RATES),
    _tuned("top2", "top two layers", top_two, 1e-4, 3e-4, 1e-3),
    _tuned("adapter-h", "Adapter-H, width 8", H, 1e-3, 3e-3, 1e-2),
    _tuned("adapter-l", "Adapter-L, width 16", L, 1e-3, 3e-3, 1e-2, 3e-2),
    _tuned(
        *("prefix", "prefix tuning, 16 tokens (PEFT)", partial(prefix, n_tokens=16)),
        *(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    _lora("all", 8, rates=LORA_RATES),
    _lora("all", 64, rates=LORA_RATES),
    _tuned("both", "LoRA q, v, r = 8, and prefix tuning", prefix_and_lora, *LORA_RATES),
)
METHODS = {f"lora-{s}-r{r}": _lora(s, r, _like(s, r)) for s in TARGETS for r in RANKS}
METHODS |= {method.name: method for method in TUNED}

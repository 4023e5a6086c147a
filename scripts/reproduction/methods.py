"""The ways to fine-tune that are compared, as a table: what trains in each.

A method is a function that takes a classifier with everything frozen or not, and leaves
it with exactly what trains requiring a gradient. The head trains in all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

import lora_inject

from . import adapter_layers

ALPHA = 16  # of RoBERTa in the paper's scripts; for every rank, as in the paper
Q, K, V = (rf"attention\.self\.{name}" for name in ("query", "key", "value"))
O = r"attention\.output\.dense"  # noqa: E741 - the paper's name
UP, DOWN = r"intermediate\.dense", r"layer\.\d+\.output\.dense"
TARGETS = {
    "q": [Q],
    "k": [K],
    "v": [V],
    "o": [O],
    "qk": [Q, K],
    "qv": [Q, V],
    "qkvo": [Q, K, V, O],
    "all": [Q, K, V, O, UP, DOWN],
}
SITES_NAMED = {
    "qk": "q, k",
    "qv": "q, v",
    "qkvo": "q, k, v, o",
    "all": "all linears",
}
RANKS = (1, 2, 4, 8, 64)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: As in the names of records.
        title: As in tables.
        apply: Sets up what trains on a classifier (`classifier.Classifier`).
        like: Name of the method whose learning rate it takes; its own name where it is tuned.
        rates: Learning rates to try, where it is tuned.
    """

    name: str
    title: str
    apply: Callable[[nn.Module], None]
    like: str
    rates: tuple[float, ...] = ()


def full(model: nn.Module) -> None:
    """Everything trains, embeddings included."""
    model.requires_grad_(True)


def top_two(model: nn.Module) -> None:
    """The last two layers."""
    model.requires_grad_(False)
    for layer in model.encoder.encoder.layer[-2:]:
        layer.requires_grad_(True)


def head_only(model: nn.Module) -> None:
    """Nothing but the head."""
    model.requires_grad_(False)


def bitfit(model: nn.Module) -> None:
    """Every bias, by a config without sites."""
    lora_inject.inject(model, {"targets": [], "bias": "all", "train": [r"head\..*"]})


def lora(sites: str, rank: int) -> Callable[[nn.Module], None]:
    """LoRA of one rank on the matrices that `sites` names."""

    def apply(model: nn.Module) -> None:
        config = {"rank": rank, "alpha": ALPHA, "targets": TARGETS[sites], "train": [r"head\..*"]}
        lora_inject.inject(model, config)

    return apply


def houlsby(width: int) -> Callable[[nn.Module], None]:
    """Adapter layers after attention and after the MLP; the layers' LayerNorms train."""

    def apply(model: nn.Module) -> None:
        layers = range(model.encoder.config.num_hidden_layers)
        names = [f"encoder.layer.{i}.{part}.dense" for i in layers for part in PARTS]
        dim = model.encoder.config.hidden_size
        adapter_layers.attach(model.encoder, names, dim, width, normed=False)
        for norm in _layer_norms(model.encoder.encoder):
            norm.requires_grad_(True)

    return apply


PARTS = ("attention.output", "output")


def lin(width: int) -> Callable[[nn.Module], None]:
    """Adapter layers after the MLP only, each with a LayerNorm."""

    def apply(model: nn.Module) -> None:
        layers = range(model.encoder.config.num_hidden_layers)
        names = [f"encoder.layer.{i}.output.dense" for i in layers]
        dim = model.encoder.config.hidden_size
        adapter_layers.attach(model.encoder, names, dim, width, normed=True)

    return apply


def prefix(n_tokens: int) -> Callable[[nn.Module], None]:
    """Trained keys and values in front of every layer's own, by PEFT."""

    def apply(model: nn.Module) -> None:
        from peft import PrefixTuningConfig, get_peft_model

        # PEFT hands over the prefix by a name that transformers is about to change
        warnings.filterwarnings("ignore", category=FutureWarning)
        model.requires_grad_(False)
        config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=n_tokens)
        model.encoder = get_peft_model(model.encoder, config)

    return apply


def prefix_and_lora(n_tokens: int, sites: str, rank: int) -> Callable[[nn.Module], None]:
    """Both at once: LoRA on the model that PEFT has wrapped, the prefix among what trains."""

    def apply(model: nn.Module) -> None:
        prefix(n_tokens)(model)
        config = {"rank": rank, "alpha": ALPHA, "targets": TARGETS[sites]}
        config["train"] = [r"head\..*", r"prompt_encoder\..*"]
        lora_inject.inject(model, config)

    return apply


def _layer_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.LayerNorm))


def _lora(sites: str, rank: int, like: str = "", rates: tuple[float, ...] = ()) -> Method:
    name = f"lora-{sites}-r{rank}"
    return Method(
        name,
        f"LoRA {SITES_NAMED.get(sites, sites)}, r = {rank}",
        lora(sites, rank),
        like or name,
        rates,
    )


def _like(sites: str, rank: int) -> str:
    """The tuned method that is nearest to these sites and this rank."""
    if sites == "all":
        return "lora-all-r8" if rank < 64 else "lora-all-r64"
    return "lora-qv-r1" if rank < 4 else "lora-qv-r8" if rank < 64 else "lora-qv-r64"


LORA_RATES = (2e-3, 5e-3, 1.2e-2)
TUNED = (
    Method("head", "head only", head_only, "head", (3e-3, 1e-2, 3e-2)),
    Method("full", "full fine-tuning", full, "full", (1e-4, 2e-4, 4e-4)),
    _lora("qv", 8, rates=LORA_RATES),
    _lora("qv", 1, rates=(1e-3, *LORA_RATES)),
    Method("bitfit", "BitFit: all biases", bitfit, "bitfit", (1e-3, 3e-3, 1e-2)),
    _lora("qv", 64, rates=LORA_RATES),
    Method("top2", "top two layers", top_two, "top2", (1e-4, 3e-4, 1e-3)),
    Method("adapter-h", "Adapter-H, width 8", houlsby(8), "adapter-h", (1e-3, 3e-3, 1e-2)),
    Method("adapter-l", "Adapter-L, width 16", lin(16), "adapter-l", (1e-3, 3e-3, 1e-2, 3e-2)),
    Method(
        "prefix", "prefix tuning, 16 tokens (PEFT)", prefix(16), "prefix", (3e-3, 1e-2, 3e-2, 1e-1)
    ),
    _lora("all", 8, rates=LORA_RATES),
    _lora("all", 64, rates=LORA_RATES),
    Method(
        "lora-qv-r8-prefix",
        "LoRA q, v, r = 8, and prefix tuning",
        prefix_and_lora(16, "qv", 8),
        "lora-qv-r8-prefix",
        LORA_RATES,
    ),
)
METHODS = {method.name: method for method in TUNED} | {
    f"lora-{sites}-r{rank}": _lora(sites, rank, _like(sites, rank))
    for sites in TARGETS
    for rank in RANKS
    if f"lora-{sites}-r{rank}" not in {method.name for method in TUNED}
}

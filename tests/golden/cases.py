"""What the golden files are of: models, configs, and the dense reference of each in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contract.kinds import conv1d
from helpers.experts import experts
from helpers.models import Tied, TiedDecoder, tiny_llama
from helpers.reference import config
from torch import Tensor, nn

FILES = Path(__file__).parent / "files"
FORMATS = {"native": "adapter.safetensors", "peft": "peft"}
"""Format to the name of what it writes, in the folder of a case."""

# PEFT scales no embedding after its update, dilates no A, shares no rank among groups, and adapts
# no transposed convolutions.
NOT_IN_PEFT = {
    "scaled embedding", "conv 1d", "conv 2d", "conv_transpose 1d", "conv_transpose 2d",
}  # fmt: skip


class Net(nn.Module):
    """An embedding, two layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.fc = nn.Linear(5, 6)
        self.c = conv1d(4, 6)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.c(torch.tanh(self.fc(self.embed(ids))))))


ALL = ["embed", "fc", "c", "head"]
IDS = (torch.arange(14).view(2, 7) % 7,)
PIXELS = (torch.linspace(-1, 1, 60).view(1, 3, 5, 4),)
STACKS = {"match": "all-experts"}


def mixtral() -> nn.Module:
    return experts("mixtral")[0]


def gpt_oss() -> nn.Module:
    return experts("gpt_oss")[0]


def image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, (3, 2)))


@dataclass(frozen=True)
class Case:
    """An adapter on a model.

    Attributes:
        config: Of the adapter; None where only PEFT's own config says it.
        model: Makes the model.
        inputs: Of its forward.
        scale: By which each site's `B A` is multiplied, computed by hand.
        formats: Those that can hold it.
        only: The experts that have a pair of factors, in the file's order.
        spelled_out: Whether PEFT's folder holds factors that the native file holds once or not.
        transposed: Sites whose weight is `(in, out)`.
        dtype: Of the model.
        tolerance: Of its outputs, relative to the largest.
    """

    config: Mapping[str, Any] | None
    model: Callable[[], nn.Module] = Net
    inputs: Sequence[Tensor] = IDS
    scale: float = 1.5
    formats: Sequence[str] = tuple(FORMATS)
    only: Sequence[int] | None = None
    spelled_out: bool = False
    transposed: Set[str] = frozenset(("embed", "c"))
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


OF_EXPERTS: dict[str, Any] = {"model": mixtral}
OF_PART: dict[str, Any] = {"model": mixtral, "spelled_out": True}
OF_GPT_OSS: dict[str, Any] = {
    "model": gpt_oss,
    "transposed": {f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down")},
}
CASES: dict[str, Case] = {
    "plain": Case(config(*ALL)),
    "rslora": Case(config(*ALL, scaling="rslora"), scale=3 / 2**0.5),
    "dora": Case(config(*ALL, variant="dora")),
    "a convolution": Case(config("0"), image, PIXELS),
    "dora of a convolution": Case(config("0", variant="dora"), image, PIXELS),
    "pissa": Case(config("fc", "c", "head", init="pissa")),
    "olora": Case(config("fc", "c", "head", init="olora")),
    "all biases": Case(config("fc", bias="all")),
    "biases of adapted layers": Case(config("fc", "head", bias="adapted")),
    "lora_bias": Case(None),
    "token rows": Case(config("fc", tokens={"embed": [1, 5]})),
    "trained copies": Case(config("fc", train=["norm", "head"])),
    "a trained copy of a tied table": Case(config("fc", train=["embed"]), TiedDecoder),
    "an adapter of a tied head": Case(config("head"), Tied),
    "a base in bfloat16": Case(config(*ALL), dtype=torch.bfloat16, tolerance=0.05),
    "float32 over bfloat16": Case(
        config(*ALL, compute="float32"), dtype=torch.bfloat16, tolerance=0.05
    ),
    "all experts": Case(config(STACKS), **OF_EXPERTS),
    "all experts, transposed": Case(config(STACKS), **OF_GPT_OSS),
    "chosen experts": Case(config(STACKS | {"only": [2, 0]}), only=(0, 2), **OF_PART),
    "a shared A": Case(config(STACKS | {"share": "A"}), **OF_PART),
    "a shared B": Case(config(STACKS | {"share": "B"}), **OF_PART),
    "attention and experts": Case(config("all-linear", STACKS), **OF_EXPERTS),
}


def archive(*names: str) -> Path:
    """The archive that holds the files of a case."""
    path = FILES.joinpath(*(name.replace(" ", "_").replace(",", "") for name in names))
    return path.with_name(f"{path.name}.zip")


def output_of(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    out = model(*inputs)
    return (out if isinstance(out, Tensor) else out.logits).detach()


def dense_output(case: Case, plain: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The plain model in float64 with what the tensors of a native file mean, by the textbook."""
    state = {k: t.double() for k, t in plain.state_dict().items() if t.is_floating_point()}
    for key, tensor in tensors.items():
        if key.startswith("trained/"):
            name = key.removeprefix("trained/")
            if tensor.shape == state[name].shape:
                state[name] = tensor.double()
            else:
                (rows,) = case.config["tokens"].values()
                state[name][rows] = tensor.double()
    sites = {key.removeprefix("A/") for key in tensors if key.startswith("A/")}
    for site in sites:
        of = {k.partition("/")[0]: t.double() for k, t in tensors.items() if k.endswith(f"/{site}")}
        weight = site if site in state else f"{site}.weight"
        delta = of["B"] @ of["A"] - (of["B0"] @ of["A0"] if "A0" in of else 0)
        turned = delta.mT if site in case.transposed else delta
        W = state[weight].clone()
        which = slice(None) if case.only is None else list(case.only)
        W[which] += case.scale * turned.reshape(W[which].shape)
        if "m" in of:
            rows = W.T if site in case.transposed else W
            norm = rows.flatten(1).norm(dim=1)
            gained = rows * (of["m"].flatten() / norm).view(-1, *[1] * (rows.dim() - 1))
            W = gained.T if site in case.transposed else gained
        if "b" in of:
            bias = f"{site}.bias"
            state[bias] = state[bias] + case.scale * of["b"]
        state[weight] = W
    wide = case.model().double().eval()
    # A tied weight is one that another name reads as well: `functional_call` gives it its own.
    with torch.no_grad():
        inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
        out = torch.func.functional_call(wide, state, inputs, tie_weights=False)
    return out if isinstance(out, Tensor) else out.logits


# A live model's state dict -----------------------------------------------------------------------

STATE_CONFIGS: dict[str, Any] = {
    "first": config(
        {"match": "fc", "slices": {"q": 3, "k": 1, "v": 2}, "adapt": ["q", "v"]},
        tokens={"embed": [1, 5]},
    ),
    "second": config("fc", "c", "head", variant="dora", train=["norm"]),
}


# Trials ------------------------------------------------------------------------------------------


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()


TRIALS = {
    "one": {"config": {"rank": 1, "targets": ["0"]}, "lr": 1e-2},
    "two": {"config": {"rank": 2, "targets": ["all-linear"], "dropout": 0.2}, "lr": 1e-3},
}


def squared(out: Tensor, batch: Tensor) -> Tensor:
    return (out - batch[:, :2] + batch[:, 2:]).square().mean()


# Proofs, a run of Trainer ------------------------------------------------------------------------

TRAINED = config("q_proj", "v_proj", train=[r"model\.norm"])


def small_llama(**sizes: int) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, **sizes}
    return tiny_llama(**sizes, initializer_range=0.3).eval()

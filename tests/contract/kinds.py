"""The table of kinds of layers, and the dense float64 layer that each must equal.

From what a `Kind` says, and from nothing of the package, `dense` forms `W + scale * B @ A` and
runs the plain layer with it, differentiably.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from conftest import fill
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li

RANK, ALPHA = 2, 3.0
SCALE = 1.5  # alpha / rank, by hand


class StockSubclass(nn.Linear):
    """A subclass that leaves `forward` alone, as attention's output projection is."""


class OwnForward(nn.Linear):
    """A subclass with a forward of its own, which happens to be linear in W."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t() + self.bias).contiguous()


class ActivationInside(nn.Linear):
    """A subclass that is not linear in W."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's and Bart's embeddings do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


class Mix(nn.Module):
    """A raw matrix, read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.t()


class Experts(nn.Module):
    """Stacked experts, `(E, out, in)` as in Mixtral or `(E, in, out)` as in GPT-OSS."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.equation = equation
        self.up = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.up)


def conv1d(n_out: int, n_in: int) -> Conv1D:
    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@dataclass(frozen=True)
class Kind:
    """One kind of layer and what its weight means."""

    layer: Callable[[], nn.Module]
    sizes: tuple[int, int]  # `(in, out)` of the low-rank update
    shapes: Sequence[tuple[int, ...] | str] = (
        (4, 3, 5),
    )  # of its inputs, four rows; `ids`: below `in`
    weight: str = "weight"  # the adapted parameter in the layer
    site: str = "layer"  # its name in a `Host`
    rule: Mapping[str, Any] = field(default_factory=dict)  # besides the match
    spans: tuple[tuple[int, int], ...] = ()  # of each adapted slice along the output
    transposed: bool = False  # the weight is `(in, out)`
    experts: int | None = None  # length of a leading dimension
    update: str = "forward"  # or `weight`

    @property
    def config(self) -> dict[str, Any]:
        rule = {"match": self.site.replace(".", r"\."), **self.rule}
        return {"rank": RANK, "alpha": ALPHA, "targets": [rule]}

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ids = torch.randint(0, self.sizes[0], (4, 3))
        ids[0, :2] = torch.tensor([1, 0])  # 1 is the padding index of one kind
        return tuple(
            ids if shape == "ids" else torch.randn(shape).to(dtype) for shape in self.shapes
        )

    @property
    def key(self) -> str:
        return f"layer.{self.weight}"


def _slices(*adapt: str) -> dict[str, Any]:
    """Options of a kind with slices of 4, 2 and 3 outputs."""
    spans = {"q": (0, 4), "k": (4, 6), "v": (6, 9)}
    rule = {"slices": {"q": 4, "k": 2, "v": 3}, "adapt": list(adapt)}
    return {"rule": rule, "spans": tuple(span for name, span in spans.items() if name in adapt)}


EQUAL: dict[str, Any] = {"slices": ["q", "k", "v"], "adapt": ["q", "v"]}
THIRDS: dict[str, Any] = {"rule": EQUAL, "spans": ((0, 3), (6, 9))}
TABLE: dict[str, Any] = {"shapes": ["ids"], "transposed": True}
READ: dict[str, Any] = {"update": "weight"}
MATRIX: dict[str, Any] = {"weight": "matrix", "site": "layer.matrix", **READ}
STACK: dict[str, Any] = {
    "shapes": [(4, 5)], "weight": "up", "site": "layer.up", "experts": 3, **READ,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(5, 6), (5, 6)),
    "linear without bias": Kind(lambda: nn.Linear(5, 6, bias=False), (5, 6)),
    "stock subclass": Kind(lambda: StockSubclass(5, 6), (5, 6)),
    "own linear forward": Kind(lambda: OwnForward(5, 6), (5, 6), **READ),
    "activation inside": Kind(lambda: ActivationInside(5, 6), (5, 6), **READ),
    "conv1d": Kind(lambda: conv1d(6, 5), (5, 6), transposed=True),
    "embedding": Kind(lambda: nn.Embedding(7, 5), (7, 5), **TABLE),
    "embedding padding": Kind(lambda: nn.Embedding(7, 5, padding_idx=1), (7, 5), **TABLE),
    "scaled embedding": Kind(lambda: ScaledEmbedding(7, 5), (7, 5), **TABLE, **READ),
    "equal slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **THIRDS),
    "unequal slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("v", "q")),
    "one slice": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("k")),
    "all slices": Kind(lambda: nn.Linear(5, 9), (5, 9), **_slices("q", "k", "v")),
    "slices of own forward": Kind(lambda: OwnForward(5, 9), (5, 9), **THIRDS, **READ),
    "slices of activation inside": Kind(lambda: ActivationInside(5, 9), (5, 9), **THIRDS, **READ),
    "equal slices of conv1d": Kind(lambda: conv1d(9, 5), (5, 9), **THIRDS, transposed=True),
    "unequal slices of conv1d": Kind(
        lambda: conv1d(9, 5), (5, 9), **_slices("k", "v"), transposed=True
    ),
    "conv 1d": Kind(
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
        (12, 6), [(4, 4, 9)], **READ,
    ),
    "conv 2d": Kind(
        lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding="same", padding_mode="reflect"),
        (12, 6), [(4, 4, 6, 5)], **READ,
    ),
    "conv 3d": Kind(
        lambda: nn.Conv3d(2, 3, (1, 2, 3), bias=False), (12, 3), [(4, 2, 3, 4, 5)], **READ
    ),
    "conv_transpose 2d": Kind(
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, output_padding=1, groups=2),
        (4, 18), [(4, 4, 3, 3)], transposed=True, **READ,
    ),
    "conv_transpose 1d": Kind(
        lambda: nn.ConvTranspose1d(4, 3, 2), (4, 6), [(4, 4, 3)], transposed=True, **READ
    ),
    "parameter": Kind(Mix, (5, 6), **MATRIX),
    "turned parameter": Kind(Mix, (6, 5), rule={"layout": "in_out"}, transposed=True, **MATRIX),
    "slices of a parameter": Kind(Mix, (5, 6), rule=EQUAL, spans=((0, 2), (4, 6)), **MATRIX),
    "weight of a linear": Kind(lambda: nn.Linear(5, 6), (5, 6), site="layer.weight", **READ),
    "experts": Kind(
        lambda: Experts("bi,eoi->beo", 3, 6, 5), (5, 6), rule={"layout": "out_in"}, **STACK
    ),
    "turned experts": Kind(
        lambda: Experts("bi,eio->beo", 3, 5, 6),
        (5, 6), rule={"layout": "in_out"}, transposed=True, **STACK,
    ),
}  # fmt: skip


class Host(nn.Module):
    """A layer between siblings, so that names, keys, order and flags can be seen to stay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.layer = layer
        self.after = nn.LayerNorm(2)
        self.register_buffer("steps", torch.arange(3.0))
        self.before.weight.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


def host(kind: Kind, dtype: torch.dtype = torch.float32) -> Host:
    return Host(kind.layer()).to(dtype)


def injected(kind: Kind, dtype: torch.dtype = torch.float32, name: str = "default") -> Host:
    """A host with one adapter, none of whose tensors is zero."""
    return fill(li.inject(host(kind, dtype), kind.config, name), name)


def dense_delta(kind: Kind, A: Tensor, B: Tensor, scale: float = SCALE) -> Tensor:
    """`scale * B @ A` as a matrix `(E, out, in)` or its transpose, zero outside the slices."""
    n_in, n_out = kind.sizes
    spans = kind.spans or ((0, n_out),)
    A = A.reshape(kind.experts or 1, len(spans), RANK, n_in)
    B = B.reshape(kind.experts or 1, -1, RANK)
    delta, row = A.new_zeros(len(A), n_out, n_in), 0
    for part, (start, stop) in enumerate(spans):
        block = scale * torch.einsum("eor,eri->eoi", B[:, row : row + stop - start], A[:, part])
        delta = delta + F.pad(block, (0, 0, start, n_out - stop))
        row += stop - start
    return delta.transpose(1, 2) if kind.transposed else delta


def dense_weight(
    kind: Kind, W: Tensor, tensors: Mapping[str, Tensor], scale: float = SCALE
) -> Tensor:
    """What W becomes by an adapter with these tensors by role: `m / |V| V`, or V where m is not.

    V is `W + scale * (B @ A - B0 @ A0)`; the norm is over the inputs of each output, and detached.
    """
    total = W + dense_delta(kind, tensors["A"], tensors["B"], scale).reshape(W.shape)
    if "A0" in tensors:
        total = total - dense_delta(kind, tensors["A0"], tensors["B0"], scale).reshape(W.shape)
    if "m" not in tensors:
        return total
    matrix = total.reshape(dense_delta(kind, tensors["A"], tensors["B"]).shape)
    norms = matrix.detach().norm(dim=1 if kind.transposed else 2, keepdim=True)
    adapted = [i for a, b in kind.spans or ((0, kind.sizes[1]),) for i in range(a, b)]
    wanted = norms.flatten().index_copy(0, torch.tensor(adapted), tensors["m"])
    return (matrix * wanted.reshape(norms.shape) / norms).reshape(W.shape)


def twin(
    kind: Kind,
    plain: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    scale: float = SCALE,
    weight: float = 1.0,
    beside: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of the plain host in float64 with dense weights, and its base, as leaves.

    An adapter with these tensors takes part with `weight`, and a frozen copy of it with `beside`.
    """
    base = {key: p.detach().double().requires_grad_() for key, p in plain.named_parameters()}
    frozen = {role: t.detach() for role, t in tensors.items()}
    changed = dict(base)
    for each, part in ((tensors, weight), (frozen, beside)):
        W = base[kind.key]
        changed[kind.key] = changed[kind.key] + part * (dense_weight(kind, W, each, scale) - W)
        if "b" in each:
            changed["layer.bias"] = changed["layer.bias"] + part * scale * each["b"]
    return torch.func.functional_call(plain, changed, tuple(inputs)), base


def dense_output(
    kind: Kind, plain: nn.Module, A: Tensor, B: Tensor, inputs: Sequence[Tensor]
) -> Tensor:
    """The output of `twin` where an adapter is A and B; inputs are of any dtype."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return twin(kind, plain, {"A": A.double(), "B": B.double()}, wide)[0]

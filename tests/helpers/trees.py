"""Random trees of layers, each with its sites and what a site's A and B mean for its weight.

All branches map `(rows, LENGTH, WIDTH)` and ids of `(rows, LENGTH)` to the first's shape, treat the
rows alike, and have no state, so that any of them can follow any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, LENGTH, VOCABULARY, EXPERTS = 4, 3, 5, 2


def matrix(A: Tensor, B: Tensor) -> Tensor:
    return B @ A


def turned(A: Tensor, B: Tensor) -> Tensor:
    return (B @ A).t()


def first_and_last_third(A: Tensor, B: Tensor) -> Tensor:
    """Slices q and v of q, k, v: A is stacked over the two, B holds the rows of the two."""
    n, rank = len(B) // 2, B.shape[1]
    q, v = B[:n] @ A[:rank], B[n:] @ A[rank:]
    return torch.cat([q, torch.zeros_like(q), v])


def stack(A: Tensor, B: Tensor) -> Tensor:
    rank = B.shape[-1]
    return B.reshape(EXPERTS, -1, rank) @ A.reshape(EXPERTS, rank, -1)


@dataclass(frozen=True)
class SiteOf:
    """A site of a branch.

    Attributes:
        name: Its name in the branch.
        weight: Name of its weight in the branch.
        delta: `B @ A` as the weight lies, but for its shape.
        rule: What its rule says besides the match.
        routed: Whether it can have another adapter for each row.
        bias: Name of the layer's bias in the branch, to which a bias of B can be added.
    """

    name: str
    weight: str
    delta: Callable[[Tensor, Tensor], Tensor] = matrix
    rule: Mapping[str, Any] = field(default_factory=dict)
    routed: bool = True
    bias: str = ""

    def matrices(self, delta: Tensor) -> list[Tensor]:
        """Return the matrices of which each has a pair of its own in A and B."""
        if self.delta is stack:
            return list(delta)
        return [*delta.chunk(3)[::2]] if self.delta is first_and_last_third else [delta.flatten(1)]

    def gained(self, W: Tensor, m: Tensor) -> Tensor:
        """Return DoRA's weight `m W / |W|`, by the norm of each output, which has no gradient."""
        turn = self.delta is turned
        rows = W.t() if turn else W
        norms = rows.detach().flatten(1).norm(dim=1)
        n = len(m) // 2
        m = m if len(m) == len(norms) else torch.cat([m[:n], norms[n:-n], m[n:]])
        found = rows * (m / norms).view(-1, *[1] * (W.dim() - 1))
        return found.t() if turn else found


class Branch(nn.Module):
    sites: ClassVar[tuple[SiteOf, ...]] = ()
    copied: ClassVar[tuple[str, ...]] = ()  # names of tensors that `train` may name


class Plain(Branch):
    sites = (SiteOf("fc", "fc.weight", bias="fc.bias"),)
    copied = ("fc.bias",)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.fc(x)


class Read(Branch):
    """Computes with its child's weight, and calls the child as well."""

    sites = (SiteOf("fc", "fc.weight", routed=False, bias="fc.bias"),)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(x)), self.fc.weight, self.fc.bias)


class Fused(Branch):
    sites = (
        SiteOf(
            "qkv",
            "qkv.weight",
            first_and_last_third,
            {"slices": ["q", "k", "v"], "adapt": ["q", "v"]},
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class Transposed(Branch):
    sites = (SiteOf("c_fc", "c_fc.weight", turned, bias="c_fc.bias"),)

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.c_fc.weight, 0, 0.5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.c_fc(x)


class Tied(Branch):
    """An embedding and a head over one tensor."""

    sites = (SiteOf("emb", "emb.weight", turned), SiteOf("head", "head.weight"))
    copied = ("emb.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.emb.weight
        self.out = nn.Linear(VOCABULARY, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.head(x + self.emb(ids))))


class Convolved(Branch):
    sites = (SiteOf("conv", "conv.weight", bias="conv.bias"),)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Stacked(Branch):
    sites = (SiteOf("experts", "experts", stack, {"layout": "out_in"}, routed=False),)

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([F.linear(x, weight) for weight in self.experts]).amax(0)


class Raw(Branch):
    sites = (SiteOf("mix", "mix", turned, {"layout": "in_out"}, routed=False),)

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x @ self.mix


class Attention(Branch):
    """Its output projection is read and never called."""

    sites = (
        SiteOf("attn.in_proj_weight", "attn.in_proj_weight", routed=False),
        SiteOf("attn.out_proj", "attn.out_proj.weight", routed=False, bias="attn.out_proj.bias"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Norm(Branch):
    copied = ("norm.weight", "norm.bias")

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.norm(x)


BRANCHES: dict[str, type[Branch]] = {cls.__name__: cls for cls in Branch.__subclasses__()}


class Tower(nn.Module):
    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        for i, kind in enumerate(kinds):
            self.add_module(f"b{i}", BRANCHES[kind]())

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for branch in list(self._modules.values()):  # shared branches run under each name
            x = x + torch.tanh(branch(x, ids))
        return x


class Tree(nn.Module):
    """Two towers, each of which can be injected by itself."""

    def __init__(self, left: list[str], right: list[str]) -> None:
        super().__init__()
        self.left, self.right = Tower(left), Tower(right)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.right(self.left(x, ids), ids)


def share_branch(tree: Tree) -> None:
    """The last branch of the left tower is its first one again."""
    tree.left._modules[list(tree.left._modules)[-1]] = tree.left.b0


def tie_objects(tree: Tree) -> None:
    """The square Linear layers of the left tower have one Parameter."""
    first, *others = _square(tree.left) or [None]
    for layer in others:
        layer.weight = first.weight


def tie_memory(tree: Tree) -> None:
    """The square Linear layers of the left tower have Parameters over the same memory."""
    first, *others = _square(tree.left) or [None]
    for layer in others:
        layer.weight.data = first.weight.data


def _square(tower: Tower) -> list[Any]:
    layers = (m for m in tower.modules() if type(m) is nn.Linear)
    return [layer for layer in layers if layer.weight.shape == (WIDTH, WIDTH)]

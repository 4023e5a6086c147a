"""Random trees of layers, each with its sites and what a site's A and B mean for its weight.

All branches map `(rows, LENGTH, WIDTH)` and ids of `(rows, LENGTH)` to the first's shape, treat the
rows alike, and have no state, so that any of them can follow any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """A site of a branch."""

    name: str  # in the branch, as `weight` and `bias`
    weight: str
    delta: Callable[[Tensor, Tensor], Tensor] = matrix  # `B @ A` as the weight lies
    rule: Mapping[str, Any] = field(default_factory=dict)  # besides the match
    routed: bool = True  # it can have another adapter for each row
    bias: str = ""  # the layer's, to which a bias of B can be added

    def gained(self, W: Tensor, m: Tensor) -> Tensor:
        """Return DoRA's weight `m W / |W|`, by the norm of each output, which has no gradient."""
        turn = self.delta is turned
        rows = W.t() if turn else W
        norms = rows.detach().flatten(1).norm(dim=1)
        n = len(m) // 2
        m = m if len(m) == len(norms) else torch.cat([m[:n], norms[n:-n], m[n:]])
        scaled = rows * (m / norms).view(-1, *[1] * (W.dim() - 1))
        return scaled.t() if turn else scaled


@dataclass(frozen=True)
class Form:
    """One form of a branch."""

    parts: Callable[[], Mapping[str, nn.Module | nn.Parameter]]  # by name
    run: Callable[[Any, Tensor, Tensor], Tensor]  # of the branch, x and ids
    sites: tuple[SiteOf, ...] = ()
    copied: tuple[str, ...] = ()  # tensors that `train` may name


def _transposed() -> dict[str, nn.Module]:
    layer = Conv1D(WIDTH, WIDTH)
    nn.init.normal_(layer.weight, 0, 0.5)
    return {"c_fc": layer}


def _tied() -> dict[str, nn.Module]:
    """An embedding and a head over one tensor."""
    emb, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = emb.weight
    return {"emb": emb, "head": head, "out": nn.Linear(VOCABULARY, WIDTH)}


def _attend(branch: Any, x: Tensor, _: Tensor) -> Tensor:
    q, k, v = branch.qkv(x).chunk(3, dim=-1)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


QV = {"slices": ["q", "k", "v"], "adapt": ["q", "v"]}
OUT = SiteOf("attn.out_proj", "attn.out_proj.weight", routed=False, bias="attn.out_proj.bias")
FORMS: dict[str, Form] = {
    "Plain": Form(
        lambda: {"fc": nn.Linear(WIDTH, WIDTH)},
        lambda b, x, _: b.fc(x),
        (SiteOf("fc", "fc.weight", bias="fc.bias"),),
        ("fc.bias",),
    ),
    # Computes with its child's weight, and calls the child as well.
    "Read": Form(
        lambda: {"fc": nn.Linear(WIDTH, WIDTH)},
        lambda b, x, _: F.linear(torch.tanh(b.fc(x)), b.fc.weight, b.fc.bias),
        (SiteOf("fc", "fc.weight", routed=False, bias="fc.bias"),),
    ),
    "Fused": Form(
        lambda: {"qkv": nn.Linear(WIDTH, 3 * WIDTH)},
        _attend,
        (SiteOf("qkv", "qkv.weight", first_and_last_third, QV),),
    ),
    "Transposed": Form(
        _transposed,
        lambda b, x, _: b.c_fc(x),
        (SiteOf("c_fc", "c_fc.weight", turned, bias="c_fc.bias"),),
    ),
    "Tied": Form(
        _tied,
        lambda b, x, ids: b.out(torch.tanh(b.head(x + b.emb(ids)))),
        (SiteOf("emb", "emb.weight", turned), SiteOf("head", "head.weight")),
        ("emb.weight",),
    ),
    "Convolved": Form(
        lambda: {"conv": nn.Conv1d(WIDTH, WIDTH, 3, padding=1)},
        lambda b, x, _: b.conv(x.transpose(1, 2)).transpose(1, 2),
        (SiteOf("conv", "conv.weight", bias="conv.bias"),),
    ),
    "Stacked": Form(
        lambda: {"experts": nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))},
        lambda b, x, _: torch.stack([F.linear(x, weight) for weight in b.experts]).amax(0),
        (SiteOf("experts", "experts", stack, {"layout": "out_in"}, routed=False),),
    ),
    "Raw": Form(
        lambda: {"mix": nn.Parameter(torch.randn(WIDTH, WIDTH))},
        lambda b, x, _: x @ b.mix,
        (SiteOf("mix", "mix", turned, {"layout": "in_out"}, routed=False),),
    ),
    # Its output projection is read and never called.
    "Attention": Form(
        lambda: {"attn": nn.MultiheadAttention(WIDTH, 2, batch_first=True)},
        lambda b, x, _: b.attn(x, x, x, need_weights=False)[0],
        (SiteOf("attn.in_proj_weight", "attn.in_proj_weight", routed=False), OUT),
    ),
    "Norm": Form(
        lambda: {"norm": nn.LayerNorm(WIDTH)},
        lambda b, x, _: b.norm(x),
        copied=("norm.weight", "norm.bias"),
    ),
}


class Branch(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form_name = form
        for name, part in self.form.parts().items():
            setattr(self, name, part)

    @property
    def form(self) -> Form:
        return FORMS[self.form_name]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.form.run(self, x, ids)


class Tower(nn.Module):
    def __init__(self, forms: list[str]) -> None:
        super().__init__()
        for i, form in enumerate(forms):
            self.add_module(f"b{i}", Branch(form))

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

    def squares(self) -> list[nn.Linear]:
        """The square Linear layers of the left tower."""
        layers = [m for m in self.left.modules() if type(m) is nn.Linear]
        return [layer for layer in layers if layer.weight.shape == (WIDTH, WIDTH)]


def share_branch(tree: Tree) -> None:
    """The last branch of the left tower is its first one again."""
    tree.left._modules[list(tree.left._modules)[-1]] = tree.left.b0


def tie_objects(tree: Tree) -> None:
    for layer in tree.squares():
        layer.weight = tree.squares()[0].weight


def tie_memory(tree: Tree) -> None:
    for layer in tree.squares():
        layer.weight.data = tree.squares()[0].weight.data


TIES: dict[str, Callable[[Tree], None]] = {
    "no": lambda tree: None,
    "share": share_branch,
    "object": tie_objects,  # the square layers have one Parameter
    "memory": tie_memory,  # they have Parameters over the same memory
}

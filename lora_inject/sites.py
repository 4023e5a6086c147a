"""What a site is, in numbers: no torch, no model.

One idea: every kind of weight is a matrix (`matrix_shape`), and an adapter adds to it a few
low-rank blocks. A plain linear layer has one block; a fused projection has one for each adapted
slice; a bank of experts has one for each expert. All that merging, exporting and counting need to
know about a site is therefore a list of `Block`s, stated once, here.

What is not here: which names become sites (`matching`), and any tensor (`functional`, `state`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["Block", "SiteSpec", "Slices"]


@dataclass(frozen=True, slots=True)
class Slices:
    """The parts of a fused projection's output, and which of them are adapted.

    Attributes:
        sizes: `(name, width)` of each part along the output, in order; the widths sum to
            `out_features`.
        adapt: Names of the adapted parts, in the order of `sizes`.

    Example:
        >>> s = Slices((("q", 8), ("k", 4), ("v", 4)), ("q", "v"))
        >>> s.spans
        ((0, 8), (12, 16))
    """

    sizes: tuple[tuple[str, int], ...]
    adapt: tuple[str, ...]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """`(start, stop)` along the output of each adapted part."""
        spans, start = [], 0
        for name, width in self.sizes:
            if name in self.adapt:
                spans.append((start, start + width))
            start += width
        return tuple(spans)


@dataclass(frozen=True, slots=True)
class Block:
    """One low-rank block: `W[rows, cols] += scale * B[b] @ A[a]` (transposed if the site is).

    Attributes:
        rows: `(start, stop)` of rows of the weight matrix.
        cols: `(start, stop)` of its columns.
        a: `(start, stop)` of rows of A, flattened to two dimensions.
        b: `(start, stop)` of rows of B, flattened to two dimensions.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    a: tuple[int, int]
    b: tuple[int, int]


@dataclass(frozen=True)
class SiteSpec:
    """One site and its hyper-parameters, without tensors.

    Attributes:
        name: Canonical dotted name of the module, or of the parameter for a weight mount.
        kind: Name of the row in the table of layer kinds: `linear`, `conv1d`, `embedding`, ...,
            or `parameter` for a weight mount.
        in_features: Width of the input of A. For a convolution: channels per group times kernel.
        out_features: Width of the output of B.
        weight_shape: Shape of the weight tensor as the module holds it.
        transposed: True where the weight matrix is `(in, out)`: Conv1D, embeddings, some experts.
        experts: Length of a leading dimension of stacked matrices, or None.
        rank: r, the rank of each block.
        alpha: alpha of the paper.
        scaling: `standard` (alpha / rank) or `rslora` (alpha / sqrt(rank)).
        dropout: Probability of dropping an element of the input of A.
        init: How A and B start: a name of `config.Init`, or `("normal", std)`.
        compute: `base` or `float32`, the dtype of the low-rank arithmetic.
        slices: Parts of a fused projection, or None.
        rule: Index of the rule that matched, None for an adapter that came from a file.
        weight: Name of the adapted tensor in the state dict, `NAME.weight` for a module.
        mount: `forward` where the update is added to the layer's output, `weight` where the weight
            reads as `W + delta`.
        aliases: Other names of the same module or parameter.
        scale: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA (arXiv:2312.03732).
        spans: `(start, stop)` along the output of each adapted part; one for a plain site.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    rank: int
    alpha: float
    transposed: bool = False
    experts: int | None = None
    scaling: str = "standard"
    dropout: float = 0.0
    init: str | tuple[str, float] = "kaiming"
    compute: str = "base"
    slices: Slices | None = None
    rule: int | None = None
    weight: str = ""
    mount: str = "forward"
    aliases: tuple[str, ...] = field(default=(), compare=False)
    scale: float = field(init=False, repr=False, compare=False)
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute what every forward reads; torch.compile cannot trace a cached property."""
        divisor = math.sqrt(self.rank) if self.scaling == "rslora" else self.rank
        spans = self.slices.spans if self.slices else ((0, self.out_features),)
        object.__setattr__(self, "scale", self.alpha / divisor)
        object.__setattr__(self, "spans", spans)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of A: `(rank * parts, in)`, with a leading `experts` where there are any."""
        lead = () if self.experts is None else (self.experts,)
        return (*lead, self.rank * len(self.spans), self.in_features)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of B: `(adapted out, rank)`, with a leading `experts` where there are any."""
        lead = () if self.experts is None else (self.experts,)
        return (*lead, sum(stop - start for start, stop in self.spans), self.rank)

    @property
    def n_parameters(self) -> int:
        """Elements of A and B together."""
        return math.prod(self.a_shape) + math.prod(self.b_shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight seen as one matrix, in the weight's own memory order."""
        matrix = (self.out_features, self.in_features)
        rows, cols = matrix[::-1] if self.transposed else matrix
        return rows * (self.experts or 1), cols

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The low-rank blocks on the weight matrix.

        Example:
            >>> spec = SiteSpec("c_attn", "conv1d", 4, 6, (4, 6), rank=2, alpha=2, transposed=True,
            ...                 slices=Slices((("q", 2), ("k", 2), ("v", 2)), ("q", "v")))
            >>> [(b.rows, b.cols) for b in spec.blocks]
            [((0, 4), (0, 2)), ((0, 4), (4, 6))]
        """
        blocks = []
        n_in, n_out = self.in_features, self.out_features
        a_rows, b_rows = self.a_shape[-2], self.b_shape[-2]
        for expert in range(self.experts or 1):
            b_start = expert * b_rows
            for part, (start, stop) in enumerate(self.spans):
                a_start = expert * a_rows + part * self.rank
                a, b = (a_start, a_start + self.rank), (b_start, b_start + stop - start)
                if self.transposed:
                    rows, cols = (expert * n_in, (expert + 1) * n_in), (start, stop)
                else:
                    rows, cols = (expert * n_out + start, expert * n_out + stop), (0, n_in)
                blocks.append(Block(rows, cols, a, b))
                b_start = b[1]
        return tuple(blocks)

"""What a site is, in numbers: no torch, no model.

Every kind of weight is a matrix (`matrix_shape`), and an adapter adds to it a few
low-rank blocks. A plain linear layer has one block; a fused projection has one for each adapted
slice; a bank of experts has one for each expert. So merging, exporting and counting need only a
list of `Block`s, which is stated once, here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

from lora_inject.core.spec.names import joined
from lora_inject.core.spec.variants import VARIANTS

T = TypeVar("T")
InitName = Literal["kaiming", "gaussian", "pissa", "olora"]
"""How A may start, by name, in configs and in files."""
FROM_WEIGHT = ("pissa", "olora")
"""Inits that are derived from W: the site keeps a frozen copy A0, B0 of its start."""


class Geometry(NamedTuple):
    """Shapes of a weight as a matrix, stated by its layer and never read off packed weights.

    Attributes:
        in_features: Width of the input of A.
        out_features: Width of the output of B.
        weight_shape: Shape of the weight as the layer states it.
        transposed: Whether the weight matrix is `(in, out)`.
        experts: Length of a leading dimension of stacked matrices, or None.
    """

    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    transposed: bool = False
    experts: int | None = None


def signed_pairs(A: T, B: T, A0: T | None, B0: T | None) -> tuple[tuple[T, T, float], ...]:
    """Return `(A, B, sign)` of tensors or their names: the update, and its frozen start if any.

    The site computes `W + scale * sum of sign * B @ A`. A0 and B0 are the frozen start of pissa
    and olora, which has the sign -1.

    Examples:
        >>> signed_pairs("A", "B", "A0", "B0")
        (('A', 'B', 1.0), ('A0', 'B0', -1.0))
    """
    if A0 is None or B0 is None:
        return ((A, B, 1.0),)
    return (A, B, 1.0), (A0, B0, -1.0)


class AdaptedPart(NamedTuple):
    """One adapted part of an output, and which rows of A `(rank * parts, in)` and of B it has."""

    start: int
    stop: int
    a: slice
    b: slice


def adapted_parts(spans: Iterable[tuple[int, int]], rank: int) -> list[AdaptedPart]:
    """Return the parts that `(start, stop)` along the output stand for, in order.

    B has a row for each adapted output, A the rank of each part.

    Examples:
        >>> adapted_parts([(0, 2), (4, 7)], 8)[1]
        AdaptedPart(start=4, stop=7, a=slice(8, 16, None), b=slice(2, 5, None))
    """
    parts: list[AdaptedPart] = []
    row = 0
    for i, (start, stop) in enumerate(spans):
        width = stop - start
        ranks, rows = slice(i * rank, (i + 1) * rank), slice(row, row + width)
        parts.append(AdaptedPart(start, stop, ranks, rows))
        row += width
    return parts


@dataclass(frozen=True, slots=True)
class Slices:
    """The parts of a fused projection's output, and which of them are adapted.

    Examples:
        >>> s = Slices((("q", 8), ("k", 4), ("v", 4)), ("q", "v"))
        >>> s.spans
        ((0, 8), (12, 16))
    """

    # `(name, width)` of each part along the output, in order; the widths sum to `out_features`
    sizes: tuple[tuple[str, int], ...]
    adapt: tuple[str, ...]  # names of the adapted parts, in the order of `sizes`

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
    """One low-rank block: `W[rows, cols] += scale * B[b] @ A[a]` (transposed if the site is)."""

    rows: tuple[int, int]  # `(start, stop)` of rows of the weight matrix
    cols: tuple[int, int]  # `(start, stop)` of its columns
    a: tuple[int, int]  # `(start, stop)` of rows of A, flattened to two dimensions
    b: tuple[int, int]  # `(start, stop)` of rows of B, flattened to two dimensions


@dataclass(frozen=True)
class SiteSpec:
    """One site and its hyper-parameters, without tensors."""

    name: str  # canonical dotted name of the module, or of the parameter for a weight update
    kind: str  # row of the table of layer kinds: `linear`, `embedding`, ...; or `parameter`
    in_features: int  # width of the input of A; of a convolution channels per group times kernel
    out_features: int  # width of the output of B
    weight_shape: tuple[int, ...]  # shape of the weight tensor as the module holds it
    rank: int  # r, the rank of each block
    alpha: float
    transposed: bool = False  # whether the weight matrix is `(in, out)`: Conv1D, embeddings, ...
    experts: int | None = None  # length of a leading dimension of stacked matrices, or None
    scaling: str = "standard"  # `standard` (alpha / rank) or `rslora` (alpha / sqrt(rank))
    dropout: float = 0.0  # probability of dropping an element of the input of A
    init: str | tuple[str, float] = "kaiming"  # an `InitName`, or `("normal", std)`
    compute: str = "base"  # `base` or `float32`, the dtype of the low-rank arithmetic
    variant: str = "lora"  # how its tensors become an update of W: a row of `VARIANTS`
    lora_bias: bool = False  # whether B has a bias b: the layer's becomes `bias + scale * b`
    slices: Slices | None = None  # parts of a fused projection, or None
    rule: int | None = field(default=None, compare=False)  # index of the one that matched, in plans
    # name of the adapted tensor in the state dict; by default `NAME.weight`, a parameter's own name
    weight: str = ""
    # `forward`: the update is added to the layer's output; `weight`: the weight reads as W + delta
    update: str = "forward"
    only: tuple[int, ...] | None = None  # of a stack, the experts that are adapted; None for all
    share: str = ""  # `A` or `B`, of which all experts of a stack have one
    # other names of the same module or parameter
    aliases: tuple[str, ...] = field(default=(), compare=False)
    # alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)
    scale: float = field(init=False, repr=False, compare=False)
    # `(start, stop)` along the output of each adapted part; one for a plain site
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    # `(rank * parts, in)` and `(adapted out, rank)`, with a leading `experts` where there are any
    a_shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    b_shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # shape of each trainable tensor by its role: A, B and what the variant adds; sites that differ
    # only in their names have one such object (`at`)
    shapes: Mapping[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    n_parameters: int = field(init=False, repr=False, compare=False)  # elements of all of these

    def __post_init__(self) -> None:
        """Compute derived fields; torch.compile cannot trace a cached property."""
        divisor = math.sqrt(self.rank) if self.scaling == "rslora" else self.rank
        spans = self.slices.spans if self.slices else ((0, self.out_features),)
        stack = () if self.experts is None else (len(self.only or range(self.experts)),)
        a_stack, b_stack = ((1,) if self.share == role else stack for role in "AB")
        a_shape = (*a_stack, self.rank * len(spans), self.in_features)
        b_shape = (*b_stack, sum(stop - start for start, stop in spans), self.rank)
        scale = self.alpha / divisor
        further = VARIANTS[self.variant].roles.items()
        shapes = {"A": a_shape, "B": b_shape}
        shapes |= {role: shape(a_shape, b_shape) for role, shape in further}
        shapes |= {"b": b_shape[:-1]} if self.lora_bias else {}
        own = self.name if self.kind == "parameter" else joined(self.name, "weight")
        self.__dict__.update(
            weight=self.weight or own,
            scale=scale,
            spans=spans,
            a_shape=a_shape,
            b_shape=b_shape,
            shapes=shapes,
            n_parameters=sum(map(math.prod, shapes.values())),
        )

    def at(self, name: str, weight: str, aliases: tuple[str, ...] = ()) -> SiteSpec:
        """Return the same site under another name, at a fraction of the cost of a new one.

        Models have thousands of sites that differ only in their names.

        Examples:
            >>> q = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), rank=2, alpha=2)
            >>> k = q.at("h.0.k", "h.0.k.weight")
            >>> k.name, k.a_shape == q.a_shape
            ('h.0.k', True)
        """
        made = object.__new__(SiteSpec)
        values = self.__dict__.copy()  # `update` with all of them takes twice as long
        values["name"], values["weight"], values["aliases"] = name, weight, aliases
        object.__setattr__(made, "__dict__", values)
        return made

    def shape_of(self, role: str) -> tuple[int, ...]:
        """The shape of the tensor of a role; a frozen start has those of A and B."""
        return self.shapes[{"A0": "A", "B0": "B"}.get(role, role)]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its tensors: those that train, and A0 and B0 of a frozen start."""
        return (*self.shapes, "A0", "B0") if self.init in FROM_WEIGHT else (*self.shapes,)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight seen as one matrix, in the weight's own memory order."""
        matrix = (self.out_features, self.in_features)
        rows, cols = matrix[::-1] if self.transposed else matrix
        return rows * (self.experts or 1), cols

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The low-rank blocks on the weight matrix.

        Examples:
            >>> from lora_inject.core.spec.sites import Slices
            >>> spec = SiteSpec("c_attn", "conv1d", 4, 6, (4, 6), rank=2, alpha=2, transposed=True,
            ...                 slices=Slices((("q", 2), ("k", 2), ("v", 2)), ("q", "v")))
            >>> [(b.rows, b.cols) for b in spec.blocks]
            [((0, 4), (0, 2)), ((0, 4), (4, 6))]
        """
        blocks = []
        n_in, n_out = self.in_features, self.out_features
        a_rows, b_rows = self.a_shape[-2], self.b_shape[-2]
        for place, expert in enumerate(self.only or range(self.experts or 1)):
            a_place, b_place = (0 if self.share == role else place for role in "AB")
            for start, stop, of_a, of_b in adapted_parts(self.spans, self.rank):
                a = a_place * a_rows + of_a.start, a_place * a_rows + of_a.stop
                b = b_place * b_rows + of_b.start, b_place * b_rows + of_b.stop
                if self.transposed:
                    rows, cols = (expert * n_in, (expert + 1) * n_in), (start, stop)
                else:
                    rows, cols = (expert * n_out + start, expert * n_out + stop), (0, n_in)
                blocks.append(Block(rows, cols, a, b))
        return tuple(blocks)


def forms(sites: Iterable[SiteSpec]) -> list[SiteSpec]:
    """Return sites that stand for all: of those that differ only in their names one.

    Examples:
        >>> q = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), rank=2, alpha=2)
        >>> len(forms([q, q.at("h.1.q", "h.1.q.weight")]))
        1
    """
    return [*{id(site.shapes): site for site in sites}.values()]


def fits_kernel(spec: SiteSpec, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape has the kernel of a site, where the site has one.

    As many features are not enough: kernels of 1 x 3 and 3 x 1 have the same. Where all of its
    sides are 1 it is a plain layer's.

    Examples:
        >>> spec = SiteSpec("c", "conv", 12, 6, (6, 4, 1, 3), rank=2, alpha=2)
        >>> fits_kernel(spec, (6, 4, 1, 3)), fits_kernel(spec, (6, 4, 3, 1))
        (True, False)
    """
    kernel = spec.weight_shape[2:]
    return spec.kind == "parameter" or kernel == shape[2:] or math.prod(kernel) == 1


def meaning(spec: SiteSpec) -> tuple[object, ...]:
    """Return it but for the rank and the scale: parts, experts, orientation, variant, bias."""
    turned = spec.kind == "parameter" and spec.transposed
    common = (spec.spans, spec.experts, turned, spec.variant, spec.lora_bias)
    return (*common, spec.only, spec.share) if spec.only or spec.share else common

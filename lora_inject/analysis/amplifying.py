"""What a delta amplifies: Table 7 of the paper.

`|U^T W V|_F`, with U and V the top directions of the delta, is the part of W in these directions.
It takes only thin products, summed over blocks of rows, so W may be streamed. `|D|_F` over it is
the amplification factor.
Source: arXiv:2106.09685, section 7.3, Table 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.adapter.svd import ThinProduct, decompose
from lora_inject.analysis.blocks import Figures
from lora_inject.errors import StateError

RowsOfW = Callable[[], Iterator[tuple[int, Tensor]]]
"""Gives `(first row, rows)` over a whole weight matrix, anew at every call."""
STEP_ROWS = 4096
SPARE_DIRECTIONS = 128
"""Directions that the randomized SVD of a large W finds in addition to those that are wanted."""
EXACT_ELEMENTS = 1 << 22
"""Matrices of no more elements are decomposed exactly."""


@dataclass(frozen=True)
class Amplification(Figures):
    """One row of Table 7: Frobenius norms.

    Attributes:
        rank: r, how many directions are compared.
        delta_norm: `|D|`, of the whole delta.
        weight_norm: `|W|`.
        of_delta: `|U^T W V|`, U and V the top r singular directions of the delta.
        of_weight: The same with W's own top r directions. For a W of more than `EXACT_ELEMENTS` it
            comes from a randomized SVD, which errs to the low side: by 1e-6 where singular values
            fall, by a few per cent where W is pure noise.
        of_random: The same with random directions, drawn once.
        of_random_expected: Root of the mean square of that, `r |W| / sqrt(out in)`.
    """

    rank: int
    delta_norm: float
    weight_norm: float
    of_delta: float
    of_weight: float
    of_random: float
    of_random_expected: float

    @property
    def factor(self) -> float:
        """`|D| / |U^T W V|`: by how much the delta amplifies its directions; NaN for no delta."""
        if not self.delta_norm:
            return math.nan
        return self.delta_norm / self.of_delta if self.of_delta else math.inf

    @property
    def relative(self) -> float:
        """`|D| / |W|`; NaN where both are zero."""
        if not self.weight_norm:
            return math.inf if self.delta_norm else math.nan
        return self.delta_norm / self.weight_norm


def amplification(
    weight: Tensor | RowsOfW,
    delta: ThinProduct,
    rank: int | None = None,
    *,
    transposed: bool = False,
    seed: int = 0,
) -> Amplification:
    """Return how much a delta amplifies directions of W.

    Args:
        weight: W, `(out, in)`, any floating dtype; or a source of blocks of its rows, which is read
            once, and for the directions of a large W several times more.
        delta: Of the same shape: `ThinProduct.of(A, B, scale)`, or the `delta` of a block.
        rank: How many directions; the delta's rank by default and at most.
        transposed: Whether W is `(in, out)`, as in a Conv1D or an embedding.
        seed: Of the random directions.

    Returns:
        The norms of Table 7.

    Raises:
        StateError: The shapes differ.

    Examples:
        >>> W = torch.diag(torch.tensor([10.0, 1.0, 0.5, 0.1]))
        >>> A, B = torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0, 0.0]]).T
        >>> found = amplification(W, ThinProduct.of(A, B))
        >>> found.of_delta, found.of_weight, found.factor
        (0.5, 10.0, 4.0)
    """
    rows = _rows_of(weight, delta, transposed) if isinstance(weight, Tensor) else weight
    U, S, V = delta.svd()
    rank = len(S) if rank is None else min(rank, len(S))
    left, right = (V, U) if transposed else (U, V)  # directions of the rows and of the columns
    shape = left.shape[0], right.shape[0]
    chance = [_random_directions(n, rank, seed + i) for i, n in enumerate(shape)]
    lefts = torch.cat([left[:, :rank].cpu(), chance[0]], 1)
    rights = torch.cat([right[:, :rank].cpu(), chance[1]], 1)
    product = torch.zeros(2 * rank, 2 * rank, dtype=torch.float64, device="cpu")
    square = 0.0
    for start, some in rows():
        wide = some.to("cpu", torch.float64)
        square += float(wide.square().sum())
        product += lefts[start : start + len(wide)].T @ (wide @ rights)
    norm = math.sqrt(square)
    return Amplification(
        rank=rank,
        delta_norm=float(torch.linalg.vector_norm(S)),
        weight_norm=norm,
        of_delta=float(torch.linalg.matrix_norm(product[:rank, :rank])) if rank else 0.0,
        of_weight=_own(rows, shape, rank),
        of_random=float(torch.linalg.matrix_norm(product[rank:, rank:])) if rank else 0.0,
        of_random_expected=rank * norm / math.sqrt(shape[0] * shape[1]),
    )


def _rows_of(weight: Tensor, delta: ThinProduct, transposed: bool) -> RowsOfW:
    if tuple(weight.shape) != (delta.shape[::-1] if transposed else delta.shape):
        found = f"W is {list(weight.shape)}, the delta {list(delta.shape)}"
        remedy = "Give W as (out, in), or transposed=True for a Conv1D or an embedding"
        raise StateError("compare a delta with W", found, remedy)
    W = weight.detach()
    return lambda: ((i, W[i : i + STEP_ROWS]) for i in range(0, len(W), STEP_ROWS))


def _own(rows: RowsOfW, shape: tuple[int, int], rank: int) -> float:
    """Return `|U^T W V|` for W's own top directions: the norm of its largest values."""
    if not rank:
        return 0.0
    if shape[0] * shape[1] > EXACT_ELEMENTS:
        wide = torch.cat([some.to("cpu", torch.float32, copy=True) for _, some in rows()])
        found = decompose(wide, min(rank + SPARE_DIRECTIONS, *shape))
        return float(torch.linalg.vector_norm(found.S[:rank].double()))
    # The squares of the largest values are the largest eigenvalues of W W^T: faster than an SVD.
    matrix = torch.cat([some.to("cpu", torch.float64) for _, some in rows()])
    gram = matrix @ matrix.T if shape[0] < shape[1] else matrix.T @ matrix
    return float(torch.linalg.eigvalsh(gram)[-rank:].clamp(min=0).sum().sqrt())


def _random_directions(dim: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.float64, device="cpu")
    Q: Tensor = torch.linalg.qr(gaussian).Q
    return Q

"""The weights that an adapter updates, streamed from a checkpoint, and what it amplifies there.

`checkpoint.choose` finds the place of each update, as for a merge. Here the same rows are read
block by block and analyzed instead of written, so memory does not grow with W.

`|U^T W V|_F`, with U and V the top directions of the delta, is the part of W in these directions.
It takes only thin products, summed over blocks of rows. `|D|_F` over it is the amplification
factor.
Source: arXiv:2106.09685, section 7.3, Table 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.analysis.blocks import Figures, Place, SiteBlock, blocks_of_terms
from lora_inject.analysis.rounding import Rounded, rounding_of_rows
from lora_inject.checkpoint import Checkpoint, MergeOptions, WeightedAdapter
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.place import Placed
from lora_inject.checkpoint.quantized_base import why_no_update
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.svd import ThinProduct, decompose
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS
from lora_inject.core.functional.fold import Delta
from lora_inject.errors import CheckpointError, StateError

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
        >>> amplified = amplification(W, ThinProduct.of(A, B))
        >>> amplified.of_delta, amplified.of_weight, amplified.factor
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
        problem = f"W is {list(weight.shape)}, the delta {list(delta.shape)}"
        remedy = "Give W as (out, in), or transposed=True for a Conv1D or an embedding"
        raise StateError("compare a delta with W", problem, remedy)
    W = weight.detach()
    return lambda: ((i, W[i : i + STEP_ROWS]) for i in range(0, len(W), STEP_ROWS))


def _own(rows: RowsOfW, shape: tuple[int, int], rank: int) -> float:
    """Return `|U^T W V|` for W's own top directions: the norm of its largest values."""
    if not rank:
        return 0.0
    if shape[0] * shape[1] > EXACT_ELEMENTS:
        wide = torch.cat([some.to("cpu", torch.float32, copy=True) for _, some in rows()])
        leading = decompose(wide, min(rank + SPARE_DIRECTIONS, *shape))
        return float(torch.linalg.vector_norm(leading.S[:rank].double()))
    # The squares of the largest values are the largest eigenvalues of W W^T: faster than an SVD.
    matrix = torch.cat([some.to("cpu", torch.float64) for _, some in rows()])
    gram = matrix @ matrix.T if shape[0] < shape[1] else matrix.T @ matrix
    return float(torch.linalg.eigvalsh(gram)[-rank:].clamp(min=0).sum().sqrt())


def _random_directions(dim: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.float64, device="cpu")
    Q: Tensor = torch.linalg.qr(gaussian).Q
    return Q


@dataclass(frozen=True)
class BlockOnWeight(Place):
    """One block compared with the part of W that it updates."""

    tensor: str  # name of W in the checkpoint
    norms: Amplification  # the norms of Table 7


@dataclass(frozen=True)
class SiteOnWeight(Figures):
    """One site compared with its weight."""

    # its blocks; more than those of the site where the checkpoint splits them
    blocks: tuple[BlockOnWeight, ...]
    stored: str  # dtype of W in the checkpoint, such as `bfloat16`
    rounded: dict[str, Rounded]  # format to the part of the delta that it keeps in a merge

    @property
    def changed(self) -> bool:
        """Whether there is a delta at all."""
        return any(block.norms.delta_norm for block in self.blocks)


class Weights:
    """The weights of a checkpoint under the sites of an adapter.

    Args:
        state: The adapter.
        checkpoint: Its base.
        label: What to call the adapter in messages.
        any_base: Compare although the adapter's fingerprint says that it was made on another base.

    Raises:
        CheckpointError: A site has no place in it, its weight is quantized, or it is another base.
    """

    def __init__(
        self,
        state: AdapterState,
        checkpoint: Checkpoint,
        label: str = "the adapter",
        *,
        any_base: bool = False,
    ) -> None:
        # Trained copies replace tensors; only updates are compared.
        updates = replace(state, trained=MappingProxyType({}), rows=MappingProxyType({}))
        part = WeightedAdapter(updates, label=label)
        self.checkpoint = checkpoint
        self._state = state
        self._fit = _fit(part, checkpoint, MergeOptions(any_base=any_base))

    def n_bytes(self, site: str) -> int:
        """Return how many bytes of W belong to a site."""
        return sum(
            (placed.stop - placed.start) * placed.n_cols * FLOATS[placed.source.dtype].itemsize
            for placed in self._fit.places(site)
        )

    def look(self, site: str) -> SiteOnWeight:
        """Read the weight of a site and compare the update with it, as `analyze` says."""
        places = self._fit.places(site)
        spec = self._state.sites[site].spec
        experts = spec.only or range(spec.experts or 0)
        blocks: list[BlockOnWeight] = []
        rows = [self._open(placed) for placed in places]
        pairs = (pair for each in rows for pair in each.with_delta())
        rounded = rounding_of_rows(pairs)
        for number, each in enumerate(rows):
            # Places are in the order of the experts, several of each where the file cuts them.
            first = number * len(experts) // len(places)
            expert = f"expert {experts[first]} " if experts else ""
            for block in blocks_of_terms(each.placed.terms):
                of_block = partial(each.of, block)
                norms = amplification(of_block, block.delta, transposed=block.transposed)
                label = f"{expert}{block.label}".strip()
                blocks.append(BlockOnWeight(site, label, each.placed.source.name, norms))
        stored = str(FLOATS[places[0].source.dtype]).removeprefix("torch.")
        return SiteOnWeight(tuple(blocks), stored, rounded)

    def directions(self, site: str, n: int) -> list[tuple[SiteBlock, Tensor]]:
        """Return each block of a site with the top n input directions of the W that it updates.

        The directions are `(in, n)`, float64, by an SVD that is exact for small weights.
        """
        tops = []
        for placed in self._fit.places(site):
            rows = self._open(placed)
            for block in blocks_of_terms(placed.terms):
                wide = [some.to(torch.float32, copy=True) for _, some in rows.of(block)]
                top = decompose(torch.cat(wide), min(n, *block.delta.shape))
                tops.append((block, (top.U if block.transposed else top.V).double()))
        return tops

    def _open(self, placed: Placed) -> _Rows:
        return _Rows(placed, RowReader(self.checkpoint.path_of(placed.source.name)))


@dataclass(frozen=True)
class _Rows:
    """The rows of one place, counted from its first; each is valid until the next are asked for."""

    placed: Placed
    reader: RowReader

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)`."""
        entry, n_cols, first = self.placed.source, self.placed.n_cols, self.placed.start
        for at, rows in self.reader.blocks(entry, n_cols, first + start, first + stop):
            yield at - first, rows

    def with_delta(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all rows of W, and those of D."""
        for start, some in self.between(0, self.placed.stop - self.placed.start):
            wide = torch.float64 if some.dtype == torch.float64 else torch.float32
            delta = Delta(self.placed.terms, wide)
            yield some, delta.add_(torch.zeros(some.shape, dtype=wide, device="cpu"), start)

    def of(self, block: SiteBlock) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of the part of W that one block updates, counted from its first."""
        top, columns = block.block.rows[0], slice(*block.block.cols)
        for start, some in self.between(*block.block.rows):
            yield start - top, some[:, columns]


def _fit(part: WeightedAdapter, checkpoint: Checkpoint, options: MergeOptions) -> Fit:
    asked = f"compare {part.label} with '{checkpoint.folder}'"
    try:
        fit = choose(part, BaseClass(checkpoint), options)
    except CheckpointError as error:  # its words are about merging
        raise CheckpointError(asked, error.found, error.remedy) from None
    entries = [placed.source for job in fit.jobs.values() for placed in job.placed]
    quantized = why_no_update(checkpoint, [entry.name for entry in entries])
    odd = [f"'{e.name}' is stored as {e.dtype}" for e in entries if e.dtype not in FLOATS]
    for problem in [quantized[0]] if quantized is not None else odd:
        raise CheckpointError(asked, problem, "Give the 16-bit checkpoint instead")
    return fit

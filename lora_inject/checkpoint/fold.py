"""Computing the rows of an output tensor from the base's rows and the adapters.

One idea: every output row depends on the same row of the base and on small factors only, so a
tensor of any size is worked through in blocks that stay in the processor's cache, and blocks can
be dealt to threads. The arithmetic is that of `functional.fold_rows`: float32 (float64 for
float64), one rounding at the end, however many adapters take part.

What is not here: files being made (`write`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_inject.checkpoint.layout import FLOATS, TensorJob
from lora_inject.checkpoint.read import RowReader, rows_per_block
from lora_inject.errors import CheckpointError
from lora_inject.functional import Term, fold_rows_

__all__ = ["Scratch", "Span", "Sums", "TensorReport", "combine", "fold_span", "spans_of"]

SPAN_ELEMENTS = 1 << 24
"""Elements that one thread takes at a time: many blocks, and a small part of a large tensor."""


@dataclass(frozen=True)
class Span:
    """Some rows of one output tensor, and the terms that fall on them.

    Attributes:
        job: The tensor.
        n_cols: Columns of its matrix.
        start: First row.
        stop: First row after.
        offset: Row that the terms' matrix begins at.
        terms: Low-rank updates.
    """

    job: TensorJob
    n_cols: int
    start: int
    stop: int
    offset: int
    terms: tuple[Term, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the output."""
        return self.n_cols * FLOATS[self.job.dtype].itemsize


@dataclass(frozen=True)
class TensorReport:
    """What became of one output tensor.

    Attributes:
        name: The tensor.
        action: `folded`, `replaced`, `added`, `untied` or `cast`.
        dtype: The format's name of its dtype in the output.
        shape: Its dimensions in the output.
        sites: The adapters' sites and tensors that went into it.
        relative: `|delta| / |W|`, None for tensors that no delta was folded into.
        kept: `<W_merged - W, D> / <D, D>`, the share of the delta that survived rounding.
        error: `|W_merged - W - D| / |D|`.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    relative: float | None = None
    kept: float | None = None
    error: float | None = None


def spans_of(job: TensorJob) -> Iterator[Span]:
    """Cut a tensor into spans: at the limits of its terms, and at `SPAN_ELEMENTS`."""
    n_rows, n_cols = job.matrix
    if (
        not job.placed and not job.rows and job.scales is None
    ):  # any shape: its values are worked on one by one
        n_rows, n_cols = n_rows * n_cols, 1
    limits = sorted({0, n_rows, *(r for p in job.placed for r in (p.start, p.stop))})
    for first, last in itertools.pairwise(limits):
        terms = tuple(
            term for p in job.placed if p.start <= first and last <= p.stop for term in p.terms
        )
        step = max(1, SPAN_ELEMENTS // max(1, n_cols))
        if job.magnitude is not None and job.transposed:
            step = last - first  # the norms need all rows: one thread reads the tensor twice
        for start in range(first, last, step):
            yield Span(job, n_cols, start, min(last, start + step), first, terms)


@dataclass(frozen=True)
class _Updates:
    """The terms of a span, prepared once for all of its blocks.

    Attributes:
        terms: With factors in the dtype of the arithmetic, as matrices.
        left: `(rows, rank)`, times the scale, where one term covers the span whole, else None.
        right: `(rank, cols)`, likewise.
    """

    terms: tuple[Term, ...]
    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, span: Span, dtype: torch.dtype) -> _Updates:
        """Cast the factors, and see whether the delta is one plain product."""
        terms = tuple(_in_dtype(term, dtype) for term in span.terms)
        if len(terms) != 1 or len(terms[0].spec.blocks) != 1:
            return cls(terms, None, None)
        (term,), block = terms, terms[0].spec.blocks[0]
        covered = block.rows[0] == 0 and span.stop - span.offset <= block.rows[1]
        if not covered or block.cols != (0, span.n_cols):
            return cls(terms, None, None)
        a, b = term.A[slice(*block.a)], term.B[slice(*block.b)] * (term.spec.scale * term.weight)
        return cls(terms, a.t(), b.t()) if term.spec.transposed else cls(terms, b, a)

    def delta_(self, out: Tensor, start: int) -> Tensor:
        """Write the delta of some rows, the first of which is `start` of the terms' matrix."""
        if self.left is not None and self.right is not None:
            return torch.mm(self.left[start : start + out.shape[0]], self.right, out=out)
        out.fill_(-0.0)  # W + -0.0 has the bits of W for every W, 0.0 would change a -0.0
        fold_rows_(out, start, self.terms)
        return out


def _in_dtype(term: Term, dtype: torch.dtype) -> Term:
    """Cast the factors once, not for every block, and see them as matrices."""
    A = term.A.detach().to(dtype).reshape(-1, term.spec.in_features)
    return replace(term, A=A, B=term.B.detach().to(dtype).reshape(-1, term.spec.rank))


@dataclass
class Sums:
    """Running sums over the blocks of a span: what rounding left of the delta D.

    Attributes:
        dd: `<D, D>`.
        ww: `<W, W>`.
        rd: `<R, D>`, with R what rounding took away.
        rr: `<R, R>`.
        counted: Whether a delta was folded in at all.
    """

    dd: float = 0.0
    ww: float = 0.0
    rd: float = 0.0
    rr: float = 0.0
    counted: bool = False

    @property
    def finite(self) -> bool:
        """Whether nothing but finite values was counted."""
        return math.isfinite(self.dd + self.rr)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


class Scratch:
    """Memory that one thread reuses for every block.

    Fresh memory for each block would cost more in page faults than all of the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, bytearray] = {}
        self._views: dict[tuple[str, tuple[int, int], torch.dtype], tuple[Tensor, Tensor]] = {}

    def tensor(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return memory for one purpose as a tensor; what it held before is lost."""
        return self.both(use, shape, dtype)[0]

    def both(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the same memory as a matrix and as a vector, made once: blocks are many."""
        key = (use, shape, dtype)
        if key not in self._views:
            flat = self._memory(use, shape[0] * shape[1], dtype)
            self._views[key] = flat.view(shape), flat
        return self._views[key]

    def _memory(self, use: str, n_elements: int, dtype: torch.dtype) -> Tensor:
        if n_elements == 0:
            return torch.empty(0, dtype=dtype)
        n_bytes = n_elements * dtype.itemsize
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < n_bytes:
            self._views = {key: both for key, both in self._views.items() if key[0] != use}
            buffer = self._buffers[use] = bytearray(n_bytes)
        return torch.frombuffer(buffer, dtype=dtype, count=n_elements)

    def bytes_of(self, tensor: Tensor) -> memoryview:
        """Return the bytes of what `tensor("output", ...)` gave out last."""
        n_bytes = tensor.numel() * tensor.element_size()
        return memoryview(self._buffers.get("output", b""))[:n_bytes]


def fold_span(
    span: Span, reader: RowReader | None, scratch: Scratch
) -> Iterator[tuple[int, Tensor, Sums]]:
    """Compute a span block by block.

    Args:
        span: The rows.
        reader: Of the base's shard that holds the source; None where there is no source.
        scratch: This thread's memory.

    Yields:
        `(first row, rows, sums)`: rows `(n, n_cols)` in the output's dtype, in the scratch's
        `output`, valid until the next; the sums so far.

    Raises:
        CheckpointError: A value is not finite.
    """
    job, step = span.job, rows_per_block(span.n_cols)
    wide = torch.float64 if job.source is not None and job.source.dtype == "F64" else torch.float32
    updates = _Updates.of(span, wide)
    sums = Sums()
    scales = _read_scales(job)
    factors = None
    if job.magnitude is not None:
        factors = _factors(span, reader, updates.terms, scratch, scales)
    for start in range(span.start, span.stop, step):
        stop = min(span.stop, start + step)
        rows = _base_rows(span, reader, start, stop, scales)
        if job.trained or job.added:
            rows = _with_vectors(job, rows, span.n_cols, start, stop)
        shape = (stop - start, span.n_cols)
        merged = scratch.tensor("output", shape, FLOATS[job.dtype])
        if span.terms:
            _fold_block(rows, start - span.offset, updates, merged, scratch, sums, factors)
        else:
            merged.copy_(rows)
        for indices, values in job.rows:
            for at, index in enumerate(indices):
                if start <= index < stop:
                    merged[index - start] = values[at].detach().to(merged.dtype)
        if not (sums.finite if span.terms else _kept_finite(rows, merged)):
            _check_finite(job, rows, merged)
        yield start, merged, sums


def _fold_block(
    rows: Tensor,
    start: int,
    updates: _Updates,
    merged: Tensor,
    scratch: Scratch,
    sums: Sums,
    factors: _Factors | None,
) -> None:
    """Add the delta, round and count, in two float32 buffers: all of it stays in the cache."""
    shape, wide = (rows.shape[0], rows.shape[1]), updates.terms[0].A.dtype
    total, flat = scratch.both("total", shape, wide)
    delta, flat_delta = scratch.both("delta", shape, wide)
    total.copy_(rows)
    sums.ww += _dot(flat, flat)
    updates.delta_(delta, start)
    total.add_(delta)
    if factors is not None:
        factors.apply_(total, start)
        torch.sub(total, rows, out=delta)
    sums.dd += _dot(flat_delta, flat_delta)
    merged.copy_(total)
    total.sub_(merged)  # what rounding took away
    sums.rr += _dot(flat, flat)
    sums.rd += _dot(flat, flat_delta)
    sums.counted = True


@dataclass(frozen=True)
class _Factors:
    """DoRA's `m / |W + delta|`, the norm over the inputs of each output.

    Attributes:
        magnitude: `(out,)`.
        norms: `(out,)` where the outputs are columns, None where they are rows: then a block has
            all that it takes.
    """

    magnitude: Tensor
    norms: Tensor | None

    def apply_(self, total: Tensor, start: int) -> None:
        if self.norms is not None:
            total.mul_(self.magnitude / self.norms)
        else:
            magnitude = self.magnitude[start : start + total.shape[0]]
            total.mul_((magnitude / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1))


def _factors(
    span: Span,
    reader: RowReader | None,
    terms: tuple[Term, ...],
    scratch: Scratch,
    scales: Tensor | None,
) -> _Factors:
    """Prepare DoRA's factors; for outputs that are columns this reads the tensor once more."""
    assert span.job.magnitude is not None
    wide = terms[0].A.dtype
    magnitude = span.job.magnitude.detach().to(wide).flatten()
    if not span.job.transposed:
        return _Factors(magnitude, None)
    squares = torch.zeros(span.n_cols, dtype=torch.float64)
    step = rows_per_block(span.n_cols)
    for start in range(span.start, span.stop, step):
        rows = _base_rows(span, reader, start, min(span.stop, start + step), scales)
        total = scratch.tensor("total", (rows.shape[0], span.n_cols), wide).copy_(rows)
        fold_rows_(total, start - span.offset, terms)
        squares += total.square().sum(dim=0, dtype=torch.float64)
    return _Factors(magnitude, squares.sqrt().to(wide))


def _read_scales(job: TensorJob) -> Tensor | None:
    """Return the whole table of scales of a float8 source, float32; None where there is none."""
    if job.scales is None:
        return None
    entry = job.scales.entry
    with RowReader(job.scales.path) as reader:
        return reader.rows(entry, entry.shape[1], 0, entry.shape[0]).to(torch.float32, copy=True)


def _base_rows(
    span: Span, reader: RowReader | None, start: int, stop: int, scales: Tensor | None = None
) -> Tensor:
    job = span.job
    if job.base_copy is not None:
        return _rows_of(job.base_copy, span.n_cols, start, stop)
    if job.source is None or reader is None or job.shape != job.source.shape:
        if not job.trained:
            raise CheckpointError(f"merge into '{job.name}'", "it has no values", "Report this")
        return _rows_of(job.trained[0][0], span.n_cols, start, stop)
    rows = reader.rows(job.source, span.n_cols, start, stop)
    if job.scales is None:
        return rows
    assert scales is not None
    return job.scales.apply(rows, start, scales)


def _rows_of(tensor: Tensor, n_cols: int, start: int, stop: int) -> Tensor:
    return tensor.detach().reshape(-1, n_cols)[start:stop]


def _with_vectors(job: TensorJob, rows: Tensor, n_cols: int, start: int, stop: int) -> Tensor:
    """Return `W + sum of w (T - W) + sum of w b`: exactly T for one adapter of weight 1."""
    if len(job.trained) == 1 and job.trained[0][1] == 1:
        return _rows_of(job.trained[0][0], n_cols, start, stop)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    base = rows.to(wide)
    total = base.clone()
    for tensor, weight in job.trained:
        total += weight * (_rows_of(tensor, n_cols, start, stop).to(wide) - base)
    for tensor, weight in job.added:
        total += weight * _rows_of(tensor, n_cols, start, stop).to(wide)
    return total


def _kept_finite(rows: Tensor, merged: Tensor) -> bool:
    """Return whether a cast can have made nothing infinite, by a quick look."""
    return merged.dtype == rows.dtype or math.isfinite(float(merged.sum(dtype=torch.float64)))


def _check_finite(job: TensorJob, rows: Tensor, merged: Tensor) -> None:
    """Look closely: a mask's own -Inf may stay, what became Inf may not."""
    finite = torch.isfinite(merged)
    if bool(finite.all()):
        return
    if not bool(torch.isfinite(rows).all()):
        if job.placed:
            raise CheckpointError(
                f"merge into '{job.name}'",
                "the base holds NaN or Inf there",
                "The base is damaged; fetch it again",
            )
        if not bool((torch.isfinite(rows) & ~finite).any()):
            return
    raise CheckpointError(
        f"merge into '{job.name}'",
        f"the result is too large for {job.dtype}: it would become Inf",
        "Write float32 or bfloat16 (dtype), or merge with a smaller weight",
    )


def combine(job: TensorJob, of_spans: Sequence[Sums]) -> TensorReport:
    """Sum the sums of a tensor's spans, in their order, into its report."""
    report = TensorReport(job.name, job.action, job.dtype, job.shape, job.sites)
    if not any(sums.counted for sums in of_spans):
        return report
    dd, ww, rd, rr = (sum(getattr(s, name) for s in of_spans) for name in ("dd", "ww", "rd", "rr"))
    return replace(
        report,
        relative=_finite(math.sqrt(dd / ww)) if ww else None,
        kept=_finite(1 - rd / dd) if dd else 1.0,
        error=_finite(math.sqrt(rr / dd)) if dd else 0.0,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""The textbook formula for some rows of each merged tensor, apart from the code that merges.

A mistake in the code that merges is repeated where the same code verifies: a square stack of
experts was once merged transposed, and computing it again found nothing wrong. So nothing here
knows of places, patches and blocks. It takes the adapter's own A and B, asks the class of the base
where a tensor lies in a stack, and forms `W + weight * scale * (B A - B0 A0)` in float64, one row
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import OutputShard, TensorJob
from lora_inject.checkpoint.pieces import rows_before_packing
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.spec.sites import SiteSpec, adapted_parts
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.formats.older_names import PlaceInClass

N_ROWS = 16
"""Rows of each tensor that are computed, evenly spaced."""
TOLERANCE = 1e-5
"""Of the largest value of a row: what its sums in float32 may be off before they are rounded."""


def check_formula(plan: MergePlan, of: BaseClass, shard: OutputShard, path: Path) -> Iterator[str]:
    """Yield what is wrong with the tensors of a merged file that lies at `path`."""
    written = RowReader(path)
    for job in shard.jobs:
        tensor = _Formula(plan, of, job)
        # What is quantized again is held to the formula before it is rounded to a few bits.
        found = rows_before_packing(job) if job.again else tensor.reader(written, shard)
        for row in tensor.sampled():
            if not _is_rounded(found(row), *tensor.row(row)):
                yield f"'{job.name}': row {row} is not what the formula gives"
                break


def _is_rounded(found: Tensor, due: Tensor, slack: float) -> bool:
    """Whether values are those that are due, off by a sum's `slack` and rounded once."""
    limits = torch.finfo(found.dtype)
    bound = slack + limits.eps * (due.abs() + slack) + limits.tiny * limits.eps
    found = found.double()
    close = (found - due).abs() <= bound
    # A tensor that is only cast may hold -Inf, as a mask does, or NaN.
    return bool((close | (found == due) | (found.isnan() & due.isnan())).all())


class _Formula:
    """The values that one tensor of the output has to have, as a matrix of `n_cols` columns."""

    def __init__(self, plan: MergePlan, of: BaseClass, job: TensorJob) -> None:
        self.of, self.job = of, job
        sites = ((s, a.weight) for a in plan.adapters for s in a.state.sites.values())
        named = set(job.sites if job.placed else ())
        self.sites = [(site, weight) for site, weight in sites if site.spec.name in named]
        self.n_cols = math.prod(job.shape[1:] if len(job.shape) > 1 else job.shape)
        if job.packed is not None:
            self.n_cols = job.shape[-1]
        for site, _ in self.sites:
            if site.spec.kind == "parameter" and site.spec.weight_shape == job.shape:
                self.n_cols = site.spec.matrix_shape[1]  # of several axes, some are rows
            elif self._is_stack(site.spec):
                self.n_cols = job.shape[-1]
        self.n_rows = math.prod(job.shape) // max(1, self.n_cols)
        self._base = None
        if job.source is not None and job.packed is None:
            self._base = RowReader(plan.base.path_of(job.source.name))
        self._packed = None if job.packed is None else job.packed.rows()

    def reader(self, file: RowReader, shard: OutputShard) -> Callable[[int], Tensor]:
        """Return the function to a row of it in a file that was written."""
        entry = shard.header.tensors[self.job.name]
        return lambda row: file.rows(entry, self.n_cols, row, row + 1)[0]

    def sampled(self) -> list[int]:
        """Return rows all over the tensor, with some of each adapted expert."""
        rows = {i * self.n_rows // N_ROWS for i in range(N_ROWS)} if self.n_rows else set()
        for site, _ in self.sites:
            if site.spec.only is not None and self._is_stack(site.spec):
                height = self.n_rows // self.job.shape[0]
                rows |= {expert * height + height // 2 for expert in site.spec.only}
        return sorted(rows)

    def row(self, row: int) -> tuple[Tensor, float]:
        """Return a row in float64, and by how much its sum may be off in float32."""
        total, size = self._sum(row)
        for site, _ in self.sites:
            variant, place = VARIANTS[site.spec.variant], self._place(site.spec, row)
            if variant.gained and place is not None:
                turned, at = self._is_turned(site.spec), place[1]
                norms, first = (self._norms, 0) if turned else (total.norm()[None], at)
                for start, stop, _, held in adapted_parts(site.spec.spans, 1):
                    a, b = max(start, first), min(stop, first + len(norms))
                    if a < b:
                        mine = slice(held.start + a - start, held.start + b - start)
                        tensors = {r: t[mine].double() for r, t in site.further.items()}
                        gain = variant.gain(tensors, norms[a - first : b - first])
                        total[slice(a, b) if turned else slice(None)] *= gain
                        size *= max(1.0, float(gain.abs().max()))
        return total, TOLERANCE * size

    @cached_property
    def _norms(self) -> Tensor:
        """The norms of outputs that are columns."""
        squares = torch.zeros(self.n_cols, dtype=torch.float64)
        for row in range(self.n_rows):
            squares += self._sum(row)[0] ** 2
        return squares.sqrt()

    def _sum(self, row: int) -> tuple[Tensor, float]:
        """Return the row of W with every update added, and the largest value of them."""
        total = self._before(row)
        size = float(total.abs().nan_to_num(posinf=0.0).max())
        for site, weight in self.sites:
            place = self._place(site.spec, row)
            for change in () if place is None else self._changes(site, *place):
                total += weight * change
                size = max(size, abs(weight) * float(change.abs().max()))
        return total, size

    def _before(self, row: int) -> Tensor:
        """Return the row of W, with what adapters trained in full in its place or added to it."""
        job = self.job
        copies = [(t.reshape(-1, self.n_cols)[row].double(), w) for t, w in job.trained]
        if job.held is not None:
            stored = job.held.reshape(-1, self.n_cols)[row].double()
        elif self._packed is not None:
            stored = self._packed(row, row + 1)[0].double()
        else:
            assert self._base is not None
            assert job.source is not None
            stored = self._base.rows(job.source, self.n_cols, row, row + 1)[0].double()
        total = torch.where(stored.isfinite(), 1 - sum(w for _, w in copies), 1.0) * stored
        for copy, weight in copies:
            total = total + weight * copy
        for vector, weight in job.added:
            total = total + weight * vector.reshape(-1, self.n_cols)[row].double()
        for indices, values in job.rows:
            total = values[indices.index(row)].double() if row in indices else total
        return total.clone()

    # Where a site's update lies ------------------------------------------------------------------

    def _is_stack(self, spec: SiteSpec) -> bool:
        """Whether the tensor stacks matrices of which the site adapts all or some."""
        return len(self.job.shape) == 3 and spec.experts is not None

    def _place(self, spec: SiteSpec, row: int) -> tuple[int, int] | None:
        """Return the site's matrix and its row there, None for a row of none of its matrices.

        A file may keep a stack's matrices apart: the class says which expert's they are, and which
        of the parts that lie one above the other.
        """
        if spec.experts is None:
            return 0, row
        height = self.n_rows // (self.job.shape[0] if self._is_stack(spec) else 1)
        expert, at = divmod(row, height)
        if not self._is_stack(spec) and spec.weight_shape != self.job.shape:
            if self._apart is None or self._apart.expert is None:
                return None
            expert, at = self._apart.expert, self._apart.part * height + row
        chosen = spec.only or range(spec.experts)
        return (chosen.index(expert), at) if expert in chosen else None

    @cached_property
    def _apart(self) -> PlaceInClass | None:
        """Where the class has the tensor."""
        return self.of.place_of(self.job.name)

    def _is_turned(self, spec: SiteSpec) -> bool:
        """Whether the matrix is `(in, out)`: its shape says, else the class of a stack does."""
        wide = (spec.out_features, spec.in_features)
        if spec.kind == "parameter" and len(spec.weight_shape) > 2 + (spec.experts is not None):
            return spec.transposed
        if wide[0] != wide[1]:
            return self.n_cols == spec.out_features
        of_class = spec.experts is not None and self.of.known and self.of.transposed(spec.weight)
        return spec.transposed or bool(of_class)

    def _changes(self, site: SiteState, matrix: int, row: int) -> Iterator[Tensor]:
        """Yield a row of `scale * B A`, and of its frozen start."""
        spec = site.spec
        for A, B, sign in site.pairs:
            a = A.reshape(-1, *spec.a_shape[-2:])[0 if spec.share == "A" else matrix].double()
            b = B.reshape(-1, *spec.b_shape[-2:])[0 if spec.share == "B" else matrix].double()
            change = torch.zeros(self.n_cols, dtype=torch.float64)
            for start, stop, of_a, of_b in adapted_parts(spec.spans, spec.rank):
                if self._is_turned(spec):
                    change[start:stop] = b[of_b] @ a[of_a, row]
                elif start <= row < stop:
                    change = b[of_b][row - start] @ a[of_a]
            yield sign * spec.scale * change

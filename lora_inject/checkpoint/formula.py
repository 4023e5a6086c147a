"""The textbook formula for a merged tensor, apart from the code that merges.

A mistake in the code that merges is repeated where the same code verifies: a square stack of
experts was once merged transposed, and computing it again found nothing wrong. So nothing here
knows of places, patches and blocks. It takes the adapter's own A and B, asks the class of the base
where a tensor lies in a stack, and forms `W + weight * scale * (B A - B0 A0)` in float64.

There is one tolerance: what the sum may be off in float32, whatever its order (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1), and one rounding to the dtype of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import TensorJob
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.spec.sites import SiteSpec, adapted_parts
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.formats.older_names import PlaceInClass


class Due(NamedTuple):
    """Some rows as they have to be, float64, and by how much their sums may be off."""

    values: Tensor
    slack: Tensor

    def allows(self, found: Tensor) -> bool:
        """Whether values are those that are due, off by the slack and rounded once to their dtype.

        A tensor that is only cast may hold -Inf, as a mask does, or NaN.
        """
        limits, values = torch.finfo(found.dtype), found.double()
        bound = self.values.abs().add_(self.slack).mul_(limits.eps / 2).add_(self.slack)
        close = (values - self.values).abs_() <= bound.add_(limits.tiny * limits.eps)
        if bool(close.all()):
            return True
        same = (values == self.values) | (values.isnan() & self.values.isnan())
        return bool((close | same).all())


class Formula:
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
        # Roundings of a value: each product of a rank, each factor, each term.
        n = 4 + 3 * len(job.trained) + 2 * len(job.added)
        n += sum(len(site.pairs) * (site.spec.rank + 2) for site, _ in self.sites)
        is_double = job.source is not None and job.source.dtype == "F64"
        self._share = n * (2.0**-52 if is_double else 2.0**-24)

    def rows(self, start: int, stop: int) -> Due:
        """Return the rows that are due."""
        total, size = self._sum(start, stop)
        slack = size.mul_(self._share)
        for site, _ in self.sites:
            variant = VARIANTS[site.spec.variant]
            if variant.gained:  # one matrix: no stack has a gain
                turned = self._is_turned(site.spec)
                norms, first = (self._norms, 0) if turned else (total.norm(dim=1), start)
                gains = torch.ones_like(norms)
                for of_out, stop_out, _, held in adapted_parts(site.spec.spans, 1):
                    a, b = max(of_out, first), min(stop_out, first + len(norms))
                    if a < b:
                        mine = slice(held.start + a - of_out, held.start + b - of_out)
                        tensors = {r: t.detach()[mine].double() for r, t in site.further.items()}
                        gains[a - first : b - first] = variant.gain(
                            tensors, norms[a - first : b - first]
                        )
                gains = gains if turned else gains[:, None]
                total.mul_(gains)
                norm_is_off = math.sqrt(self.n_cols) * 2.0**-24  # a sum of squares in float32
                slack.mul_(gains.abs()).add_(total.abs(), alpha=norm_is_off)
        return Due(total, slack)

    @cached_property
    def _norms(self) -> Tensor:
        """The norms of outputs that are columns."""
        squares, step = torch.zeros(self.n_cols, dtype=torch.float64), max(1, 2**17 // self.n_cols)
        for start in range(0, self.n_rows, step):
            rows, _ = self._sum(start, min(start + step, self.n_rows))
            squares += rows.square_().sum(dim=0)
        return squares.sqrt()

    def _sum(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows of W with every update added, and the size of all that is added."""
        total, size = self._before(start, stop)
        for site, weight in self.sites:
            for matrix, rows, at in self._matrices(site.spec, start, stop):
                for change, most in self._changes(site, matrix, rows):
                    total[at : at + len(rows)].add_(change, alpha=weight)
                    size[at : at + len(rows)].add_(most, alpha=abs(weight))
        return total, size

    def _before(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows of W, with what adapters trained in full in their place or added to them."""
        job = self.job
        if job.held is not None:
            stored = self._of(job.held, start, stop)
        elif self._packed is not None:
            stored = self._packed(start, stop)
        else:
            assert self._base is not None
            assert job.source is not None
            stored = self._base.rows(job.source, self.n_cols, start, stop)
        W = stored.to(torch.float64, copy=True)
        copies = [(self._of(t, start, stop), weight) for t, weight in job.trained]
        total, size = W.clone(), W.abs().nan_to_num_(posinf=0.0)
        if copies:
            kept = 1 - sum(weight for _, weight in copies)
            total = torch.where(W.isfinite(), kept, 1.0) * W
        for values, weight in [*copies, *((self._of(v, start, stop), w) for v, w in job.added)]:
            total.add_(values, alpha=weight)
            size.add_(values.abs(), alpha=abs(weight))
        for row in self._replaced.keys() & range(start, stop) if self._replaced else ():
            total[row - start] = self._replaced[row].double()
            size[row - start] = total[row - start].abs()
        return total, size

    @cached_property
    def _replaced(self) -> dict[int, Tensor]:
        """The rows that adapters replace."""
        pairs = ((i, v.detach()) for i, v in self.job.rows)
        return {row: value for i, v in pairs for row, value in zip(i, v, strict=True)}

    def _of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor.detach().reshape(-1, self.n_cols)[start:stop].double()

    # Where a site's update lies ------------------------------------------------------------------

    def _is_stack(self, spec: SiteSpec) -> bool:
        """Whether the tensor stacks matrices of which the site adapts all or some."""
        return len(self.job.shape) == 3 and spec.experts is not None

    def _matrices(self, spec: SiteSpec, start: int, stop: int) -> Iterator[tuple[int, range, int]]:
        """Yield each of the site's matrices in some rows: its number, its rows, and where they are.

        A file may keep a stack's matrices apart: the class says which expert's they are, and which
        of the parts that lie one above the other.
        """
        if spec.experts is None:
            yield 0, range(start, stop), 0
            return
        chosen = list(spec.only or range(spec.experts))
        height = self.n_rows // (self.job.shape[0] if self._is_stack(spec) else 1)
        for number in range(start // height, -(-stop // height)):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            expert, above = number, -number * height
            if not self._is_stack(spec) and spec.weight_shape != self.job.shape:
                if self._apart is None or self._apart.expert is None:
                    return
                expert, above = self._apart.expert, self._apart.part * height
            if expert in chosen:
                rows = range(first + above, last + above)
                yield chosen.index(expert), rows, first - start

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

    def _changes(
        self, site: SiteState, matrix: int, rows: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of `scale * B A` and of its frozen start, and how large their products are.

        The absolute products of a row of B and a column of A add up to at most `|b| |a|`.
        """
        spec, turned = site.spec, self._is_turned(site.spec)
        for A, B, sign in site.pairs:
            a = A.detach().reshape(-1, *spec.a_shape[-2:])[0 if spec.share == "A" else matrix]
            b = B.detach().reshape(-1, *spec.b_shape[-2:])[0 if spec.share == "B" else matrix]
            change = torch.zeros(len(rows), self.n_cols, dtype=torch.float64)
            most = torch.zeros_like(change)
            for start, stop, of_a, of_b in adapted_parts(spec.spans, spec.rank):
                left, right = b[of_b].double(), a[of_a].double()
                if turned:
                    left, right = right.T[rows.start : rows.stop], left.T
                    place = slice(None), slice(start, stop)
                else:
                    first, last = max(rows.start, start), min(rows.stop, stop)
                    if first >= last:
                        continue
                    left = left[first - start : last - start]
                    place = slice(first - rows.start, last - rows.start), slice(None)
                change[place] = left @ right
                most[place] = torch.outer(left.norm(dim=1), right.norm(dim=0))
            yield change.mul_(sign * spec.scale), most.mul_(abs(spec.scale))

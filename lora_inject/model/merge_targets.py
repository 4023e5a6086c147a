"""The tensors that a merge writes: what goes into each, who shares its memory, what forbids it.

Merging is two passes over the same arithmetic. The first forms merged weights without writing them
where only that can tell whether they may be written; the second writes, row block by row block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.errors import LayerError, StateError
from lora_inject.functional import (
    Delta,
    Tally,
    Term,
    all_finite,
    block_rows,
    fold_rows,
    mix_copies,
)
from lora_inject.layers.attached import Entry
from lora_inject.layers.survey import Survey, memory_of
from lora_inject.model.carried import whole_adapter
from lora_inject.model.sharding import sharded_by
from lora_inject.spec.names import joined


class Holder(NamedTuple):
    """A base parameter in its place."""

    name: str
    module: nn.Module
    param: str

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter that stands there now."""
        found = self.module._parameters[self.param]
        assert found is not None
        return found


@dataclass
class Target:
    """One tensor to write.

    Attributes:
        holder: Where it stands.
        terms: Low-rank updates to fold in.
        copies: Full trained copies, each with its weight.
        sharers: Who else holds the same memory, and must not see the merge.
        tally: What rounding left, where it was counted.
    """

    holder: Holder
    terms: list[Term] = field(default_factory=list)
    copies: list[tuple[Tensor, float]] = field(default_factory=list)
    sharers: list[Holder] = field(default_factory=list)
    tally: Tally | None = None

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.holder.name

    @property
    def weight(self) -> nn.Parameter:
        """The tensor."""
        return self.holder.tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as one matrix."""
        if self.terms:
            return self.terms[0].spec.matrix_shape
        return (self.weight.shape[0] if self.weight.dim() else 1, -1)

    @property
    def narrow(self) -> bool:
        """Whether the weight is stored in 16 bits, which may lose part of a delta."""
        return self.weight.element_size() <= 2

    @cached_property
    def delta(self) -> Delta:
        """The terms, prepared for all blocks."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return Delta(self.terms, wide)

    def may_overflow(self) -> bool:
        """Whether the largest value that a delta could have comes near the largest of the dtype."""
        bound = sum(
            abs(term.spec.scale * term.weight) * _norm(term.A) * _norm(term.B)
            for term in self.terms
        )
        return not bound <= 1e-6 * torch.finfo(self.weight.dtype).max

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of the weight matrix, views in its own storage."""
        matrix = self.weight.detach().view(self.matrix_shape)
        step = block_rows(matrix)
        for i, rows in enumerate(matrix.split(step)):  # type: ignore[no-untyped-call]
            yield i * step, rows

    def merged(
        self, rows: Tensor, start: int, tally: Tally | None, out: Tensor | None = None
    ) -> Tensor:
        """Return some merged rows, possibly into `rows` itself."""
        if not self.copies:
            return fold_rows(rows, start, self.delta, tally, out)
        stop, wide = start + rows.shape[0], self.delta.dtype
        copies = [(t.reshape(self.matrix_shape)[start:stop], w) for t, w in self.copies]
        before = rows.to(wide, copy=True)
        wanted = mix_copies(rows, copies, wide)
        self.delta.add_(wanted, start)
        merged = wanted.to(rows.dtype) if out is None else out.copy_(wanted)
        if tally is not None:
            tally.count(before, wanted - before, wanted - merged.to(wide))
        return merged

    def rehearse(self) -> None:
        """Form all merged rows and count, without writing."""
        self.tally = Tally()
        for start, rows in self.blocks():
            self.merged(rows, start, self.tally)


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def merge_targets(survey: Survey, active: tuple[tuple[str, float], ...]) -> list[Target]:
    """Return the tensors to write, and check that each can be written.

    Args:
        survey: Of the model.
        active: `(adapter, weight)` of what is folded.

    Raises:
        StateError: An adapter is not whole in this model, or holds NaN or Inf.
        LayerError: A weight cannot be written, or shares a part of its memory with another.
    """
    found: dict[tuple[int, str], Target] = {}
    for adapter, weight in active:
        for path, module, entry in whole_adapter(survey, adapter, "merge"):
            holder = Holder(joined(path, entry.param), module, entry.param)
            target = found.setdefault((id(module), entry.param), Target(holder))
            _add_entry(target, entry, weight)
    targets = list(found.values())
    for target in targets:
        _check_weight(target)
        for module, param in survey.holders(target.weight):
            other = Holder(joined(survey.paths[id(module)], param), module, param)
            if other != target.holder:
                target.sharers.append(other)
    _refuse_overlaps(survey, targets)
    return _once_if_tied(targets)


def _add_entry(target: Target, entry: Entry, weight: float) -> None:
    module = target.holder.module
    for role in entry.names:
        tensor = entry.tensor(module, role)
        if how := sharded_by(tensor):
            raise LayerError(
                f"merge {entry.adapter!r}",
                f"{role} of site {target.name!r} is sharded by {how}",
                "Merge into an unsharded copy",
            )
        if tensor.device.type != "meta" and not all_finite(tensor):
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise StateError(
                f"merge {entry.adapter!r}",
                f"{role} of site {target.name!r} is NaN or Inf in {n_bad} places",
                "The adapter is broken; merge another checkpoint of it",
            )
    if entry.spec is None:
        target.copies.append((entry.tensor(module, "T"), weight))
        return
    for A, B, sign in entry.pairs(module._parameters):
        target.terms.append(Term(entry.spec, A.detach(), B.detach(), weight * sign))


def _check_weight(target: Target) -> None:
    weight = target.weight
    asked = f"merge into {target.name!r}"
    shape = target.terms[0].spec.weight_shape if target.terms else target.copies[0][0].shape
    if weight.device.type == "meta":
        raise LayerError(asked, "the weight is on the meta device", "Load the base weights first")
    if sharded_by(weight) or type(weight) is not nn.Parameter:
        found = sharded_by(weight) or f"a {type(weight).__name__}"
        raise LayerError(
            asked, f"the weight is {found}", "Merge into an unsharded copy in plain floating point"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise LayerError(
            asked, f"the weight is quantized ({weight.dtype})", "Merge into the base in 16 bits"
        )
    if tuple(weight.shape) != tuple(shape):
        raise LayerError(
            asked,
            f"the weight has shape {tuple(weight.shape)}, and the adapter is for {tuple(shape)}: "
            "it is sharded or was replaced",
            "Merge into an unsharded copy (FSDP1: within summon_full_params(model))",
        )
    if not weight.is_contiguous():
        raise LayerError(asked, "the weight is not contiguous", "Call .contiguous() on it first")
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise LayerError(
            asked,
            "the weight was made in inference mode, outside of which nobody may write it",
            "Call merge within torch.inference_mode(), or load the base outside of it",
        )


def _refuse_overlaps(survey: Survey, targets: list[Target]) -> None:
    """Refuse to write a tensor of which another holds a part; who holds the whole is tied to it."""
    written = {memory_of(target.weight): target.name for target in targets}
    spans = []
    for name, tensor in survey.parameters():
        if isinstance(memory := memory_of(tensor), tuple):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            n_bytes = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
            spans.append((memory[0], memory[0] + n_bytes, name, memory))
    spans.sort(key=lambda span: span[:3])
    last = spans[:1]  # of those that begin before: if any overlaps, the one that ends last does
    for two in spans:
        one, last = last[0], [max(*last, two, key=lambda span: span[1])]
        if two[0] < one[1] and one[3] != two[3] and not written.keys().isdisjoint((one[3], two[3])):
            asked, other = (one, two) if one[3] in written else (two, one)
            raise LayerError(
                f"merge into {written[asked[3]]!r}",
                f"a part of its memory is also a part of {other[2]!r}, which would change",
                "Give one of them memory of its own: layer.weight = "
                "torch.nn.Parameter(layer.weight.detach().clone())",
            )


def _once_if_tied(targets: list[Target]) -> list[Target]:
    """A tied tensor that gets the same trained copy under all its names is written once, tied."""
    by_holder = {(id(t.holder.module), t.holder.param): t for t in targets}
    kept, written = [], set()
    for target in targets:
        same = [by_holder.get((id(h.module), h.param)) for h in target.sharers]
        copies = [(id(t), weight) for t, weight in target.copies]
        alike = not target.terms and all(
            t is not None and not t.terms and [(id(c), w) for c, w in t.copies] == copies
            for t in same
        )
        if alike and same:
            target.sharers = []
            if tuple(copies) in written:
                continue
            written.add(tuple(copies))
        kept.append(target)
    return kept


def check_results(targets: list[Target], min_kept: float | None, undo: bool) -> None:
    """Refuse, before any change, what must not be written.

    Most merges can be judged without being carried out: where no delta can come near the largest
    value of the dtype, the merged weight is finite if W is, which is asked now only where a merge
    cannot be taken back when it comes to light. The others are formed once without being written.

    Raises:
        LayerError: The base or the merged weight is not finite, or `min_kept` is missed.
    """
    for target in targets:
        if target.narrow and not undo and not all_finite(target.weight):
            raise not_finite(target, target.weight)
        if (min_kept is not None and target.narrow) or target.may_overflow():
            target.rehearse()
            if target.tally is not None and not target.tally.finite:
                raise not_finite(target, target.weight)
    if min_kept is None:
        return
    if not 0 <= min_kept <= 1:
        asked, found = f"merge with min_kept={min_kept}", "it is a share of a delta"
        raise LayerError(asked, found, "Give a number from 0 to 1")
    kept = {t.name: t.tally.kept for t in targets if t.narrow and t.tally is not None}
    missed = [name for name, share in kept.items() if not share >= min_kept]
    if missed:
        worst = min(missed, key=lambda name: kept[name])
        raise LayerError(
            f"merge with min_kept={min_kept}",
            f"rounding would leave {kept[worst]:.3f} of the delta of {worst!r}, and less than "
            f"asked at {len(missed)} of {len(targets)} tensors",
            "Stay unmerged, or merge in float32",
        )


def not_finite(target: Target, base: Tensor) -> LayerError:
    """Return the error of a merged weight with NaN or Inf, whose base was `base`."""
    asked = f"merge into {target.name!r}"
    if not all_finite(base):
        return LayerError(asked, "the base holds NaN or Inf", "Check the base")
    found = f"the merged weight overflows {target.weight.dtype}"
    return LayerError(asked, found, "Merge in a wider dtype")

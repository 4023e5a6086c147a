"""One tensor that a merge writes: why it may not, what it becomes, and how that takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.functional.fold import (
    Delta,
    Tally,
    fold_rows,
    mix_copies,
    rows_at_once,
    with_tally,
)
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.core.functional.torch_inside import version_of
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import dense, reason_against, weight_kind
from lora_inject.core.layers.survey import Holder, memory_of
from lora_inject.core.layers.weight_kinds import (
    UNKNOWN,
    Verb,
    WeightKind,
    is_quantized,
    sharded_by,
    whole,
)
from lora_inject.core.model.undo import Put
from lora_inject.errors import LayerError, StateError

Into = torch.dtype | Literal["same"] | None
"""What packed weights become: plain floats, their own format, or None: they are refused."""


class Copy(NamedTuple):
    """A trained copy that stands for W, or for some of its rows."""

    values: Tensor
    weight: float
    rows: tuple[int, ...] | None  # None for all


@dataclass
class Target:
    """One tensor of the base, and what of the adapters is added to it or put in its place."""

    holder: Holder
    into: Into
    entries: list[tuple[Entry, float]] = field(default_factory=list)
    sharers: list[Holder] = field(default_factory=list)  # who else holds it, and must not see it
    alike: list[Holder] = field(default_factory=list)  # who else holds it, and gets the same
    tally: Tally | None = None  # what rounding left, where it was counted

    def __post_init__(self) -> None:
        self.packed = is_quantized(self.weight)
        self.kind = weight_kind(self.holder.module, self.weight) if self.packed else UNKNOWN
        self.becomes_plain = self.packed and isinstance(self.into, torch.dtype)
        self.replaces_layer = self.becomes_plain and self.kind.replaces_layer(
            self.holder.module, self.weight
        )

    @property
    def name(self) -> str:
        """Name of the tensor, before."""
        return self.holder.name

    @property
    def weight(self) -> nn.Parameter:
        """What stands there."""
        return self.holder.tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the merged values."""
        if not self.packed:
            return self.weight.dtype
        return self.into if isinstance(self.into, torch.dtype) else torch.float32

    @property
    def versions(self) -> list[int]:
        """What changes with the values of W and of its adapters."""
        tensors = [t for e, _ in self.entries for t in e.tensors(self.holder.module).values()]
        return [version_of(tensor) for tensor in (self.weight, *tensors)]

    # ------------------------------------------------------------------------------- refusals

    def check(self, kinds: Sequence[WeightKind], *, written: bool = True) -> None:
        """Raise if nothing can be added to it; what is not written may be a DTensor.

        The kinds are those of `loaded_kinds`, which is asked once for many tensors.
        """
        weight, gathered = self.weight, not written and hasattr(self.weight, "full_tensor")
        if weight.is_meta:
            raise self._refused("the weight is on the meta device", "Load the base weights first")
        if not gathered and (how := sharded_by(weight)):
            raise self._refused(f"the weight is sharded by {how}", "Merge into an unsharded copy")
        if self.packed:
            self._check_packed(written=written)
        else:
            self._check_plain(kinds, written=written)
        if not gathered:
            self._check_finite()

    def _refused(self, problem: str, remedy: str) -> LayerError:
        return LayerError(f"merge into {self.name!r}", problem, remedy)

    def _check_plain(self, kinds: Sequence[WeightKind], *, written: bool) -> None:
        weight = self.weight
        reason = reason_against("merge", self.holder.module, weight, kinds)
        if reason is not None:
            raise self._refused(*reason)
        if written and weight.is_inference() and not torch.is_inference_mode_enabled():
            problem = "the weight was made in inference mode, outside of which nobody may write it"
            remedy = "Call merge within torch.inference_mode(), or load the base outside of it"
            raise self._refused(problem, remedy)
        for due in (entry.spec.weight_shape for entry, _ in self.entries if entry.spec is not None):
            if tuple(weight.shape) != due:
                problem = (
                    f"the weight has shape {tuple(weight.shape)}, and the adapter is for {due}"
                )
                remedy = "Merge into an unsharded copy (within summon_full_params(model), where "
                remedy += "there is one)"
                raise self._refused(f"{problem}: it is sharded or was replaced", remedy)

    def _check_packed(self, *, written: bool) -> None:
        module, weight = self.holder.module, self.weight
        problem = f"the weight is quantized ({type(weight).__name__}, {weight.dtype})"
        verb: Verb = "requantize" if self.into == "same" else "dequantize"
        if (reason := self.kind.why_not(verb, module, weight)) is not None:
            raise self._refused(f"{problem}: {reason.found}", reason.remedy)
        if self.into is None:
            remedy = 'Write plain floats, merge(model, dequantize="bfloat16")'
            if self.kind.why_not("requantize", module, weight) is None:
                remedy += ", or its own format, merge(model, requantize=True)"
            raise self._refused(problem, remedy)
        if any(entry.spec is None for entry, _ in self.entries):
            raise self._refused("a trained copy stands for a quantized weight", "Leave it out")
        fixed = self.kind.why_not("replace", module, weight)
        if written and self.becomes_plain and fixed is not None:
            raise self._refused(*fixed)

    def _held(self) -> dict[str, Tensor]:
        """Return the adapters' tensors by their names in the module, whole."""
        held = {}
        for entry, _ in self.entries:
            for role, tensor in entry.tensors(self.holder.module).items():
                if not hasattr(tensor, "full_tensor") and (how := sharded_by(tensor)):
                    problem = f"{role} of site {self.name!r} is sharded by {how}"
                    remedy = "Merge into an unsharded copy"
                    raise LayerError(f"merge {entry.adapter!r}", problem, remedy)
                held[entry.names[role]] = whole(tensor)
        return held

    def _check_finite(self) -> None:
        held = self._held()
        if all_finite(*held.values()):
            return
        for entry, _ in self.entries:
            for role, name in entry.names.items():
                if not all_finite(values := held[name]):
                    n = int((~torch.isfinite(values)).sum())
                    problem = f"{role} of site {self.name!r} is NaN or Inf in {n} places"
                    remedy = "The adapter is broken; merge another checkpoint of it"
                    raise StateError(f"merge {entry.adapter!r}", problem, remedy)

    # --------------------------------------------------------------------------------- values

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the merged values, finite, in memory of their own; `tally` is counted anew.

        What is packed again is the packed Parameter.
        """
        values = dense(self.holder.module, self.weight) if self.packed else whole(self.weight)
        with torch.inference_mode(self.weight.is_inference()):  # else nobody could train on it
            merged = torch.empty(values.shape, dtype=self.dtype, device=values.device)
        self.tally = Tally() if self.entries and self.dtype.itemsize <= 2 else None
        self._fold(values, merged, self.tally)
        counted = self.tally is not None and self.tally.finite  # which spares a pass
        if not counted and not all_finite(merged):
            self._check_finite()  # NaN or Inf of an adapter reaches every sum that it is in
            if not all_finite(values):
                raise self._refused("the base holds NaN or Inf", "Check the base")
            problem = f"the merged weight overflows {self.dtype}"
            raise self._refused(problem, "Merge in a wider dtype")
        if not (self.packed and self.into == "same"):
            return merged
        again = self.kind.packed(self.holder.module, self.weight, merged)
        self.tally = Tally()
        self.tally.count(values, merged - values, merged - dense(self.holder.module, again))
        return again

    def _fold(self, values: Tensor, merged: Tensor, tally: Tally | None) -> None:
        """Write W with all that the adapters do to it, block by block."""
        held = self._held()
        sites = [(entry, w) for entry, w in self.entries if entry.spec is not None]
        spec = sites[0][0].spec if sites else None
        shape = spec.matrix_shape if spec else (values.shape[0] if values.dim() else 1, -1)
        base, out = values.reshape(shape), merged.view(shape)
        delta, copies = self._delta(sites, held, base), self._copies(held, values)
        if not copies:
            fold_rows(base, 0, delta, tally, out)
            return
        step = rows_at_once(base)
        for start in range(0, len(base), step):
            rows, written = base[start : start + step], out[start : start + step]
            wide = rows.to(delta.dtype)
            mixed = [(_rows_of(copy, wide, start, base.shape), copy.weight) for copy in copies]
            wanted = delta.add_(mix_copies(rows, mixed, delta.dtype), start)
            written.copy_(wanted)
            if tally is not None:
                tally.count(wide, wanted - wide, wanted - written.to(wide.dtype))

    def _delta(
        self, sites: list[tuple[Entry, float]], held: dict[str, Tensor], base: Tensor
    ) -> Delta:
        terms = [patch for entry, weight in sites for patch in entry.patches(held, weight)]
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        gain = next(filter(None, (entry.gain(held) for entry, _ in sites)), None)
        delta = Delta(terms, wide, gain)
        delta.norms_of([(0, base)])
        return delta

    def _copies(self, held: dict[str, Tensor], values: Tensor) -> list[Copy]:
        copies = []
        for entry, weight in self.entries:
            if entry.spec is None:
                copy = held[entry.mark]
                if entry.scale is not None:
                    copy = values.to(copy.dtype) + entry.scale * copy
                copies.append(Copy(copy, weight, entry.rows))
        return copies

    # --------------------------------------------------------------------------- in its place

    def put(self, values: Tensor, done: list[Put], *, keep: bool) -> None:
        """Put merged values in the place of the weight; what takes that back is noted first."""
        module, param, before = self.holder.module, self.holder.param, self.weight
        if self.packed:
            parameter = values if isinstance(values, nn.Parameter) else _frozen(values)
            layer = self.kind.write(module, param, parameter)
            if self.replaces_layer:
                name = self.name.removesuffix(param) + "weight"
                self.holder = Holder(name, module, "weight")
            done.append(Put(self.holder, self.weight, before, layer=layer))
        elif left := [one for one in self.sharers if memory_of(one.tensor) == memory_of(before)]:
            own = _frozen(values)
            done.append(Put(self.holder, own, before, partner=left[-1]))
            module._parameters[param] = own
        else:
            for holder in (self.holder, *self.alike):
                parameter = holder.tensor
                done.append(Put(holder, parameter, parameter, parameter.data if keep else None))
                parameter.data = values

    def report(self) -> TensorReport:
        """Return what became of it."""
        action = "folded" if any(e.spec is not None for e, _ in self.entries) else "replaced"
        action = "untied" if self.sharers else action if self.entries else "dequantized"
        dtype = str(self.weight.dtype).removeprefix("torch.")
        report = TensorReport(self.name, action, dtype, tuple(self.weight.shape))
        return with_tally(report, self.tally)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _rows_of(copy: Copy, wide: Tensor, start: int, shape: torch.Size) -> Tensor:
    """Return some rows of a trained copy; a copy of other rows has those of W there."""
    if copy.rows is None:
        return copy.values.reshape(shape)[start : start + len(wide)]
    mine = wide.clone()
    for at, row in enumerate(copy.rows):
        if start <= row < start + len(wide):
            mine[row - start] = copy.values[at]
    return mine

"""The tensors that a merge writes, their updates, and the reasons to refuse a merge.

Below, `untied` is the name of each tensor that gets memory of its own, to the name of another
tensor that it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.functional.fold import Delta, Tally, fold_rows, mix_copies, rows_at_once
from lora_inject.core.functional.gain import Gain
from lora_inject.core.layers.attached import Entry, refuse_mixed
from lora_inject.core.layers.packed_weights import dense, packed_weight, reason_against, weight_kind
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.layers.weight_kinds import UNKNOWN, Verb, WeightKind
from lora_inject.core.model.guards import before, holder_of_shards
from lora_inject.core.model.whole import whole_adapter
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError, StateError, check_type

Into = torch.dtype | Literal["same"] | None
"""Target of a quantized weight: a plain dtype, its own format, or None for an error."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(dequantize: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name."""
    name = str(dequantize).removeprefix("torch.")
    if name not in DTYPES:
        remedy = f"Use one of {list(DTYPES)}"
        raise LayerError(f"dequantize={name!r}", "the dtype is not known", remedy)
    return DTYPES[name]


@dataclass
class Target:
    """One tensor to write."""

    holder: Holder  # where it stands
    terms: list[Patch] = field(default_factory=list)  # low-rank updates to fold in
    gain: Gain | None = None  # what multiplies the outputs of their sum with W
    # Trained copies, each with its weight and the rows that it is of, None for all.
    copies: list[tuple[Tensor, float, tuple[int, ...] | None]] = field(default_factory=list)
    # Who else holds the same memory, and must not see the merge.
    sharers: list[Holder] = field(default_factory=list)
    tally: Tally | None = None  # what rounding left, where it was counted
    into: Into = None  # what a quantized weight becomes

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.holder.name

    @property
    def changes(self) -> bool:
        """Whether an adapter takes part: a quantized weight may be unpacked without one."""
        return bool(self.terms or self.copies)

    @property
    def weight(self) -> nn.Parameter:
        """The tensor."""
        return self.holder.tensor

    @property
    def due_shape(self) -> tuple[int, ...]:
        """The shape that the adapters say it has."""
        if self.terms:
            return self.terms[0].spec.weight_shape
        copy, _, rows = self.copies[0]
        return tuple(self.weight.shape if rows is not None else copy.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as one matrix."""
        if self.terms:
            return self.terms[0].spec.matrix_shape
        return (self.weight.shape[0] if self.weight.dim() and not self.into else 1, -1)

    @property
    def kind(self) -> WeightKind:
        """How the layer holds a quantized weight."""
        return weight_kind(self.holder.module, self.weight)

    @property
    def becomes_plain(self) -> bool:
        """Whether a quantized weight is written as plain floats."""
        return isinstance(self.into, torch.dtype)

    @property
    def replaces_layer(self) -> bool:
        """Whether the layer, whose weight is quantized, is written as a plain one."""
        return self.becomes_plain and self.kind.replaces_layer(self.holder.module, self.weight)

    def check_replaceable(self) -> None:
        """Raise if plain values cannot be the weight of the layer itself."""
        if self.becomes_plain:
            reason = self.kind.why_not("replace", self.holder.module, self.weight)
            if reason is not None:
                raise LayerError(f"merge into {self.name!r}", *reason)

    @property
    def written(self) -> Holder:
        """Where the weight stands once it is written."""
        name, module, param = self.holder
        name = name.removesuffix(param) + "weight"
        return Holder(name, module, "weight") if self.replaces_layer else self.holder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the merged values."""
        if self.into is None:
            return self.weight.dtype
        return torch.float32 if self.into == "same" else self.into

    @property
    def narrow(self) -> bool:
        """Whether the result has 16 bits or less, which may lose a part of a delta."""
        return self.into == "same" or self.dtype.itemsize <= 2

    @cached_property
    def delta(self) -> Delta:
        """The terms, prepared for all blocks."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        delta = Delta(self.terms, wide, self.gain)
        if self.gain is not None:
            delta.norms_of(self.blocks())
        return delta

    def may_overflow(self) -> bool:
        """Whether the largest possible value of a delta is near the largest of the dtype."""
        if self.gain is not None:
            return True
        norm = torch.linalg.vector_norm
        bound = sum(
            abs(t.spec.scale * t.weight) * float(norm(t.A)) * float(norm(t.B)) for t in self.terms
        )
        return not bound <= 1e-6 * torch.finfo(self.dtype).max

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of the weight matrix, views in the storage of a plain one."""
        return self._split(self._values())

    def _split(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        matrix = values.view(self.matrix_shape)
        step = rows_at_once(matrix)
        for start in range(0, len(matrix), step):
            yield start, matrix[start : start + step]

    def _values(self) -> Tensor:
        weight = self.weight
        return weight.detach() if self.into is None else dense(self.holder.module, weight)

    def merged(
        self, rows: Tensor, start: int, tally: Tally | None, out: Tensor | None = None
    ) -> Tensor:
        """Return some merged rows, possibly into `rows` itself."""
        if not self.copies:
            return fold_rows(rows, start, self.delta, tally, out)
        wide = self.delta.dtype
        before = rows.to(wide, copy=True)
        wanted = self.delta.add_(mix_copies(rows, self._copied(before, start), wide), start)
        merged = wanted.to(rows.dtype) if out is None else out.copy_(wanted)
        if tally is not None:
            tally.count(before, wanted - before, wanted - merged.to(wide))
        return merged

    def _copied(self, before: Tensor, start: int) -> list[tuple[Tensor, float]]:
        """Return some rows of each trained copy; a copy of other rows has those of before."""
        mixed_copies, stop = [], start + before.shape[0]
        for copy, weight, some in self.copies:
            if some is None:
                mine = copy.reshape(self.matrix_shape)[start:stop]
            else:
                mine = before.clone()
                for at, row in enumerate(some):
                    if start <= row < stop:
                        mine[row - start] = copy.detach()[at]
            mixed_copies.append((mine, weight))
        return mixed_copies

    def rehearse(self) -> None:
        """Form all merged rows and count, without writing."""
        self.tally = Tally()
        if self.into is not None:
            self.replacement(self.tally)
            return
        for start, rows in self.blocks():
            self.merged(rows, start, self.tally)

    @torch.no_grad()
    def formed(self, tally: Tally | None = None) -> Tensor:
        """Return all merged values, finite, a new tensor in the shape that the layer states."""
        values = self._values()
        formed = torch.empty(values.shape, dtype=self.dtype, device=values.device)
        out = formed.view(self.matrix_shape)
        for start, rows in self._split(values):
            self.merged(rows, start, tally, out[start : start + len(rows)])
        if not all_finite(formed):
            raise not_finite(self, values)
        return formed

    def counted_in(self, kept: dict[str, float] | None) -> Tensor:
        """Return all merged values; note in `kept` the share of the delta that rounding kept."""
        tally = Tally() if kept is not None and self.narrow else None
        formed = self.formed(tally)
        if tally is not None and kept is not None:
            kept[self.name] = tally.kept
        return formed

    def replacement(self, tally: Tally | None) -> nn.Parameter:
        """Return the replacement of a quantized weight."""
        values = self.formed(None if self.into == "same" else tally)
        if self.into != "same":
            return nn.Parameter(values, requires_grad=False)
        weight = self.kind.packed(self.holder.module, self.weight, values)
        if tally is not None:
            before, now = self._values(), dense(self.holder.module, weight)
            tally.count(before, values - before, values - now)
        return weight


def merge_targets(
    survey: Survey, active: Iterable[tuple[str, float]], into: Into = None
) -> list[Target]:
    """Return the targets to write to fold `(adapter, weight)` pairs in, checked.

    `into` is for quantized weights; with a dtype those without an adapter are targets as well.
    """
    before("read", survey)
    targets: dict[Holder, Target] = {}
    entries: dict[Holder, list[tuple[Entry, float]]] = {}
    for adapter, weight in active:
        for path, module, entry in whole_adapter(survey, adapter, "merge"):
            holder = Holder(joined(path, entry.param), module, entry.param)
            add_entry(targets.setdefault(holder, Target(holder)), entry, weight)
            entries.setdefault(holder, []).append((entry, weight))
    for taking in entries.values():
        refuse_mixed(taking)
    for holder in _quantized_weights(survey) if isinstance(into, torch.dtype) else ():
        targets.setdefault(holder, Target(holder))
    for target in targets.values():
        for reason in _reasons_against(target, into):
            raise LayerError(f"merge into {target.name!r}", *reason)
        target.into = into if is_quantized(target.weight) else None
        target.sharers = [one for one in survey.sharing(target.weight) if one != target.holder]
    _refuse_overlaps(survey, {memory_of(t.weight): t.name for t in targets.values()})
    return _once_if_tied(targets)


def _quantized_weights(survey: Survey) -> Iterator[Holder]:
    """Yield every layer that holds a quantized weight of a library, and the weight's name."""
    for path, module in survey.modules:
        name = packed_weight(type(module))
        if name is not None and name in module._buffers:
            yield Holder(joined(path, name), module, name)
    for holder in survey.holders:
        weight = holder.tensor
        if is_quantized(weight):
            kind = weight_kind(holder.module, weight)
            if type(weight) is not nn.Parameter or kind is not UNKNOWN:
                yield holder


def add_entry(target: Target, entry: Entry, weight: float) -> None:
    """Add what an entry of an adapter does to a tensor, checked."""
    module, asked = target.holder.module, f"merge {entry.adapter!r}"
    for role, tensor in entry.tensors(module).items():
        what = f"{role} of site {target.name!r}"
        if how := holder_of_shards(tensor):
            problem = f"{what} is sharded by {how}"
            raise LayerError(asked, problem, "Merge into an unsharded copy")
        if not all_finite(tensor):
            problem = f"{what} is NaN or Inf in {int((~torch.isfinite(tensor)).sum())} places"
            remedy = "The adapter is broken; merge another checkpoint of it"
            raise StateError(asked, problem, remedy)
    if entry.spec is None:
        copy = entry.held(module)  # tied: the same under all names
        if entry.scale is not None:
            copy = target.weight.detach().to(copy.dtype) + entry.scale * copy.detach()
        target.copies.append((copy, weight, entry.rows))
        return
    held: Mapping[str, Any] = module._parameters
    target.gain = target.gain or entry.gain(held)
    detached = {name: held[name].detach() for name in entry.names.values()}
    target.terms += entry.patches(detached, weight)


def _reasons_against(target: Target, into: Into) -> Iterator[tuple[str, str]]:
    """Yield why a tensor cannot be written, and what to do."""
    weight = target.weight
    if weight.device.type == "meta":
        yield "the weight is on the meta device", "Load the base weights first"
    if how := holder_of_shards(weight):
        yield f"the weight is sharded by {how}", "Merge into an unsharded copy"
    if is_quantized(weight):
        yield from _reasons_of_quantized(target, into)
    else:
        yield from _reasons_of_plain(target)


def _reasons_of_plain(target: Target) -> Iterator[tuple[str, str]]:
    """Yield why nothing can be added to a plain weight where it stands."""
    weight = target.weight
    if (reason := reason_against("merge", target.holder.module, weight)) is not None:
        yield reason
    if tuple(weight.shape) != target.due_shape:
        problem = f"the weight has shape {tuple(weight.shape)}, and the adapter is for "
        remedy = (
            "Merge into an unsharded copy (within summon_full_params(model), where there is one)"
        )
        yield f"{problem}{target.due_shape}: it is sharded or was replaced", remedy
    if not weight.is_contiguous():
        remedy = "Make it so first: model.to(memory_format=torch.contiguous_format), or "
        yield "the weight is not contiguous", remedy + "weight.data = weight.data.contiguous()"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        problem = "the weight was made in inference mode, outside of which nobody may write it"
        remedy = "Call merge within torch.inference_mode(), or load the base outside of it"
        yield problem, remedy


def _reasons_of_quantized(target: Target, into: Into) -> Iterator[tuple[str, str]]:
    module, weight, kind = target.holder.module, target.weight, target.kind
    verb: Verb = "requantize" if into == "same" else "dequantize"
    problem = f"the weight is quantized ({type(weight).__name__}, {weight.dtype})"
    if (reason := kind.why_not(verb, module, weight)) is not None:
        yield f"{problem}: {reason.found}", reason.remedy
    if into is None:
        remedy = 'Write plain floats, merge(model, dequantize="bfloat16")'
        if kind.why_not("requantize", module, weight) is None:
            remedy += ", or its own format, merge(model, requantize=True)"
        yield problem, remedy
    if target.copies:
        yield "a trained copy stands for a quantized weight", "Leave it out"


def _once_if_tied(targets: Mapping[Holder, Target]) -> list[Target]:
    """A tied tensor that gets the same trained copy under all its names is written once, tied."""
    # What goes into each: trained copies alone, else nothing that another could be equal to.
    contents = {
        holder: None if target.terms else tuple((id(t), weight) for t, weight, _ in target.copies)
        for holder, target in targets.items()
    }
    kept: list[Target] = []
    written: set[Holder] = set()
    for holder, target in targets.items():
        own = contents[holder]
        if own and target.sharers and all(contents.get(h) == own for h in target.sharers):
            written.update(target.sharers)
            target.sharers = []
        if holder not in written:
            kept.append(target)
    return kept


def check_results(targets: list[Target], min_kept: float | None, undo: bool) -> None:
    """Refuse, before any change, results that must not be written.

    Most merges can be checked without forming them. If no delta can come near the largest value of
    the dtype, the merged weight is finite if W is. This is checked now only if the merge cannot be
    undone later. All other targets are formed once without being written.
    """
    for target in targets:
        if target.narrow and not undo and not target.into and not all_finite(target.weight):
            raise not_finite(target, target.weight)
        counted = min_kept is not None and target.narrow and target.changes
        if counted or target.may_overflow():
            target.rehearse()
            if target.tally is not None and not target.tally.finite:
                raise not_finite(target, target.weight)
    if min_kept is not None:
        _check_kept(targets, min_kept)


def check_min_kept(min_kept: float | None) -> None:
    """Check the smallest share of a delta that rounding may leave."""
    if min_kept is None:
        return
    check_type("merge, min_kept", min_kept, Real, "Give a number from 0 to 1")
    if not 0 <= min_kept <= 1:
        asked = f"merge with min_kept={min_kept}"
        raise LayerError(asked, "it is a share of a delta", "Give a number from 0 to 1")


def _check_kept(targets: list[Target], min_kept: float) -> None:
    """Refuse a merge of which rounding would leave less than was asked for."""
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
    problem = f"the merged weight overflows {target.dtype}"
    return LayerError(asked, problem, "Merge in a wider dtype")


# Tensors that share memory ----------------------------------------------------------------------


def _refuse_overlaps(survey: Survey, written: Mapping[Hashable, str]) -> None:
    """Refuse to write a tensor of which another holds a part; who holds the whole is tied to it.

    In the order of their first bytes, a tensor can overlap one before it only if it overlaps that
    of these which ends last.
    """
    spans = sorted(_spans(survey), key=lambda span: span[:3])
    last = spans[:1]
    for two in spans:
        one, last = last[0], [max(*last, two, key=lambda span: span[1])]
        overlap = two.start < one.stop and one.memory != two.memory
        if overlap and not written.keys().isdisjoint((one.memory, two.memory)):
            asked, other = (one, two) if one.memory in written else (two, one)
            raise LayerError(
                f"merge into {written[asked.memory]!r}",
                f"a part of its memory is also a part of {other.name!r}, which would change",
                "Give one of them memory of its own: layer.weight = "
                "torch.nn.Parameter(layer.weight.detach().clone())",
            )


class _Span(NamedTuple):
    """The bytes of a tensor."""

    start: int
    stop: int
    name: str
    memory: Hashable


def _spans(survey: Survey) -> Iterator[_Span]:
    """Yield the bytes of each base parameter that has memory, and of each buffer.

    A buffer is tied to nothing: it would not be untied.
    """
    for holder in survey.holders:
        memory = memory_of(holder.tensor)
        if isinstance(memory, tuple):
            yield _span(holder.name, holder.tensor, memory)
    for path, module in survey.modules:
        for key, buffer in module._buffers.items():
            if type(buffer) is Tensor and not buffer.is_meta and buffer.data_ptr():
                name = joined(path, key)
                yield _span(name, buffer, (buffer.data_ptr(), name))


def _span(name: str, tensor: Tensor, memory: Hashable) -> _Span:
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    n_elements = 1 + sum((n - 1) * step for n, step in steps)
    return _Span(start, start + n_elements * tensor.element_size(), name, memory)


def check_ties(survey: Survey, untied: Mapping[str, str], eject: bool) -> None:
    """Refuse to untie where the model computes or loads something else when it is untied."""
    if not untied:
        return
    name, sharer = next(iter(untied.items()))
    asked = f"merge into {name!r}"
    for cls in {type(module): None for _, module in survey.modules}:
        if _reads_tie_flag(cls):
            raise LayerError(
                asked,
                f"its tensor is tied, and {cls.__name__} scales its output by whether "
                "config.tie_word_embeddings says so: untied it would be another model",
                "Stay unmerged, or leave this site out of the adapter",
            )
    if eject and not tied_configs(survey):
        raise LayerError(
            f"{asked} with eject=True",
            f"its tensor is also that of {sharer!r} and would be untied, and no "
            "config of the model says so: code that ties the two, when a saved state dict is "
            "loaded, would lose one of them",
            "Where no code ties them any more, call merge(model) and eject(model)",
        )


def _reads_tie_flag(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    if not inspect.isfunction(forward):  # a ScriptModule's is not
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


def tied_configs(survey: Survey) -> list[Any]:
    """Return every config inside that says that embeddings are tied."""
    pending: list[Any] = [m.config for _, m in survey.modules if hasattr(m, "config")]
    seen: set[int] = set()
    configs = []
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if getattr(config, "tie_word_embeddings", False):  # may be a default of the class
            configs.append(config)
        pending += [v for k, v in config.__dict__.items() if k.endswith("_config")]
    return configs


def refuse_new_ties(survey: Survey, untied: Mapping[str, str]) -> None:
    """Refuse where a class ties what was untied whatever its config says."""
    for path, module in survey.modules if untied else ():
        asks = getattr(module, "get_expanded_tied_weights_keys", None)
        for pair in asks(all_submodels=False).items() if callable(asks) else ():
            for name in untied.keys() & {joined(path, key) for key in pair}:
                raise LayerError(
                    f"merge into {name!r}",
                    f"{type(module).__name__} ties it when it is loaded, whatever its config says",
                    "Stay unmerged, or leave this site out of the adapter",
                )

"""The tensors that a merge writes, and the reasons to refuse a merge before anything is written."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.model.guards import before, holder_of_shards
from lora_inject.core.model.target import Target, not_finite
from lora_inject.core.model.whole import whole_adapter
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError, StateError, check_type

if TYPE_CHECKING:
    from lora_inject.core.model.packed_target import Into


def merge_targets(
    survey: Survey, active: Iterable[tuple[str, float]], into: Into = None
) -> list[Target]:
    """Return the targets to write to fold `(adapter, weight)` pairs in, checked.

    `into` is what packed weights become; with a dtype those without an adapter are targets as well.
    """
    before("read", survey)
    targets: dict[Holder, Target] = {}
    entries: dict[Holder, list[tuple[Entry, float]]] = {}
    for adapter, weight in active:
        for path, module, entry in whole_adapter(survey, adapter, "merge"):
            holder = Holder(joined(path, entry.param), module, entry.param)
            if holder not in targets:
                targets[holder] = _target(holder, into)
            add_entry(targets[holder], entry, weight)
            entries.setdefault(holder, []).append((entry, weight))
    for holder, taking in entries.items():
        if targets[holder].gain is not None:
            from lora_inject.core.layers.gains import check_mixed

            check_mixed(taking)
    if isinstance(into, torch.dtype):
        from lora_inject.core.model.packed_target import packed_in

        for holder in packed_in(survey):
            targets.setdefault(holder, _target(holder, into))
    for target in targets.values():
        for reason in target.reasons():
            raise LayerError(f"merge into {target.name!r}", *reason)
        target.sharers = [one for one in survey.sharing(target.weight) if one != target.holder]
    _check_overlaps(survey, {memory_of(t.weight): t.name for t in targets.values()})
    return _once_if_tied(targets)


def _target(holder: Holder, into: Into) -> Target:
    """Return a tensor to write, of the class for how its layer holds it."""
    if not is_quantized(holder.tensor):
        return Target(holder)
    from lora_inject.core.model.packed_target import PackedTarget

    return PackedTarget(holder, into=into)


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
    if entry.variant.gained:
        from lora_inject.core.layers.gains import gain_of

        target.gain = target.gain or gain_of(entry, held)
    detached = {name: held[name].detach() for name in entry.names.values()}
    target.terms += entry.patches(detached, weight)


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
        plain = not is_quantized(target.weight)
        if target.narrow and not undo and plain and not all_finite(target.weight):
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


# Tensors that share memory ----------------------------------------------------------------------


def _check_overlaps(survey: Survey, written: Mapping[Hashable, str]) -> None:
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

"""The tensors that a merge writes, and the reasons to refuse a merge before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.gains import check_mixed, gain_of
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.plain_tensors import is_quantized, sharded_by
from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.model.merge_overlaps import check_overlaps
from lora_inject.core.model.merge_reasons import refuse_unwritable, refuse_values
from lora_inject.core.model.merge_shares import check_kept, check_min_kept
from lora_inject.core.model.merge_ties import once_if_tied
from lora_inject.core.model.packed_target import Into, PackedTarget, packed_in
from lora_inject.core.model.rehearsal import check_rehearsed
from lora_inject.core.model.target import Target
from lora_inject.core.roots.carried import whole_adapter
from lora_inject.core.spec.names import joined


def merge_targets(
    survey: Survey, active: Iterable[tuple[str, float]], into: Into = None
) -> list[Target]:
    """Return the targets to write to fold `(adapter, weight)` pairs in, checked.

    `into` is what packed weights become; with a dtype those without an adapter are targets as well.
    """
    for library in loaded_libraries():
        library.before_read(survey)
    targets: dict[Holder, Target] = {}
    entries: dict[Holder, list[tuple[Entry, float]]] = {}
    for adapter, weight in active:
        for path, module, entry in whole_adapter(survey, adapter, "merge"):
            holder = Holder(joined(path, entry.param), module, entry.param)
            if holder not in targets:
                targets[holder] = _target(holder, into)
            add_entry(targets[holder], entry, weight)
            entries.setdefault(holder, []).append((entry, weight))
    _check_gains(targets, entries)
    if isinstance(into, torch.dtype):
        for holder in packed_in(survey):
            targets.setdefault(holder, _target(holder, into))
    for target in targets.values():
        if not target.is_writable:
            refuse_unwritable(target)
        target.sharers = [one for one in survey.sharing(target.weight) if one != target.holder]
    return _without_shared_memory(survey, targets)


def _check_gains(
    targets: Mapping[Holder, Target], entries: Mapping[Holder, list[tuple[Entry, float]]]
) -> None:
    """Raise if an adapter with a gain is not alone on a tensor."""
    if any(target.gain is not None for target in targets.values()):
        for taking in entries.values():
            check_mixed(taking)


def _without_shared_memory(survey: Survey, targets: Mapping[Holder, Target]) -> list[Target]:
    """Return the targets, of tied tensors each once; raise if one shares a part of its memory."""
    if _may_overlap(survey):
        check_overlaps(survey, {memory_of(t.weight): t.name for t in targets.values()})
    if any(target.sharers for target in targets.values()):
        return once_if_tied(targets)
    return [*targets.values()]


def _target(holder: Holder, into: Into) -> Target:
    """Return a tensor to write, of the class for how its layer holds it."""
    if not is_quantized(holder.tensor):
        return Target(holder)
    return PackedTarget(holder, into=into)


def add_entry(target: Target, entry: Entry, weight: float) -> None:
    """Add what an entry of an adapter does to a tensor, checked."""
    module = target.holder.module
    for role, tensor in entry.tensors(module).items():
        if sharded_by(tensor) or not all_finite(tensor):
            refuse_values(tensor, f"{role} of site {target.name!r}", f"merge {entry.adapter!r}")
    if entry.spec is None:
        copy = entry.held(module)  # tied: the same under all names
        if entry.scale is not None:
            copy = target.weight.detach().to(copy.dtype) + entry.scale * copy.detach()
        target.copies.append((copy, weight, entry.rows))
        return
    held: Mapping[str, Any] = module._parameters
    if entry.gained:
        target.gain = target.gain or gain_of(entry, held)
    detached = {name: held[name].detach() for name in entry.names.values()}
    target.terms += entry.patches(detached, weight)


def check_results(targets: list[Target], min_kept: float | None, undo: bool) -> None:
    """Refuse, before any change, results that must not be written.

    Most merges can be checked without forming them. If no delta can come near the largest value of
    the dtype, the merged weight is finite if W is. This is checked now only if the merge cannot be
    undone later. All other targets are formed once without being written.
    """
    if min_kept is not None:
        check_min_kept(min_kept)
    for target in targets:
        plain = not is_quantized(target.weight)
        counted = min_kept is not None and target.narrow and target.changes
        unseen = target.narrow and not undo and plain and not all_finite(target.weight)
        if unseen or counted or target.may_overflow():
            check_rehearsed(target)
    if min_kept is not None:
        check_kept(targets, min_kept)


def _may_overlap(survey: Survey) -> bool:
    """Whether tensors may share memory without being one, which their storages tell quickly."""
    parameters = {memory_of(tensor): tensor for tensor in survey.tensors}
    held = [tensor for memory, tensor in parameters.items() if isinstance(memory, tuple)]
    buffers = (b for _, module in survey.modules for b in module._buffers.values())
    plain = [*held, *(b for b in buffers if type(b) is Tensor and not b.is_meta)]
    storages = [tensor.untyped_storage() for tensor in plain]
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
    return any(two[0] < one[1] for one, two in pairwise(spans))

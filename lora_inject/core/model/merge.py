"""Merge adapters into the weights of a model, or yield what a merge would write.

1. A merge writes to no weight's memory. It adds the delta to W in float32, rounds once, and puts
   the new values in the place of the old ones, which are kept: `unmerge` puts those back.
2. A tensor that others hold as well gets a Parameter of its own, unless all of them get the same.
3. What only the sum shows (NaN, `min_kept`) stops a merge in the middle: what was put is taken
   back. Without `undo` all sums are formed once before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_inject.core.functional.merge_report import MergeReport
from lora_inject.core.layers.attached import check_mixed
from lora_inject.core.layers.library import (
    claims,
    loaded_kinds,
    loaded_libraries,
    packed_weight,
    weight_kind,
)
from lora_inject.core.layers.selection import Mix
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.layers.weight_kinds import UNKNOWN, in_dtype, is_quantized, whole
from lora_inject.core.model.buffers import check_buffers
from lora_inject.core.model.eject import eject as take_off
from lora_inject.core.model.target import Into, Target
from lora_inject.core.model.ties import check_ties, refuse_untold, untie_rest
from lora_inject.core.model.training import trainable_tensors
from lora_inject.core.model.undo import Merged
from lora_inject.core.roots.root import (
    Injected,
    adapted_modules,
    alone,
    check_names,
    check_unmerged,
    whole_adapter,
)
from lora_inject.core.roots.selecting import weights_of
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError, StateError, check_type
from lora_inject.formats.checkpoint_names import as_on_disk

Weights = tuple[tuple[str, float], ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@alone
def merge(
    model: nn.Module,
    *,
    name: str | Mapping[str, float] | None = None,
    undo: bool = True,
    min_kept: float | None = None,
    eject: bool = False,
    dequantize: str | torch.dtype | None = None,
    requantize: bool = False,
) -> MergeReport:
    """Fold `scale * B @ A` of the active adapters into the frozen weights, rounding once.

    Quantized weights are merged into on request only: into their own format
    (`requantize`) or as plain floats (`dequantize`); the guide on quantized models lists which.

    Args:
        model: The injected root.
        name: Fold this adapter, or mix; by default what is active.
        undo: Keep the original values, so that `unmerge` restores them bit for bit. Without them a
            failure in the middle of writing cannot be undone; its error says so.
        min_kept: Raise if less than this share of a delta would be left after rounding to a 16-bit
            weight. The model is then as it was.
        eject: Eject all adapters afterwards, which leaves a plain model with merged weights.
        dequantize: `bfloat16`, `float16` or `float32`: make every quantized layer of the model a
            plain one of this dtype. Give the dtype that the rest of the model computes in.
        requantize: Quantize merged weights again, in their own format.

    Returns:
        The part of each delta that rounding or quantizing again kept, and in its notes the ties
        that were cut.

    Raises:
        StateError: Both `dequantize` and `requantize` are asked for, nothing is active,
            the model is merged already, or an adapter holds NaN or Inf or is not whole in this
            model.
        LayerError: A weight is quantized and neither option is given, or it cannot be dequantized;
            or it is on the meta device, sharded, or of inference mode; the merged weight would not
            be finite, `min_kept` is missed, or the model's class would tie again what must be
            untied. The model is as it was.
    """
    into = _into(dequantize, requantize=requantize)
    _check_min_kept(min_kept)
    survey = Injected(model, "merge")
    root = survey.root
    mix = _mix_to_fold(survey, name, "merge")
    targets = _targets(survey, mix, into)
    kinds = loaded_kinds()
    for target in targets:
        target.check(kinds)
    untied = {target.name: target.sharers[0].name for target in targets if target.sharers}
    untold = check_ties(survey, untied)
    if untold and eject:
        refuse_untold(untold, "merge with eject=True into")
    if not undo:
        for target in targets:
            target.merged()
        _check_kept(targets, min_kept)

    trainable = [p for *_, p in trainable_tensors(survey) if p.requires_grad]
    merged = Merged(root.selection.setting, trainable, undo, untold)
    whole_change = all_or_nothing((m for _, m in survey.modules), (root.selection, root))
    with whole_change, merged.taken_back():
        root.before_merge = merged
        root.selection.replace(Mix(), merged=dict(mix))
        for parameter in trainable:
            parameter.requires_grad_(False)
        # First: a layer that becomes a plain one may get its bias in another dtype.
        for target in sorted(targets, key=lambda target: not target.packed):
            target.put(target.merged(), merged.done, keep=undo)
        _check_kept(targets, min_kept)
        if untied:
            untie_rest(survey, untied, merged)
        if isinstance(into, torch.dtype) and any(target.packed for target in targets):
            _say_unpacked(survey, merged)
        if eject:
            take_off(model)
    reports = {target.name: target.report() for target in targets}
    notes = tuple(_untied_note(target) for target in targets if target.sharers)
    return MergeReport(mix, reports, len(targets), notes=notes)


def merged_weights(
    model: nn.Module,
    *,
    name: str | Mapping[str, float] | None = None,
    dequantize: str | torch.dtype | None = None,
    kept: dict[str, float] | None = None,
    names: Literal["model", "checkpoint"] = "model",
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the base's parameters as `merge` would leave them, without merging.

    What is sharded comes whole, gathered one tensor at a time: every process has to iterate to the
    end.

    Args:
        model: The injected root.
        name: Fold this adapter, or mix; by default what is active.
        dequantize: Yield quantized weights as plain ones of this dtype; see `merge`.
        kept: A dict that gets, by the name of each merged tensor of 16 bits, the share of its delta
            that rounding has kept: see `MergeReport`.
        names: `model`: the names and shapes of the base's state dict. `checkpoint`: those of its
            checkpoint on disk, as `save_pretrained` writes them and servers load them: each expert
            by itself, projections fused as there.

    Returns:
        Pairs of a parameter's name and its value: a new tensor where an adapter takes part, else
        the base's own, which is not to be written to. A tied tensor comes under each of its names.

    Raises:
        StateError: Nothing is active, the model is merged, an adapter is not whole in this model,
            or buffers of the base have moved in training; during iteration: a merge or an
            optimizer's step came between two tensors.
        LayerError: A weight cannot be merged into, as with `merge`; names of a checkpoint are asked
            for, and the model has no `save_pretrained` that tells them, or is quantized; during
            iteration: an adapter or a merged weight is not finite.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> [(key, tuple(tensor.shape)) for key, tensor in merged_weights(net)]
        [('0.weight', (6, 4)), ('0.bias', (6,))]
    """
    if names not in ("model", "checkpoint"):
        problem = f"it is {names!r}"
        raise StateError("merged_weights, names", problem, "Give 'model' or 'checkpoint'")
    survey = Injected(model, "merged_weights")
    check_buffers(survey, "merged_weights")
    into = _dtype(dequantize)
    mix = _mix_to_fold(survey, name, "merged_weights")
    if any(hasattr(tensor, "full_tensor") for tensor in survey.tensors):
        for holder in survey.holders:
            if into is not None or is_quantized(holder.tensor):
                asked = f"merged_weights, {holder.name!r}"
                problem = "the model is sharded, and its weights are quantized or to be dequantized"
                raise LayerError(asked, problem, "Call it on an unsharded copy")
    targets = _targets(survey, mix, into)
    kinds = loaded_kinds()
    for target in targets:
        target.check(kinds, written=False)
    weights = _folded(survey, targets, kept)
    if names == "model":
        return weights
    shapes = {}
    for holder in survey.holders:
        if is_quantized(holder.tensor):
            asked = f"merged_weights, names='checkpoint', {holder.name!r}"
            problem = "it is quantized, and has another form on disk"
            raise LayerError(asked, problem, "Leave names out")
        shapes[holder.name] = torch.empty_like(holder.tensor, device="meta")
    return iter(as_on_disk(survey.model, shapes, weights))


def _folded(
    survey: Injected, targets: list[Target], kept: dict[str, float] | None
) -> Iterator[tuple[str, Tensor]]:
    """Return each base parameter by its name, under all of them, as a merge would leave it.

    All are of the moment of the call: after a step or a merge between two tensors, a server would
    get those of two adapters.
    """
    selection = survey.root.selection
    begun = {id(target): target.versions for target in targets}
    by_name = {target.name: target for target in targets}
    tied = {memory_of(target.weight): target for target in targets if not target.sharers}
    plain = {id(target.holder.module): target for target in targets if target.becomes_plain}

    def merged(target: Target) -> Tensor:
        if selection.merged or target.versions != begun[id(target)]:
            problem = "it or its adapter has changed since the call"
            remedy = "Take all weights before the next step of an optimizer, merge or swap"
            raise StateError(f"merged_weights, {target.name!r}", problem, remedy)
        values = target.merged()
        if kept is not None and target.tally is not None:
            kept[target.name] = target.tally.kept
        return values

    def of_module(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        unpacked = plain.get(id(module))
        own: dict[str, Any] = survey.own[id(module)]
        if unpacked is not None and unpacked.replaces_layer:
            yield joined(path, "weight"), merged(unpacked)
            own = (
                {"bias": bias} if isinstance(bias := getattr(module, "bias", None), Tensor) else {}
            )
        for key, parameter in own.items():
            full = joined(path, key)
            target = by_name.get(full) or tied.get(memory_of(parameter))
            if target is not None:
                yield full, merged(target)
            elif unpacked is not None and key == "bias":
                yield full, in_dtype(parameter, unpacked.dtype).detach()
            else:
                yield full, whole(parameter)

    return (pair for path, module in survey.modules for pair in of_module(path, module))


# What a merge is asked for ----------------------------------------------------------------------


def _into(dequantize: str | torch.dtype | None, *, requantize: bool) -> Into:
    """Return what packed weights become, by the options of a merge."""
    if dequantize is not None and requantize:
        raise StateError("merge", "both dequantize and requantize are given", "Choose one of them")
    return "same" if requantize else _dtype(dequantize)


def _dtype(dequantize: str | torch.dtype | None) -> torch.dtype | None:
    if dequantize is None:
        return None
    name = str(dequantize).removeprefix("torch.")
    if name not in DTYPES:
        remedy = f"Use one of {list(DTYPES)}"
        raise LayerError(f"dequantize={name!r}", "the dtype is not known", remedy)
    return DTYPES[name]


def _check_min_kept(min_kept: float | None) -> None:
    if min_kept is None:
        return
    check_type("merge, min_kept", min_kept, Real, "Give a number from 0 to 1")
    if not 0 <= min_kept <= 1:
        asked = f"merge with min_kept={min_kept}"
        raise LayerError(asked, "it is a share of a delta", "Give a number from 0 to 1")


def _check_kept(targets: list[Target], min_kept: float | None) -> None:
    """Refuse a merge of which rounding would leave less than was asked for."""
    if min_kept is None:
        return
    kept = {target.name: target.tally.kept for target in targets if target.tally is not None}
    missed = [name for name, share in kept.items() if not share >= min_kept]
    if missed:
        worst = min(missed, key=lambda name: kept[name])
        problem = (
            f"rounding would leave {kept[worst]:.3f} of the delta of {worst!r}, and less than "
        )
        problem += f"asked at {len(missed)} of {len(targets)} tensors"
        remedy = "Stay unmerged, or merge in float32"
        raise LayerError(f"merge with min_kept={min_kept}", problem, remedy)


def _mix_to_fold(survey: Injected, name: str | Mapping[str, float] | None, verb: str) -> Weights:
    """Return what is to be folded, by default what is active, checked."""
    selection = survey.root.selection
    check_unmerged(verb, survey.root)
    selection.check_settled(verb, others=True)
    mix = dict(selection.setting.names) if name is None else weights_of(name, f"{verb}, name")
    check_names(survey.root, mix, verb)
    if not mix:
        remedy = f"Call activate(model, name), or {verb}(model, name=name)"
        raise StateError(verb, "no adapter is active", remedy)
    for _, _, attached in adapted_modules(survey):
        for folded in mix:
            attached.check_started(attached.entries(folded), verb)
    return tuple(mix.items())


def _targets(survey: Injected, mix: Weights, into: Into) -> list[Target]:
    """Return the tensors to write; with a dtype `into`, packed ones without an adapter as well."""
    for library in loaded_libraries():
        library.before_read(survey)
    targets: dict[tuple[int, str], Target] = {}
    for adapter, weight in mix:
        for path, module, entry in whole_adapter(survey, adapter, "merge"):
            place = id(module), entry.param
            if place not in targets:
                holder = Holder(joined(path, entry.param), module, entry.param)
                targets[place] = Target(holder, into)
            targets[place].entries.append((entry, weight))
    for target in targets.values():
        check_mixed(target.entries)
    if isinstance(into, torch.dtype):
        for holder in _packed_in(survey):
            targets.setdefault((id(holder.module), holder.param), Target(holder, into))
    together: dict[Hashable, list[Target]] = {}
    for target in targets.values():
        target.sharers = [one for one in survey.sharing(target.weight) if one != target.holder]
        together.setdefault(memory_of(target.weight), []).append(target)
    return [target for tied in together.values() for target in _once_if_alike(tied)]


def _once_if_alike(tied: list[Target]) -> list[Target]:
    """Return one target for a tied tensor all of whose holders get the same trained copy."""
    contents = {
        tuple(
            (id(entry.held(target.holder.module)) if entry.spec is None else id(entry), weight)
            for entry, weight in target.entries
        )
        for target in tied
    }
    first = tied[0]
    if len(contents) > 1 or len(tied) != len(first.sharers) + 1:
        return tied
    first.alike, first.sharers = first.sharers, []
    return [first]


def _packed_in(survey: Survey) -> Iterator[Holder]:
    """Yield the packed weights of libraries in a model."""
    for path, module in survey.modules:
        name = packed_weight(type(module))
        if name is not None and name in module._buffers:
            yield Holder(joined(path, name), module, name)
    for holder in survey.holders:
        weight = holder.tensor
        if is_quantized(weight):
            known = weight_kind(holder.module, weight) is not UNKNOWN
            if known or type(weight) is not nn.Parameter:
                yield holder


def _say_unpacked(survey: Survey, merged: Merged) -> None:
    """Remove from models and configs what is not true of unpacked weights."""
    for owner, attributes in claims(module for _, module in survey.modules):
        merged.said.append((owner, attributes))
        for name in attributes:
            delattr(owner, name)


def _untied_note(target: Target) -> str:
    others = ", ".join(repr(holder.name) for holder in target.sharers)
    return f"untied: {target.name!r} no longer is the tensor of {others}"

"""Folding what is active into the frozen weights, and restoring them bit for bit.

`unmerge` never subtracts: it puts back the values that `merge` kept. A weight whose memory another
module shares is untied first: the adapted module gets a tensor of its own, the others keep theirs.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.errors import StateError, check_type
from lora_inject.functional import MergeReport, Tally, TensorReport
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.state_dict import watch_loading
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import (
    Root,
    check_names,
    reach,
    refuse_merged,
    roots_of,
)
from lora_inject.model.dequantizing import Layer, dtype_of, replace_weight, say_again, say_plain
from lora_inject.model.eject import eject as take_off
from lora_inject.model.merge_targets import (
    Holder,
    Into,
    Target,
    check_results,
    merge_targets,
    not_finite,
)
from lora_inject.model.train import trainable_tensors
from lora_inject.model.untying import check_ties, refuse_new_ties, say_tied, tied_configs

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Undo:
    """What `unmerge` puts back for one tensor.

    Attributes:
        holder: Where it stands.
        merged: The Parameter that was written there.
        before: The Parameter that stood there.
        original: The values before as a matrix; None where `before` still has them or nothing is
            kept.
        partner: For an untied tensor: who else held its memory, and still does.
        layer: For a quantized weight that was replaced: the former state of the layer.
        n_kept: How many rows `original` holds.
        lost: Whether values were written over that nobody kept.
    """

    holder: Holder
    merged: nn.Parameter
    before: nn.Parameter
    original: Tensor | None = None
    partner: Holder | None = None
    layer: Layer | None = None
    n_kept: int = 0
    lost: bool = False

    def keep(self, rows: Tensor, start: int) -> None:
        """Copy some rows that are about to be changed, which come in order."""
        if self.original is not None:
            self.original[start : start + rows.shape[0]].copy_(rows)
            self.n_kept = start + rows.shape[0]
        self.lost = self.original is None and self.partner is None

    def restore(self) -> None:
        """Put the values, or the tie, back."""
        with torch.no_grad():
            if self.layer is not None:
                self.layer.put_back()
            elif self.partner is not None:
                there = self.partner.tensor
                if there.untyped_storage().data_ptr() != self.before.untyped_storage().data_ptr():
                    self.before.data = there.data  # the model was cast or moved meanwhile
                self.holder.module._parameters[self.holder.param] = self.before
            elif self.original is not None:
                matrix = self.merged.detach().view(self.original.shape)
                matrix[: self.n_kept].copy_(self.original[: self.n_kept])


@dataclass
class _Merged:
    """What the root keeps while merged; None for `undos` where nothing was kept."""

    was: State
    trainable: list[nn.Parameter]
    undos: list[_Undo] | None = None
    tie_flags: list[Any] = field(default_factory=list)
    said_quantized: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)


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

    Quantized weights are merged into on request only: bitsandbytes' NF4, FP4 and int8, and, to
    plain floats only, those of torchao and transformers' `FP8Linear`.

    Args:
        model: The injected root.
        name: Fold this adapter, or mix; by default what is active.
        undo: Keep the original values, so that `unmerge` restores them bit for bit. Without them a
            failure in the middle of writing cannot be taken back, and says so; Ctrl-C waits.
        min_kept: Refuse, before any change, where less than this share of a delta would survive
            the rounding to a 16-bit weight.
        eject: Take all adapters off afterwards, which leaves a plain model with merged weights.
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
            or it is on the meta device, sharded, of inference mode or shares
            a part of its memory, the merged weight would not be finite, `min_kept` is missed, or
            the model's class would tie again what has to be untied. Nothing was changed.
    """
    if min_kept is not None:
        check_type("merge, min_kept", min_kept, Real, "Give a number from 0 to 1")
    into = _into(dequantize, requantize)
    survey = Survey(model)
    root = root_of(survey)
    refuse_merged("merge", root.selection)
    root.selection.check_settled("merge", others=True)
    state = state_to_merge(survey, root.selection, name)
    targets = merge_targets(survey, state.active, into)
    check_ties(survey, _untied(targets), eject)
    check_results(targets, min_kept, undo)
    try:
        report = _merge(survey, root, state, targets, undo)
        if eject:
            take_off(model)
    except BaseException:
        if root.selection.merged is not None and root.undo.undos is not None:
            unmerge(model)
        raise
    return report


def _into(dequantize: str | torch.dtype | None, requantize: bool) -> Into:
    """Return the target of quantized weights."""
    if dequantize is not None and requantize:
        raise StateError("merge", "both dequantize and requantize are given", "Choose one of them")
    return "same" if requantize else None if dequantize is None else dtype_of(dequantize)


def _merge(
    survey: Survey, root: Root, state: State, targets: list[Target], undo: bool
) -> MergeReport:
    selection = root.selection
    with all_or_nothing((module for _, module in survey.modules), (selection, root)):
        trained = [p for *_, p in trainable_tensors(survey) if p.requires_grad]
        kept = root.undo = _Merged(selection.state, trained)
        selection.replace(State(merged=True))
        selection.merged = state
        watch_loading()
        for parameter in kept.trainable:
            parameter.requires_grad_(False)
        undos: list[_Undo] = []
        try:
            with nullcontext() if undo else _held_back_interrupts():
                _write(targets, undo, undos)
            if any(isinstance(target.into, torch.dtype) for target in targets):
                kept.said_quantized = say_plain(survey)
            if untied := _untied(targets):
                # Without this a saved merged model would be tied again when it is loaded.
                kept.tie_flags = tied_configs(survey)
                say_tied(kept.tie_flags, False)
                refuse_new_ties(survey, untied)
            report = _report(targets, state)
            kept.undos = undos if undo else None
        except BaseException as error:
            say_tied(kept.tie_flags, True)
            say_again(kept.said_quantized)
            _restore(undos)
            if any(item.lost for item in undos):
                n, of = len(undos), len(targets)
                raise StateError(
                    "merge(undo=False)",
                    f"it failed at tensor {n} of {of}, and what was written stays written",
                    "Load the base weights again, which undo=False did not keep",
                ) from error
            raise
    return report


def root_of(survey: Survey) -> Root:
    """Return the record of the model, or that of the only root inside."""
    inner = roots_of(survey)
    root = inner.get("") or (next(iter(inner.values())) if len(inner) == 1 else None)
    if root is not None:
        return root
    raise StateError(
        "merge or unmerge",
        "the module is not an injected root"
        + (f"; its roots are {sorted(inner)}" if inner else ""),
        "Call it on the module that was injected",
    )


def state_to_merge(
    survey: Survey, selection: Selection, name: str | Mapping[str, float] | None
) -> State:
    """Return which adapters are to be folded: what was asked for, or else what is active."""
    state = selection.state
    if name is not None:
        check_type("merge, name", name, (str, Mapping), "Give a name, or a dict to weights")
        weights = {name: 1.0} if isinstance(name, str) else dict(name)
        check_names(reach(survey.model, survey).names, weights, "merge")
        state = State(active=tuple((n, float(w)) for n, w in weights.items()))
    if not state.active or state.rows is not None:
        raise StateError(
            "merge",
            "no adapter is active",
            "Call activate(model, name), or merge(model, name=name)",
        )
    for adapter, weight in state.active:
        if not math.isfinite(weight):
            raise StateError(
                f"merge {adapter!r}", f"its weight is {weight}", "Give a finite number"
            )
    return state


def _write(targets: list[Target], undo: bool, undos: list[_Undo]) -> None:
    """Write every merged weight, and note in `undos`, before each, what would take it back."""
    untied: set[Holder] = set()
    # First: a layer that becomes a plain one may get its bias in another dtype.
    for target in sorted(targets, key=lambda target: target.into is None):
        holder, before = target.holder, target.weight
        if target.into is not None:
            target.tally = Tally() if target.terms else None
            weight = target.replacement(target.tally)
            layer = replace_weight(holder.module, holder.param, weight)
            undos.append(_Undo(holder, weight, before, layer=layer))
            continue
        left = [other for other in target.sharers if other not in untied]
        if left:  # else nobody shares it any more
            own = nn.Parameter(before.detach().clone(), requires_grad=False)
            undos.append(_Undo(holder, own, before, partner=left[-1]))
            holder.module._parameters[holder.param] = own
            untied.add(holder)
        else:
            matrix = before.detach().view(target.matrix_shape)
            undos.append(_Undo(holder, before, before, torch.empty_like(matrix) if undo else None))
        _write_rows(target, undos[-1])
        if target.tally is not None and not target.tally.finite:
            original = undos[-1].original
            raise not_finite(target, before if original is None else original)


def _write_rows(target: Target, undo: _Undo) -> None:
    """Write all merged rows; count what rounding leaves where nobody has yet."""
    tally = Tally() if target.narrow and target.tally is None else None
    for start, rows in target.blocks():
        undo.keep(rows, start)
        if target.narrow or target.copies or target.gain is not None:
            target.merged(rows, start, tally, out=rows)
        else:
            target.delta.add_(rows, start)
    target.tally = target.tally or tally


def _restore(undos: Iterable[_Undo]) -> None:
    """Put everything back, the last first: a tie is restored to a tensor that already was."""
    for undo in reversed(list(undos)):
        undo.restore()


@contextmanager
def _held_back_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the last weight is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _untied(targets: list[Target]) -> dict[str, str]:
    return {target.name: target.sharers[0].name for target in targets if target.sharers}


def _report(targets: list[Target], state: State) -> MergeReport:
    tensors, notes = {}, []
    for target in targets:
        action = "untied" if target.sharers else "folded" if target.terms else "replaced"
        action = "dequantized" if target.into and not target.terms else action
        dtype = str(target.weight.dtype).removeprefix("torch.")
        row = TensorReport(target.name, action, dtype, tuple(target.weight.shape))
        tensors[target.name] = row.counted(target.tally if target.narrow else None)
        if target.sharers:
            others = ", ".join(repr(holder.name) for holder in target.sharers)
            notes.append(f"untied: {target.name!r} no longer is the tensor of {others}")
    return MergeReport(state.active, tensors, len(targets), notes=tuple(notes))


def unmerge(model: M) -> M:
    """Restore the weights that `merge` folded an adapter into, bit for bit.

    Ctrl-C waits until all are restored. What `merge` kept is forgotten last, so that a call that
    fails can be made again.

    Args:
        model: The injected root.

    Returns:
        The same object, with the selection and the `requires_grad` flags from before the merge.

    Raises:
        StateError: Nothing is merged, it was merged with `undo=False`, or a weight or its layer was
            replaced since. Nothing was changed.
    """
    survey = Survey(model)
    root = root_of(survey)
    selection, kept = root.selection, root.undo
    if kept is None:
        raise StateError("unmerge", "nothing is merged", "Call merge(model) first")
    selection.check_settled("unmerge", others=True)
    if kept.undos is None:
        raise StateError(
            "unmerge",
            "the merge kept nothing to restore (undo=False)",
            "Eject the adapters, load the base weights, then load the adapters again",
        )
    _check_in_place(survey, kept.undos)
    with _held_back_interrupts():
        _restore(kept.undos)
        with all_or_nothing((module for _, module in survey.modules), (selection, root)):
            selection.replace(kept.was)
            selection.merged = None
            say_tied(kept.tie_flags, True)
            say_again(kept.said_quantized)
            for parameter in kept.trainable:
                parameter.requires_grad_(True)
            root.undo = None
    return model


def _check_in_place(survey: Survey, undos: list[_Undo]) -> None:
    """Check that every weight is still the one that was merged, in a layer of the model."""
    for undo in undos:
        holder = undo.holder
        asked = f"unmerge of {holder.name!r}"
        if id(holder.module) not in survey.paths:
            raise StateError(
                asked, "its layer is not in the model any more", "Put the layer back first"
            )
        now = holder.module._parameters.get(holder.param)
        same = now is undo.merged or (undo.partner is not None and now is undo.before)
        if same and undo.layer is not None and now is not None and now.device != undo.before.device:
            remedy = f"Move the model back to {undo.before.device} first"
            raise StateError(asked, f"it was moved to {now.device} since the merge", remedy)
        if not same or (undo.original is not None and now.numel() != undo.original.numel()):  # type: ignore[union-attr]
            raise StateError(
                asked,
                "the weight was replaced since the merge, and what was kept is not its base",
                "Put the merged Parameter back, or eject the adapters and load the base again",
            )

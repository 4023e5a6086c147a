"""Merge the active adapters into the frozen weights, or into new ones, and restore the weights.

A weight that shares memory with another module is untied first: the adapted module gets a separate
tensor, and the others keep theirs. Nothing is subtracted to restore it: the values of before are
kept (`undo`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from lora_inject.core.functional.merge_report import MergeReport, TensorReport
from lora_inject.core.functional.rounded_fold import with_tally
from lora_inject.core.layers.selected import Mix, Selected
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.model import merge_ties, packed_target
from lora_inject.core.model.eject import eject as take_off
from lora_inject.core.model.merge_reasons import left_written, no_root
from lora_inject.core.model.merge_targets import check_results, merge_targets
from lora_inject.core.model.merge_ties import part
from lora_inject.core.model.merged_rows import write_rounded
from lora_inject.core.model.packed_target import Into, what_packed_become
from lora_inject.core.model.select import weights_of
from lora_inject.core.model.target import Target
from lora_inject.core.model.trainable import trainable_tensors
from lora_inject.core.model.undo import Undone
from lora_inject.core.model.unmerge_checks import check_undone, nothing_to_restore
from lora_inject.core.roots.carried import (
    Root,
    adapted_modules,
    alone,
    check_names,
    check_unmerged,
    reach,
    roots_of,
)
from lora_inject.errors import StateError

M = TypeVar("M", bound=nn.Module)
Weights = tuple[tuple[str, float], ...]


@dataclass
class _Before:
    """What the root remembers while merged; `tensors` is None if no values were kept."""

    setting: Selected
    trainable: list[nn.Parameter]
    tensors: list[Undone] | None
    untied: Mapping[str, str]  # that no config tells of; see `merge_ties.untold`
    # What models and configs said of quantization and ties: each with attributes of its.
    said: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def say_again(self) -> None:
        """Restore what models and configs said before the merge."""
        for owner, attributes in self.said:
            for name, value in attributes.items():
                setattr(owner, name, value)


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
            failure in the middle of writing cannot be undone; its error says so. Ctrl-C waits.
        min_kept: Raise, before any change, if less than this share of a delta would be left after
            rounding to a 16-bit weight.
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
            or it is on the meta device, sharded, of inference mode, or in memory that is shared
            with other processes or in part; the merged weight would not be finite, `min_kept` is
            missed, or the model's class would tie again what must be untied. Nothing was changed.
    """
    into = _into(dequantize, requantize=requantize)
    survey = Survey(model)
    root = root_of(survey)
    mix = mix_to_fold(survey, name, "merge")
    targets = merge_targets(survey, mix, into)
    untied = {target.name: target.sharers[0].name for target in targets if target.sharers}
    untold: Mapping[str, str] = {}
    if untied:
        merge_ties.check_ties(survey, untied)
        untold = merge_ties.untold(survey, untied)
        if untold and eject:
            merge_ties.refuse_untold(untold, "merge with eject=True into")
    if isinstance(into, torch.dtype):
        packed_target.check_replaceable(targets)
    check_results(targets, min_kept, undo)

    undone: list[Undone] = []
    trainable = [p for *_, p in trainable_tensors(survey) if p.requires_grad]
    before = _Before(root.selection.setting, trainable, undone if undo else None, untold)
    with _writing(survey, root, before, undone, len(targets)):
        root.before_merge = before
        root.selection.replace(Mix(), merged=dict(mix))
        for parameter in trainable:
            parameter.requires_grad_(False)
        _write(targets, undone, keep=undo)
        if isinstance(into, torch.dtype):
            before.said += packed_target.say_unpacked(survey, targets)
        report = _report(targets, mix)
        if untied:
            merge_ties.untie_rest(survey, untied, before.said, undone)
        if eject:
            take_off(model)
    return report


def _into(dequantize: str | torch.dtype | None, *, requantize: bool) -> Into:
    """Return what packed weights become, by the options of a merge; None: they are refused."""
    if dequantize is None and not requantize:
        return None
    return what_packed_become(dequantize, requantize=requantize)


@contextmanager
def _writing(
    survey: Survey, root: Root, before: _Before, undone: list[Undone], n: int
) -> Iterator[None]:
    """Run the body, which writes `n` tensors, all or nothing; Ctrl-C waits if nothing is kept."""
    waiting = _held_back_interrupts() if before.tensors is None else nullcontext()
    whole = all_or_nothing((module for _, module in survey.modules), (root.selection, root))
    with waiting, whole, _taken_back(before, undone, n):
        yield


@contextmanager
def _taken_back(before: _Before, undone: list[Undone], n: int) -> Iterator[None]:
    """If the body raises, restore configs and weights, as far as these were kept.

    A context of its own: an interrupt between the body and the end of the others meets it, too.
    """
    try:
        yield
    except BaseException as error:
        before.say_again()
        _restore(undone)
        if any(tensor.lost for tensor in undone):
            raise left_written(len(undone), n) from error
        raise


def _restore(undone: Iterable[Undone]) -> None:
    """Put everything back, the last first: a tie is restored to a tensor that already was."""
    for tensor in reversed(list(undone)):
        tensor.restore()


def root_of(survey: Survey) -> Root:
    """Return the record of the model, or that of the only root inside."""
    inner = roots_of(survey)
    root = inner.get("") or (next(iter(inner.values())) if len(inner) == 1 else None)
    if root is None:
        raise no_root(inner)
    return root


def mix_to_fold(survey: Survey, name: str | Mapping[str, float] | None, verb: str) -> Weights:
    """Return what is to be folded, by default what is active, checked."""
    selection = root_of(survey).selection
    check_unmerged(verb, selection)
    selection.check_settled(verb, others=True)
    mix = tuple(selection.setting.names.items())
    if name is not None:
        weights = weights_of(name, f"{verb}, name")
        check_names(reach(survey.model, survey).names, weights, verb)
        mix = tuple(weights.items())
    if not mix:
        remedy = f"Call activate(model, name), or {verb}(model, name=name)"
        raise StateError(verb, "no adapter is active", remedy)
    for _, _, attached in adapted_modules(survey):
        for folded, _ in mix:
            attached.check_started(attached.entries(folded), verb)
    return mix


def _write(targets: list[Target], undone: list[Undone], *, keep: bool) -> None:
    """Write every merged weight, and note in `undone`, before each, what would take it back.

    With `keep` the values before are kept.
    """
    untied: set[Holder] = set()
    # First: a layer that becomes a plain one may get its bias in another dtype.
    for target in sorted(targets, key=lambda target: not target.is_packed):
        replaced = target.replace()
        undone.append(replaced or _before_writing(target, untied, keep=keep))
        if replaced is None:
            _write_rows(target, undone[-1])
        if keep:
            undone[-1].note_written()


def _before_writing(target: Target, untied: set[Holder], *, keep: bool) -> Undone:
    """Untie a tensor that another holds as well; return what restores it once it is written."""
    holder, before = target.holder, target.weight
    if left := [other for other in target.sharers if other not in untied]:
        untied.add(holder)
        return part(holder, left[-1])
    # Nobody shares it, or nobody any more.
    matrix = before.detach().view(target.matrix_shape)
    return Undone(holder, before, before, matrix.clone() if keep else None)


def _write_rows(target: Target, undone: Undone) -> None:
    """Write all merged rows in their place."""
    if target.narrow or target.copies or target.gain is not None:
        write_rounded(target, undone.before if undone.original is None else undone.original)
    else:
        for start, rows in target.blocks():
            target.delta.add_(rows, start)


def _report(targets: list[Target], mix: Weights) -> MergeReport:
    tensors, notes = {}, []
    for target in targets:
        dtype = str(target.weight.dtype).removeprefix("torch.")
        row = TensorReport(target.name, target.action, dtype, tuple(target.weight.shape))
        if target.narrow:
            row = with_tally(row, target.tally)
        tensors[target.name] = row
        if target.sharers:
            others = ", ".join(repr(holder.name) for holder in target.sharers)
            notes.append(f"untied: {target.name!r} no longer is the tensor of {others}")
    return MergeReport(mix, tensors, len(targets), notes=tuple(notes))


@alone
def unmerge(model: M, *, discard: bool = False) -> M:
    """Restore the weights that `merge` folded an adapter into, bit for bit.

    Ctrl-C waits until all are restored. The values that `merge` kept are dropped last, so a call
    that fails can be repeated.

    Args:
        model: The injected root.
        discard: Drop what was changed in merged weights since (`layer.weight.data += 1`), which is
            an error otherwise. It is not noticed in a weight that was cast to another dtype since
            or requantized, nor in an embedding with `max_norm`, which scales its rows as it runs.

    Returns:
        The same object, with the selection and the `requires_grad` flags from before the merge.

    Raises:
        StateError: Nothing is merged, it was merged with `undo=False`, or a weight or its layer was
            replaced or changed since. Nothing was changed.
    """
    survey = Survey(model)
    root = root_of(survey)
    selection, before = root.selection, root.before_merge
    if before is None or before.tensors is None:
        raise nothing_to_restore(merged=before is not None)
    selection.check_settled("unmerge", others=True)
    for tensor in before.tensors:
        if not tensor.stands(survey):
            check_undone(tensor, survey, discard)
    with _held_back_interrupts():
        _restore(before.tensors)
        with all_or_nothing((module for _, module in survey.modules), (selection, root)):
            selection.replace(before.setting)
            before.say_again()
            for parameter in before.trainable:
                parameter.requires_grad_(True)
            root.before_merge = None
    return model


@contextmanager
def _held_back_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the last weight is written."""
    others = signal.getsignal(signal.SIGINT) is None  # whose handler Python cannot put back
    if others or threading.current_thread() is not threading.main_thread():
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

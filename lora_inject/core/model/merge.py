"""Merge the active adapters into the frozen weights, or into new ones, and restore the weights.

A weight that shares memory with another module is untied first: the adapted module gets a separate
tensor, and the others keep theirs. Nothing is subtracted to restore it: the values of before are
kept. A sum over the bits of what was written tells whether somebody has changed it since, which
costs a pass over it at either end and no memory.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.core.functional.fold import Tally
from lora_inject.core.functional.merge_report import MergeReport, TensorReport
from lora_inject.core.layers.packed_weights import claims
from lora_inject.core.layers.selected import Mix, Selected
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.model.carried import (
    Root,
    adapted_modules,
    check_names,
    check_unmerged,
    reach,
    roots_of,
)
from lora_inject.core.model.eject import eject as take_off
from lora_inject.core.model.merge_targets import check_min_kept, check_results, merge_targets
from lora_inject.core.model.select import weights_of
from lora_inject.core.model.target import Target, not_finite
from lora_inject.core.model.trainable import trainable_tensors
from lora_inject.errors import StateError

if TYPE_CHECKING:
    from lora_inject.core.layers.weight_kinds import Undo
    from lora_inject.core.model.packed_target import Into

M = TypeVar("M", bound=nn.Module)
Weights = tuple[tuple[str, float], ...]
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # words: 1 MiB, which a CPU's cache holds


@dataclass
class _Merged:
    """What the root keeps while merged; `undos` is None if nothing was kept."""

    was: Selected
    trainable: list[nn.Parameter]
    undos: list[_Undo] | None
    # What models and configs said of quantization and ties: each with attributes of its.
    said: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def say_unpacked(self, survey: Survey) -> None:
        """Remove from models what is not true of unpacked weights any more."""
        self.said += claims(module for _, module in survey.modules)
        for owner, attributes in self.said:
            for name in attributes:
                delattr(owner, name)

    def say_again(self) -> None:
        """Restore what models and configs said before the merge."""
        for owner, attributes in self.said:
            for name, value in attributes.items():
                setattr(owner, name, value)


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
            or it is on the meta device, sharded, of inference mode or shares
            a part of its memory, the merged weight would not be finite, `min_kept` is missed, or
            the model's class would tie again what has to be untied. Nothing was changed.
    """
    check_min_kept(min_kept)
    into = _into(dequantize, requantize)
    survey = Survey(model)
    root = root_of(survey)
    mix, targets = mix_and_targets(survey, name, into, "merge")
    untied = {target.name: target.sharers[0].name for target in targets if target.sharers}
    if untied:
        _ties().check_ties(survey, untied, eject)
    for target in targets:
        target.check_replaceable()
    check_results(targets, min_kept, undo)

    undos: list[_Undo] = []
    trainable = [p for *_, p in trainable_tensors(survey) if p.requires_grad]
    kept = _Merged(root.selection.setting, trainable, undos if undo else None)
    with _writing(survey, root, kept, undos, len(targets)):
        root.undo = kept
        root.selection.replace(Mix(), merged=dict(mix))
        for parameter in trainable:
            parameter.requires_grad_(False)
        _write(targets, undo, undos)
        if any(target.becomes_plain for target in targets):
            kept.say_unpacked(survey)
        if untied:
            kept.said += _ties().say_untied(survey)
            _ties().check_new_ties(survey, untied)
        report = _report(targets, mix)
        if eject:
            take_off(model)
    return report


def _ties() -> Any:
    """Return what is known of ties, loaded with the first tensor that is untied."""
    from lora_inject.core.model import merge_ties

    return merge_ties


def _into(dequantize: str | torch.dtype | None, requantize: bool) -> Into:
    """Return what packed weights become."""
    if dequantize is None:
        return "same" if requantize else None
    if requantize:
        raise StateError("merge", "both dequantize and requantize are given", "Choose one of them")
    from lora_inject.core.model.packed_target import dtype_of

    return dtype_of(dequantize)


@contextmanager
def _writing(
    survey: Survey, root: Root, kept: _Merged, undos: list[_Undo], n: int
) -> Iterator[None]:
    """Run the body, which writes `n` tensors, all or nothing; Ctrl-C waits if nothing is kept."""
    waiting = _held_back_interrupts() if kept.undos is None else nullcontext()
    whole = all_or_nothing((module for _, module in survey.modules), (root.selection, root))
    with waiting, whole, _taken_back(kept, undos, n):
        yield


@contextmanager
def _taken_back(kept: _Merged, undos: list[_Undo], n: int) -> Iterator[None]:
    """If the body raises, restore configs and weights, as far as these were kept."""
    try:
        yield
    except BaseException as error:
        kept.say_again()
        _restore(undos)
        if any(undo.lost for undo in undos):
            raise StateError(
                "merge(undo=False)",
                f"it failed at tensor {len(undos)} of {n}, and what was written stays written",
                "Load the base weights again, which undo=False did not keep",
            ) from error
        raise


def root_of(survey: Survey) -> Root:
    """Return the record of the model, or that of the only root inside."""
    inner = roots_of(survey)
    root = inner.get("") or (next(iter(inner.values())) if len(inner) == 1 else None)
    if root is not None:
        return root
    raise StateError(
        "merge or unmerge",
        f"parts of this module were injected, each alone: {sorted(inner)}"
        if inner
        else "this module has no adapters",
        "Call it on the model that was given to inject",
    )


def mix_and_targets(
    survey: Survey, name: str | Mapping[str, float] | None, into: Into, verb: str
) -> tuple[Weights, list[Target]]:
    """Return what is to be folded, by default what is active, and the tensors to write."""
    mix = mix_to_fold(survey, name, verb)
    return mix, merge_targets(survey, mix, into)


def mix_to_fold(survey: Survey, name: str | Mapping[str, float] | None, verb: str) -> Weights:
    """Return what is to be folded, by default what is active, checked."""
    selection = root_of(survey).selection
    check_unmerged(verb, selection)
    selection.check_settled(verb, others=True)
    mix = tuple(selection.setting.names.items())
    if name is not None:
        weights = weights_of(name, "merge, name")
        check_names(reach(survey.model, survey).names, weights, "merge")
        mix = tuple(weights.items())
    if not mix:
        remedy = "Call activate(model, name), or merge(model, name=name)"
        raise StateError("merge", "no adapter is active", remedy)
    for _, _, attached in adapted_modules(survey):
        for folded, _ in mix:
            attached.check_started(attached.entries(folded), "merge")
    return mix


def _write(targets: list[Target], undo: bool, undos: list[_Undo]) -> None:
    """Write every merged weight, and note in `undos`, before each, what would take it back."""
    untied: set[Holder] = set()
    # First: a layer that becomes a plain one may get its bias in another dtype.
    for target in sorted(targets, key=lambda target: not target.is_packed):
        before = target.weight
        if (replaced := target.replace()) is not None:
            weight, layer = replaced
            undos.append(_Undo(target.holder, weight, before, layer=layer))
            if undo and target.becomes_plain:  # some rearrange their codes as they run
                undos[-1].note_written()
            continue
        holder = target.holder
        if left := [other for other in target.sharers if other not in untied]:
            own = nn.Parameter(before.detach().clone(), requires_grad=False)
            undos.append(_Undo(holder, own, before, partner=left[-1]))
            holder.module._parameters[holder.param] = own
            untied.add(holder)
        else:  # nobody shares it, or nobody any more
            matrix = before.detach().view(target.matrix_shape)
            undos.append(_Undo(holder, before, before, matrix.clone() if undo else None))
        _write_rows(target, undos[-1])
        if undo:
            undos[-1].note_written()


def _write_rows(target: Target, undo: _Undo) -> None:
    """Write all merged rows; count what is left after rounding unless it was counted."""
    tally = Tally() if target.narrow and target.tally is None else None
    for start, rows in target.blocks():
        if target.narrow or target.copies or target.gain is not None:
            target.merged(rows, start, tally, out=rows)
        else:
            target.delta.add_(rows, start)
    target.tally = target.tally or tally
    if target.tally is not None and not target.tally.finite:
        raise not_finite(target, undo.before if undo.original is None else undo.original)


def _report(targets: list[Target], mix: Weights) -> MergeReport:
    tensors, notes = {}, []
    for target in targets:
        dtype = str(target.weight.dtype).removeprefix("torch.")
        row = TensorReport(target.name, target.action, dtype, tuple(target.weight.shape))
        tensors[target.name] = row.counted(target.tally if target.narrow else None)
        if target.sharers:
            others = ", ".join(repr(holder.name) for holder in target.sharers)
            notes.append(f"untied: {target.name!r} no longer is the tensor of {others}")
    return MergeReport(mix, tensors, len(targets), notes=tuple(notes))


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
    for undo in kept.undos:
        undo.check(survey, discard)
    with _held_back_interrupts():
        _restore(kept.undos)
        with all_or_nothing((module for _, module in survey.modules), (selection, root)):
            selection.replace(kept.was)
            kept.say_again()
            for parameter in kept.trainable:
                parameter.requires_grad_(True)
            root.undo = None
    return model


# What is put back -------------------------------------------------------------------------------


@dataclass
class _Undo:
    """What `unmerge` puts back for one tensor."""

    holder: Holder  # where it stands
    merged: nn.Parameter  # what was written there
    before: nn.Parameter  # what stood there
    # The values before as a matrix; None where `before` still has them or nothing is kept.
    original: Tensor | None = None
    partner: Holder | None = None  # of an untied tensor: who else held its memory, and still does
    layer: Undo | None = None  # of a quantized weight that was replaced: the state of its layer
    written: tuple[torch.dtype, Tensor] | None = None  # dtype and `_checksum` of what was written

    @property
    def lost(self) -> bool:
        """Whether values are written over that nobody keeps."""
        return self.original is None and self.partner is None and self.layer is None

    def note_written(self) -> None:
        """Note what stands there now, unless running the layer changes it."""
        # An embedding with max_norm scales the rows that it looks up, in place.
        if getattr(self.holder.module, "max_norm", None) is None:
            self.written = self.merged.dtype, _checksum(self.merged)

    def check(self, survey: Survey, discard: bool) -> None:
        """Check that the weight is still the one that was merged, in a layer of the model."""
        asked, module = f"unmerge of {self.holder.name!r}", self.holder.module
        if id(module) not in survey.paths:
            problem = "its layer is not in the model any more"
            raise StateError(asked, problem, "Put the layer back first")
        now: Any = module._parameters.get(self.holder.param)
        same = now is self.merged or now is self.before
        if same and self.layer is not None and now.device != self.before.device:
            remedy = f"Move the model back to {self.before.device} first"
            raise StateError(asked, f"it was moved to {now.device} since the merge", remedy)
        if not same or (self.original is not None and now.numel() != self.original.numel()):
            raise StateError(
                asked,
                "the weight was replaced since the merge, and what was kept is not its base",
                "Put the merged Parameter back, or eject the adapters and load the base again",
            )
        if not discard and self._edited(now):
            raise StateError(
                asked,
                "its values were changed since the merge, which unmerge would drop",
                "Call unmerge(model, discard=True) to drop the change, or eject(model) to keep it "
                "with what was merged",
            )

    def _edited(self, now: nn.Parameter) -> bool:
        """Whether a weight has other values than were written; not known once it was cast."""
        if now is not self.merged or self.written is None or now.dtype != self.written[0]:
            return False
        if int(_checksum(now)) == int(self.written[1]):
            return False
        if self.original is None:
            return True
        # An interrupted call may have restored it already.
        return not torch.equal(now.detach(), self.original.to(now.device).view(now.shape))

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
                self.merged.detach().copy_(self.original.view(self.merged.shape))  # any strides


def _restore(undos: Iterable[_Undo]) -> None:
    """Put everything back, the last first: a tie is restored to a tensor that already was."""
    for undo in reversed(list(undos)):
        undo.restore()


def _checksum(values: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor, on its device, in which each word has its own factor.

    It is exact, so equal on every device. No word can change alone without it.
    """
    flat = values.detach().reshape(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0
    words = flat.view(torch.int64 if whole else _WORDS[flat.element_size()])
    factors = torch.arange(1, 2 * _CHUNK, 2, device=flat.device)  # odd: none loses a bit
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in words.split(_CHUNK):  # type: ignore[no-untyped-call]
        total = total * 31 + (chunk * factors[: len(chunk)]).sum()
    return total


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

"""Fold what is active into the frozen weights, and restore them bit for bit.

Merging is two passes over the same arithmetic. The first forms every merged weight, row
block by row block, counts what rounding leaves of each delta, and may refuse; the second writes.
`unmerge` never subtracts: it puts back the tensors that `merge` kept.

A weight whose tensor another module shares is untied first: the adapted module gets a tensor of its
own, the others keep theirs.
"""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.errors import LayerError, StateError
from lora_inject.functional import (
    Delta,
    MergeReport,
    Scratch,
    Tally,
    TensorReport,
    Term,
    all_finite,
    block_rows,
    fold_rows,
    fold_rows_,
    mix_copies,
)
from lora_inject.layers.attached import Entry, attached_to
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.state_dict import allow_loading, refuse_loading
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import (
    ROOT,
    Root,
    check_names,
    entries,
    reach,
    refuse_merged,
    roots_of,
)
from lora_inject.spec.names import joined

M = TypeVar("M", bound=nn.Module)

BLOCKS_A_CALL = 16
"""So many that a call is nothing beside them; what is kept of them is still in a cache then."""


@dataclass
class _Target:
    """One tensor to write."""

    name: str
    module: nn.Module
    param: str
    terms: list[Term] = field(default_factory=list)
    copies: list[tuple[Tensor, float]] = field(default_factory=list)
    untie: bool = False
    tally: Tally | None = None
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def weight(self) -> nn.Parameter:
        found = self.module._parameters[self.param]
        assert found is not None
        return found

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if self.terms:
            return self.terms[0].spec.matrix_shape
        return (self.weight.shape[0] if self.weight.dim() else 1, -1)

    def may_overflow(self) -> bool:
        """Whether the largest value that a delta could have comes near the largest of the dtype."""
        bound = sum(
            abs(term.spec.scale * term.weight) * _norm(term.A) * _norm(term.B)
            for term in self.terms
        )
        return not bound <= 1e-6 * torch.finfo(self.weight.dtype).max

    @cached_property
    def delta(self) -> Delta:
        """The terms, prepared for all blocks."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return Delta(self.terms, wide)

    def blocks(self, n: float = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of the weight matrix, views in its own storage.

        Args:
            n: How many usual blocks to take at once.
        """
        matrix = self.weight.detach().view(self.matrix_shape)
        step = int(min(n * block_rows(matrix), max(1, matrix.shape[0])))
        for i, rows in enumerate(matrix.split(step)):  # type: ignore[no-untyped-call]
            yield i * step, rows

    @property
    def narrow(self) -> bool:
        """Whether the weight is stored in 16 bits, which may lose part of a delta."""
        return self.weight.element_size() <= 2

    def merged(
        self, rows: Tensor, start: int, tally: Tally | None, out: Tensor | None = None
    ) -> Tensor:
        """Return some merged rows, possibly into `rows` itself."""
        if not self.copies:
            pieces = block_rows(rows)
            return fold_rows(rows, start, self.delta, None, tally, self.scratch, out, pieces)
        before = rows.to(self.copies[0][0].dtype) if tally is not None else None
        wanted = _with_copies(self, rows, start)
        fold_rows_(wanted, start, self.terms)
        merged = wanted.to(rows.dtype) if out is None else out.copy_(wanted)
        if tally is not None and before is not None:
            tally.add(before, wanted, merged)
        return merged

    def write(self, undo: _Undo) -> None:
        """Write all merged rows; count what rounding leaves where nobody has yet.

        Args:
            undo: Keeps the rows before they are changed, where it has memory for them.
        """
        tally = Tally() if self.narrow and self.tally is None else None
        in_place = not self.copies and not self.narrow
        n_blocks = float(BLOCKS_A_CALL)
        if undo.original is None and not self.copies:  # nothing waits for its turn in the cache
            n_blocks = math.inf
        elif in_place:  # without float32 copies more fits
            n_blocks = 4
        for start, rows in self.blocks(n_blocks):
            undo.keep(rows, start)
            if in_place:
                fold_rows_(rows, start, self.delta)
            else:
                self.merged(rows, start, tally, out=rows)
        self.tally = self.tally or tally


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def _with_copies(target: _Target, rows: Tensor, start: int) -> Tensor:
    """Return some rows with the trained copies mixed in, in the copies' dtype."""
    stop = start + rows.shape[0]
    copies = [(t.reshape(target.matrix_shape)[start:stop], w) for t, w in target.copies]
    return mix_copies(rows, copies, copies[0][0].dtype)


@dataclass
class _Undo:
    """What `unmerge` puts back for one tensor.

    Attributes:
        path: Name of the module.
        param: Name of the parameter in it.
        original: Memory for the values before as a matrix, None where the parameter object itself
            was replaced or nothing is kept.
        tied_to: Name of a module and parameter that still hold the shared tensor, if untied.
        lost: Whether values were written over that nobody kept.
        n_kept: How many rows `original` holds.
    """

    path: str
    param: str
    original: Tensor | None
    tied_to: tuple[str, str] | None = None
    lost: bool = False
    n_kept: int = 0

    def keep(self, rows: Tensor, start: int) -> None:
        """Copy some rows that are about to be changed, which come in order."""
        if self.original is not None:
            self.original[start : start + rows.shape[0]].copy_(rows)
            self.n_kept = start + rows.shape[0]


@dataclass
class _Merged:
    """What the root keeps while merged; None for `targets` where nothing was kept."""

    targets: list[_Undo] | None
    was: State
    trainable: list[tuple[str, str]]
    tie_flags: list[Any]


def merge(
    model: nn.Module,
    name: str | Mapping[str, float] | None = None,
    undo: bool = True,
    min_kept: float | None = None,
) -> MergeReport:
    """Fold `scale * B @ A` of the active adapters into the frozen weights, rounding once.

    Args:
        model: The injected root.
        name: Activate this adapter, or mix, first; by default what is active is folded.
        undo: Keep the original tensors, so that `unmerge` restores them bit for bit. Without them a
            failure in the middle of writing cannot be taken back, and says so; Ctrl-C waits.
        min_kept: Refuse, before any change, where less than this share of a delta would survive
            the rounding to a 16-bit weight.

    Returns:
        What rounding left of each delta.

    Raises:
        StateError: Nothing is active, the model is merged already, or an adapter holds NaN or Inf.
        LayerError: A weight is quantised, on the meta device or sharded, the merged weight would
            not be finite, or `min_kept` is missed. Nothing was changed.
    """
    survey = Survey(model)
    selection, root = _root_selection(survey)
    refuse_merged(selection, "merge")
    selection.check_settled("merge", others=True)
    state = _state_to_merge(survey, selection, name)
    targets = _targets(survey, state, Scratch())
    _check_ties(survey, targets)
    _check_results(targets, min_kept, undo)
    with all_or_nothing((module for _, module in survey.modules), (selection, root)):
        was = selection.state
        selection.replace(State(merged=True))
        selection.merged = state
        refuse_loading(survey.model)
        root.undo = _Merged(None, was, _trainable(survey), [])
        modules = survey.by_name
        for path, flat in root.undo.trainable:
            _set_flag(modules[path], flat, False)
        done: list[_Undo] = []
        try:
            _write(targets, survey, undo, done)
            if any(target.untie for target in targets):
                _clear_tie_flags(survey.model, root.undo.tie_flags)
        except BaseException as error:
            for config in root.undo.tie_flags:
                config.tie_word_embeddings = True
            _restore(modules, done)
            if any(item.lost for item in done):
                raise _torn(len(done), len(targets)) from error
            raise
        root.undo.targets = done if undo else None
    return _report(targets, state)


def _torn(n_written: int, n_targets: int) -> StateError:
    return StateError(
        "merge(undo=False)",
        f"it failed at tensor {n_written} of {n_targets}, and what was written stays written",
        "Load the base weights again, which undo=False did not keep",
    )


def _root_selection(survey: Survey) -> tuple[Selection, Root]:
    root = survey.model.__dict__.get(ROOT)
    if root is not None:
        return root.selection, root
    inner = roots_of(survey)
    if len(inner) == 1:
        found = next(iter(inner.values()))
        return found.selection, found
    raise StateError(
        "merge or unmerge",
        "the module is not an injected root"
        + (f"; its roots are {sorted(inner)}" if inner else ""),
        "Call it on the module that was injected",
    )


def _state_to_merge(
    survey: Survey, selection: Selection, name: str | Mapping[str, float] | None
) -> State:
    if name is None:
        state = selection.state
    else:
        weights = {name: 1.0} if isinstance(name, str) else dict(name)
        check_names(reach(survey.model, survey).names, weights, "merge")
        state = State(active=tuple((n, float(w)) for n, w in weights.items()))
    if not state.active or state.rows is not None:
        raise StateError(
            "merge", "no adapter is active", "Call activate(model, name), or merge(model, name)"
        )
    for adapter, weight in state.active:
        if not math.isfinite(weight):
            raise StateError(
                f"merge {adapter!r}", f"its weight is {weight}", "Give a finite number"
            )
    return state


def _targets(survey: Survey, state: State, scratch: Scratch) -> list[_Target]:
    """Collect the tensors to write, one target each; check that each can be written."""
    weights = dict(state.active)
    found: dict[tuple[int, str], _Target] = {}
    for path, module, entry in entries(survey):
        if entry.adapter not in weights:
            continue
        label = joined(path, entry.param)
        new = _Target(label, module, entry.param, scratch=scratch)
        target = found.setdefault((id(module), entry.param), new)
        _add_entry(target, module, entry, weights[entry.adapter])
    targets = list(found.values())
    for target in targets:
        _check_weight(target)
        target.untie = len(survey.holders[id(target.weight)]) > 1
    return _once_if_tied(targets, survey.holders)


def _once_if_tied(
    targets: list[_Target], held: Mapping[int, list[tuple[nn.Module, str]]]
) -> list[_Target]:
    """A tied tensor that gets the same trained copy under all its names is written once, tied."""
    by_tensor: dict[int, list[_Target]] = {}
    for target in targets:
        by_tensor.setdefault(id(target.weight), []).append(target)
    kept = []
    for same in by_tensor.values():
        copies = {tuple((id(t), weight) for t, weight in target.copies) for target in same}
        alike = len(copies) == 1 and not any(target.terms for target in same)
        if alike and len(same) == len(held[id(same[0].weight)]):
            same[0].untie = False
            kept.append(same[0])
        else:
            kept += same
    return kept


def _add_entry(target: _Target, module: nn.Module, entry: Entry, weight: float) -> None:
    for role in entry.names:
        tensor = entry.tensor(module, role)
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
    for A, B, sign in entry.pairs(module):
        target.terms.append(Term(entry.spec, A.detach(), B.detach(), weight * sign))


def _check_weight(target: _Target) -> None:
    weight = target.weight
    asked = f"merge into {target.name!r}"
    if weight.device.type == "meta":
        raise LayerError(asked, "the weight is on the meta device", "Load the base weights first")
    if type(weight) is not nn.Parameter:
        raise LayerError(
            asked,
            f"the weight is a {type(weight).__name__}",
            "Merge into an unsharded copy in plain floating point",
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise LayerError(
            asked, f"the weight is quantised ({weight.dtype})", "Merge into the base in 16 bits"
        )
    if not weight.is_contiguous():
        raise LayerError(asked, "the weight is not contiguous", "Call .contiguous() on it first")


def _check_ties(survey: Survey, targets: list[_Target]) -> None:
    """Refuse to untie in a model that computes something else when its config says so."""
    untied = [target.name for target in targets if target.untie]
    readers = [m for _, m in survey.modules if untied and _reads_tie_flag(type(m))]
    if readers:
        raise LayerError(
            f"merge into {untied[0]!r}",
            f"its tensor is tied, and {type(readers[0]).__name__} scales its output by whether "
            "config.tie_word_embeddings says so: untied it would be another model",
            "Stay unmerged, or leave this site out of the adapter",
        )


def _reads_tie_flag(cls: type) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)  # type: ignore[attr-defined]
    return code is not None and "tie_word_embeddings" in code.co_names


def _check_results(targets: list[_Target], min_kept: float | None, undo: bool) -> None:
    """Refuse, before any change, what must not be written.

    Most merges can be judged without being carried out: where no delta can come near the largest
    value of the dtype, the merged weight is finite if W is, which is asked now only where a merge
    cannot be taken back when it comes to light. The others are formed once without being written.
    """
    for target in targets:
        if target.narrow and not undo and not all_finite(target.weight):
            raise _not_finite(target, target.weight)
        if not (min_kept is not None and target.narrow) and not target.may_overflow():
            continue
        target.tally = Tally()
        for start, rows in target.blocks(BLOCKS_A_CALL):
            target.merged(rows, start, target.tally)
        if not target.tally.finite:
            raise _not_finite(target, target.weight)
    if min_kept is not None:
        _check_kept(targets, min_kept)


def _not_finite(target: _Target, base: Tensor) -> LayerError:
    asked = f"merge into {target.name!r}"
    if not all_finite(base):
        return LayerError(asked, "the base holds NaN or Inf", "Check the base")
    found = f"the merged weight overflows {target.weight.dtype}"
    return LayerError(asked, found, "Merge in a wider dtype")


def _check_kept(targets: list[_Target], min_kept: float) -> None:
    kept = {t.name: t.tally.kept for t in targets if t.narrow and t.tally is not None}
    missed = [name for name, share in kept.items() if share < min_kept]
    if missed:
        worst = min(missed, key=lambda name: kept[name])
        raise LayerError(
            f"merge with min_kept={min_kept}",
            f"rounding would leave {kept[worst]:.3f} of the delta of {worst!r}, and less than "
            f"asked at {len(missed)} of {len(targets)} tensors",
            "Stay unmerged, or merge in float32",
        )


def _report(targets: list[_Target], state: State) -> MergeReport:
    tensors = {}
    for target in targets:
        action = "untied" if target.untie else "folded" if target.terms else "replaced"
        dtype = str(target.weight.dtype).removeprefix("torch.")
        row = TensorReport(target.name, action, dtype, tuple(target.weight.shape))
        tensors[target.name] = row.counted(target.tally if target.narrow else None)
    return MergeReport(state.active, tensors, len(targets))


def _write(targets: list[_Target], survey: Survey, undo: bool, done: list[_Undo]) -> None:
    """Write every merged weight, and note in `done`, before each, what would take it back."""
    paths = survey.paths
    held = {key: list(holders) for key, holders in survey.holders.items()}
    interrupts = nullcontext() if undo else _held_back_interrupts()
    with interrupts:
        for target in targets:
            undone = _untie(target, held, paths) if target.untie else None
            done.append(undone or _keep(target, paths, undo))
            version = target.weight._version
            try:
                target.write(done[-1])
            finally:
                changed = target.weight._version != version
                done[-1].lost = changed and done[-1].tied_to is None and not undo
            if target.tally is not None and not target.tally.finite:
                original = done[-1].original
                raise _not_finite(target, target.weight if original is None else original)


@contextmanager
def _held_back_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the last weight is written: without originals there is no way back."""
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


def _keep(target: _Target, paths: Mapping[int, str], undo: bool) -> _Undo:
    matrix = target.weight.detach().view(target.matrix_shape)
    return _Undo(paths[id(target.module)], target.param, torch.empty_like(matrix) if undo else None)


def _untie(
    target: _Target, held: Mapping[int, list[tuple[nn.Module, str]]], paths: Mapping[int, str]
) -> _Undo | None:
    """Give a shared weight a tensor of its own; None where nobody shares it (any more)."""
    shared = held[id(target.weight)]
    if len(shared) < 2:
        return None
    shared.remove((target.module, target.param))
    partner, key = shared[-1]
    own = nn.Parameter(target.weight.detach().clone(), requires_grad=False)
    target.module._parameters[target.param] = own
    return _Undo(paths[id(target.module)], target.param, None, (paths[id(partner)], key))


def _restore(modules: Mapping[str, nn.Module], done: list[_Undo]) -> None:
    """Put everything back, the last first: a tie is restored to a tensor that already was."""
    for undo in reversed(done):
        module = modules[undo.path]
        if undo.tied_to is not None:
            partner = modules[undo.tied_to[0]]
            module._parameters[undo.param] = partner._parameters[undo.tied_to[1]]
        elif undo.original is not None:
            weight = module._parameters[undo.param]
            assert weight is not None
            with torch.no_grad():
                matrix = weight.detach().view(undo.original.shape)
                matrix[: undo.n_kept].copy_(undo.original[: undo.n_kept])


def _trainable(survey: Survey) -> list[tuple[str, str]]:
    """Return `(module name, flat name)` of every adapter tensor that requires a gradient."""
    return [
        (path, flat)
        for path, module, entry in entries(survey)
        for flat in entry.names.values()
        if (p := module._parameters[flat]) is not None and p.requires_grad
    ]


def _set_flag(module: nn.Module, flat: str, flag: bool) -> None:
    parameter = module._parameters[flat]
    assert parameter is not None
    parameter.requires_grad_(flag)


def _clear_tie_flags(model: nn.Module, cleared: list[Any]) -> None:
    """Say in every transformers config inside that embeddings are not tied; note which said so.

    Without this a saved merged model would be tied again when it is loaded.
    """
    pending: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while pending:
        config = pending.pop()
        if any(config is seen for seen in cleared) or not hasattr(config, "__dict__"):
            continue
        if config.__dict__.get("tie_word_embeddings"):
            config.tie_word_embeddings = False
            cleared.append(config)
            pending += [v for k, v in config.__dict__.items() if k.endswith("_config")]


def unmerge(model: M) -> M:
    """Restore the weights that `merge` folded an adapter into, bit for bit.

    Args:
        model: The injected root.

    Returns:
        The same object, with the selection and the `requires_grad` flags from before the merge.

    Raises:
        StateError: Nothing is merged, or it was merged with `undo=False`.
    """
    survey = Survey(model)
    selection, root = _root_selection(survey)
    if selection.merged is None:
        raise StateError("unmerge", "nothing is merged", "Call merge(model) first")
    kept: _Merged = root.undo
    if kept.targets is None:
        raise StateError(
            "unmerge",
            "the merge kept nothing to restore (undo=False)",
            "Load the base weights again",
        )
    modules = survey.by_name
    for undo in kept.targets:
        module = modules.get(undo.path)
        if module is None or attached_to(module) is None or undo.param not in module._parameters:
            raise StateError(
                f"unmerge of '{undo.path}.{undo.param}'",
                "the module was renamed or replaced since the merge",
                "Put it back under its name first",
            )
    selection.replace(kept.was)
    selection.merged = None
    _restore(modules, kept.targets)
    for config in kept.tie_flags:
        config.tie_word_embeddings = True
    for path, flat in kept.trainable:
        _set_flag(modules[path], flat, True)
    root.undo = None
    allow_loading(survey.model)
    return model

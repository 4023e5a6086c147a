"""The trainable tensors of each trial as two flat vectors; the Parameters are views of them.

An optimizer then steps two tensors for each trial, whatever the number of sites: for 32 trials one
fused AdamW takes half the time of 32 optimizers. All vectors are in one buffer, and their gradients
at the same offsets in another, so the tensors of trials with equal shapes are evenly spaced: one
view of them is the stack that a product takes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import Spans
from lora_inject.core.layers.attached import Attached, Entry, Recipe
from lora_inject.private import look_up
from lora_inject.trials.ranges import TokenRange
from lora_inject.trials.trial import Trial


@dataclass
class Stacked:
    """What a layer has of some trials."""

    entries: tuple[Entry, ...]
    stacks: list[tuple[int, TokenRange]]  # each with the place of its first trial, tokens left open
    dropout: dict[str, float]  # of the trials that have one
    trained: frozenset[int]  # where the A and B of these trials are in the buffer
    marks: frozenset[str]  # of the entries
    last: tuple[tuple[int, ...], list[TokenRange]] = field(default=((), []))

    def ranges(self, sizes: tuple[int, ...]) -> list[TokenRange]:
        """Return the stacks as ranges of tokens, for the tokens of each trial."""
        if self.last[0] != sizes:  # most steps have the sizes of the step before
            starts, ranges = [0, *accumulate(sizes)], []
            for first, one in self.stacks:
                n = len(one.A)
                equal = len(set(sizes[first : first + n])) == 1
                for i in range(0, n, n if equal else 1):
                    part = one if equal else one.part(i)
                    tokens = (starts[first + i], starts[first + i + len(part.A)])
                    ranges.append(part._replace(tokens=tokens))
            self.last = (sizes, ranges)
        return self.last[1]


class Buffer:
    """The memory of the tensors of several trials.

    Args:
        like: A tensor of their dtype and device.
        numel: How many values there is room for.

    Attributes:
        anchor: A leaf for which the backward of `ranged_linear` runs.
        reached: Where the members begin that have got a gradient, maybe 0, since `zero`.
        counted: Where the members of those trials begin whose losses the running backward is of.
    """

    def __init__(self, like: Tensor, numel: int) -> None:
        self._values = like.new_empty(numel)
        self._grads = torch.zeros_like(self._values)
        self._lowered: dict[torch.dtype, Tensor] = {}
        self._end = 0
        self._stacked: dict[tuple[Any, ...], Stacked] = {}
        self.anchor = like.new_zeros(()).requires_grad_()
        self.reached: set[int] = set()
        self.counted: frozenset[int] = frozenset()

    def take(self, vector: nn.Parameter) -> slice:
        """Move a vector into the buffer, with its gradient if it has one; return its place."""
        place = slice(self._end, self._end + vector.numel())
        self._end = place.stop
        vector.data = self._values[place].copy_(vector.detach())
        if vector.grad is not None:
            vector.grad = self._grads[place].copy_(vector.grad)
        return place

    def views(self, place: slice, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the values and the gradient of a member."""
        return self._values[place].view(shape), self._grads[place].view(shape)

    def note(self, starts: frozenset[int], *_: Tensor) -> None:
        """Note that members have got a gradient."""
        self.reached |= starts & self.counted

    def forget(self) -> None:
        """Forget the known stacks, because Parameters were frozen."""
        self._stacked.clear()

    def refresh(self) -> None:
        """Cast all values again to the dtypes of the products."""
        for lowered in self._lowered.values():
            lowered.copy_(self._values)

    def stacked(
        self,
        attached: Attached,
        held: Mapping[str, Any],
        names: tuple[str, ...],
        dtype: torch.dtype,
    ) -> Stacked:
        """Return the factors that a layer has of the named trials."""
        key = (attached, names, dtype)
        stacked = self._stacked.get(key)
        if stacked is None:
            entries = {n: attached.forward[n] for n in names if n in attached.forward}
            stacks = [*self._stacks(entries, held, names, dtype)]
            dropout = {n: e.spec.dropout for n, e in entries.items() if e.spec and e.spec.dropout}
            both = (held[e.names[role]] for e in entries.values() for role in ("A", "B"))
            trained = frozenset(t.storage_offset() for t in both)
            marks = frozenset(entry.mark for entry in entries.values())
            stacked = Stacked(tuple(entries.values()), stacks, dropout, trained, marks)
            self._stacked[key] = stacked
        if not stacked.marks <= attached.took_part:
            attached.used(stacked.entries)
        return stacked

    def _stacks(
        self,
        entries: Mapping[str, Entry],
        held: Mapping[str, Any],
        names: Sequence[str],
        dtype: torch.dtype,
    ) -> Iterator[tuple[int, TokenRange]]:
        """Yield the updates of a layer, stacked where they can be, with the place of the first.

        The frozen pairs of pissa and olora are not in the buffer, and each stands alone.
        """
        slots = []
        for place, name in enumerate(names):
            if name not in entries:
                continue
            trained, *frozen = entries[name].recipes(1.0)
            slots.append(Slot.of(place, trained, held))
            for recipe in frozen:
                A, B = (held[key].detach().to(dtype)[None] for key in (recipe.A, recipe.B))
                yield place, TokenRange((0, 0), A, B, recipe.scale, recipe.spans)
        for run in _evenly_spaced(slots):
            yield run[0].place, self._stack(run, dtype)

    def _stack(self, run: Sequence[Slot], dtype: torch.dtype) -> TokenRange:
        """Return views of the values and the gradients of evenly spaced slots."""
        first = run[0]
        step = 0 if len(run) == 1 else run[1].starts[0] - first.starts[0]
        A, B, gA, gB = (
            memory.as_strided((len(run), *shape), (step, *_strides(shape)), start)
            for memory in (self._low(dtype), self._grads)
            for start, shape in zip(first.starts, first.shapes, strict=True)
        )
        return TokenRange((0, 0), A, B, first.scale, first.spans, (gA, gB))

    def _low(self, dtype: torch.dtype) -> Tensor:
        """Return all values in the dtype of a product."""
        if dtype == self._values.dtype:
            return self._values
        if dtype not in self._lowered:
            self._lowered[dtype] = self._values.to(dtype)
        return self._lowered[dtype]


@dataclass(frozen=True)
class Slot:
    """Where A and B of one trial are in the buffer, for one layer.

    Attributes:
        place: Of the trial among those of the pass.
        starts: Where A and B begin, in elements.
        shapes: Of A and of B.
        scale: Factor on `B @ A`.
        spans: Of the output that it reaches; None for all of it.
    """

    place: int
    starts: tuple[int, int]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    scale: float
    spans: Spans | None

    @classmethod
    def of(cls, place: int, recipe: Recipe, held: Mapping[str, Any]) -> Slot:
        """Return the slot of an update of which a layer has the tensors."""
        A, B = held[recipe.A], held[recipe.B]
        starts = (A.storage_offset(), B.storage_offset())
        return cls(place, starts, (tuple(A.shape), tuple(B.shape)), recipe.scale, recipe.spans)

    def step_to(self, other: Slot) -> int | None:
        """Return how far behind this slot the next trial's is; None if no stack can hold both."""
        mine, its = (self.shapes, self.scale, self.spans), (other.shapes, other.scale, other.spans)
        if other.place != self.place + 1 or mine != its:
            return None
        step_of_A, step_of_B = (b - a for a, b in zip(self.starts, other.starts, strict=True))
        return step_of_A if step_of_A == step_of_B > 0 else None


def _evenly_spaced(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """Yield runs of slots, each as far behind the one before as that is behind its own.

    Trials of one config have their slots that far apart as one trial has values.
    """
    run: list[Slot] = []
    for slot in slots:
        step = run[-1].step_to(slot) if run else None
        if run and (step is None or (len(run) > 1 and step != run[-2].step_to(run[-1]))):
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Placement(NamedTuple):
    """Where a module has a trained tensor of an adapter, its role, and the Parameter there."""

    module: nn.Module
    key: str
    role: str
    held: nn.Parameter


class Gradient(NamedTuple):
    """The gradient of a trial.

    Attributes:
        vectors: By vector.
        reached: By member, whether it has got a gradient, maybe 0.
    """

    vectors: Sequence[Tensor]
    reached: Sequence[bool]


class Setting(NamedTuple):
    """How AdamW steps a vector."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


def _joined(members: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return one flat Parameter with the values of several, and a gradient of zeros."""
    vector = nn.Parameter(torch.cat([member.detach().flatten() for member in members]))
    vector.grad = torch.zeros_like(vector)
    return vector


class Flat:
    """The tensors of a trial.

    Args:
        places: Where the trained tensors are.
        trial: The settings.

    Attributes:
        trial: The settings.
        vectors: One flat Parameter of all, or two, of all A and of all B, if their rates differ;
            or more, if a step had made use of a part of them only.
        starts: Where the members begin in the buffer.
    """

    def __init__(self, places: Sequence[Placement], trial: Trial) -> None:
        # By identity: the copy of a tied tensor is listed under each of its names.
        of_B = dict.fromkeys(place.held for place in places if place.role == "B")
        rest = dict.fromkeys(place.held for place in places if place.role != "B")
        self.trial, self._places = trial, places
        self._of_A, self._members = [*rest], [*rest, *of_B]
        whole = trial.b_lr_ratio == 1.0
        parts = [(self._members, 1.0)] if whole else [([*rest], 1.0), ([*of_B], trial.b_lr_ratio)]
        self._parts = [members for members, _ in parts if members]
        self._ratios = [ratio for members, ratio in parts if members]
        self.vectors = [_joined(members) for members in self._parts]
        self.starts = frozenset[int]()
        self._buffer: Buffer | None = None
        self._views: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[Any] = []

    @property
    def n_parameters(self) -> int:
        """The number of trained parameters."""
        return sum(vector.numel() for vector in self.vectors)

    @property
    def example(self) -> nn.Parameter:
        """One of the Parameters."""
        return self._members[0]

    def move(self, buffer: Buffer) -> None:
        """Move values and gradients into another buffer."""
        reached = {member for member in self._members if self._is_reached(member)}
        self.release()
        for vector, members in zip(self.vectors, self._parts, strict=True):
            start = buffer.take(vector).start
            for member in members:
                place = slice(start, start + member.numel())
                member.data, self._views[member] = buffer.views(place, member.shape)
                if member.requires_grad:
                    self._note(member, buffer, start)
                start = place.stop
        self._buffer = buffer
        self.starts = frozenset(int(member.storage_offset()) for member in self._members)
        buffer.reached |= {int(member.storage_offset()) for member in reached}
        self._attach()

    def _note(self, member: nn.Parameter, buffer: Buffer, start: int) -> None:
        """Let the buffer note each gradient of a member."""
        note = partial(buffer.note, frozenset((start,)))
        self._hooks.append(member.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]

    def _is_reached(self, member: nn.Parameter) -> bool:
        return self._buffer is not None and member.storage_offset() in self._buffer.reached

    def release(self) -> None:
        """Let the Parameters go: their gradients are noted no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _attach(self) -> None:
        """Let the gradients of the Parameters be views of those of the vectors."""
        for member, view in self._views.items():
            if member.requires_grad:
                member.grad = view

    def begin(self) -> None:
        """Note that no member has got a gradient."""
        assert self._buffer is not None
        self._buffer.reached -= self.starts
        self._attach()

    def collect(self) -> None:
        """Let further gradients add to those that are there; one that was set to None is zero."""
        for member, view in self._views.items():
            if member.grad is None and member.requires_grad:
                view.zero_()
        self._attach()

    def gradient(self) -> Gradient:
        """Return a copy of the gradients, and which members have got one."""
        grads = [vector.grad.clone() for vector in self.vectors if vector.grad is not None]
        return Gradient(grads, [self._is_reached(member) for member in self._members])

    def set_gradient(self, gradient: Gradient) -> None:
        """Put gradients back that `gradient` returned."""
        self.begin()
        assert self._buffer is not None
        for vector, values in zip(self.vectors, gradient.vectors, strict=True):
            assert vector.grad is not None
            vector.grad.copy_(values)
        both = zip(self._members, gradient.reached, strict=True)
        self._buffer.reached |= {int(member.storage_offset()) for member, is_ in both if is_}

    def settings(self, n_steps: int, lr: float | None) -> Iterator[tuple[nn.Parameter, Setting]]:
        """Yield each vector and how it is stepped after `n_steps` steps.

        `lr` is the rate of A in place of the schedule's.
        """
        trial = self.trial
        for vector, ratio in zip(self.vectors, self._ratios, strict=True):
            rate = trial.lr * ratio * trial.factor(n_steps) if lr is None else lr * ratio
            yield vector, Setting(rate, trial.betas, trial.weight_decay)

    def changed(self) -> tuple[str, str] | None:
        """Return what somebody has done to the Parameters, and what to do; None for nothing."""
        there = all(place.module._parameters.get(place.key) is place.held for place in self._places)
        if not there or self._members[0].data_ptr() != self.vectors[0].data_ptr():
            what = "the model was moved, cast or sharded since the trials were made"
            return what, "Make the trials after .to(), and on a whole model"
        if not all(member.requires_grad for member in self._members):
            what = "its tensors were frozen since the trials were made"
            return what, "Call train_only(model, trials.running)"
        return None

    def cut(self, runs: Callable[[list[nn.Parameter]], list[int]], optimizer: Optimizer) -> None:
        """Cut vectors into runs of members; `runs` says for each member which it belongs to."""
        for vector, members in [*zip(self.vectors, self._parts, strict=True)]:
            pairs = zip(runs(members), members, strict=True)
            parts = [[m for _, m in run] for _, run in groupby(pairs, itemgetter(0))]
            if len(parts) == 1:
                continue
            sizes = [sum(member.numel() for member in part) for part in parts]
            assert vector.grad is not None
            made = [nn.Parameter(piece) for piece in torch.split(vector.detach(), sizes)]
            for piece, grad in zip(made, torch.split(vector.grad, sizes), strict=True):
                piece.grad = grad
            i = next(i for i, v in enumerate(self.vectors) if v is vector)
            self.vectors[i : i + 1] = made
            self._parts[i : i + 1] = parts
            self._ratios[i : i + 1] = [self._ratios[i]] * len(parts)
            optimizer.cut(vector, made)

    def used(self, optimizer: Optimizer) -> set[nn.Parameter]:
        """Return the vectors of the members with a gradient, cut off from others if need be."""
        assert self._buffer is not None
        reached = self._buffer.reached
        if not self.starts <= reached:
            self.cut(lambda members: [m.storage_offset() in reached for m in members], optimizer)
        return {vector for vector in self.vectors if vector.storage_offset() in reached}

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze` was called."""
        return self.vectors[0].grad is None

    def freeze(self) -> None:
        """Train no more: remove the gradients, and keep the values in memory of their own."""
        for tensor in (*self.vectors, *self._members):
            tensor.grad = None
        for member in self._members:
            member.requires_grad_(False)
        self.move(Buffer(self.example, self.n_parameters))

    def fill(self, vectors: Sequence[Tensor], optimizer: Optimizer) -> None:
        """Write values into the vectors, which are cut as these are."""
        ends = list(accumulate(vector.numel() for vector in vectors))
        which, start = {}, 0
        for member in self._members:
            which[member] = bisect_right(ends, start)  # the vector that the member begins in
            start += member.numel()
        self.cut(lambda members: [which[member] for member in members], optimizer)
        for mine, value in zip(self.vectors, vectors, strict=True):
            mine.data.copy_(value)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Set all but B to NaN within the context."""
        kept = [member.detach().clone() for member in self._of_A]
        for member in self._of_A:
            member.data.fill_(float("nan"))
        try:
            yield
        finally:
            for member, values in zip(self._of_A, kept, strict=True):
                member.data.copy_(values)


class Optimizer:
    """One fused AdamW for all trials, which steps vectors of the same settings together."""

    def __init__(self) -> None:
        self._adamw = torch.optim.AdamW([{"params": []}], fused=True)

    def step(self, settings: Iterable[tuple[nn.Parameter, Setting]]) -> None:
        """Step some vectors, each by its own setting."""
        alike: dict[Setting, list[nn.Parameter]] = {}
        for vector, setting in settings:
            alike.setdefault(setting, []).append(vector)
        self._adamw.param_groups = [
            {**self._adamw.defaults, **setting._asdict(), "params": vectors}
            for setting, vectors in alike.items()
        ]
        self._adamw.step()

    def zero(self, flats: Sequence[Flat]) -> None:
        """Set the gradients of some trials to zero, in place."""
        vectors = [vector for flat in flats for vector in flat.vectors]
        self._adamw.param_groups = [{"params": vectors}]
        self._adamw.zero_grad(set_to_none=False)
        for flat in flats:
            flat.begin()

    def cut(self, vector: nn.Parameter, pieces: Sequence[nn.Parameter]) -> None:
        """Give the state of a vector to its pieces."""
        state, start = self._adamw.state.pop(vector, {}), 0
        for piece in pieces:
            part = slice(start, start := start + piece.numel())
            self._adamw.state[piece] = {
                key: (t[part] if t.dim() else t).clone() for key, t in state.items()
            }

    def drop(self, flat: Flat) -> None:
        """Forget a trial's vectors."""
        self._adamw.param_groups = [{"params": []}]
        for vector in flat.vectors:
            self._adamw.state.pop(vector, None)

    def state_of(self, flat: Flat) -> list[dict[str, Any]]:
        """Return the state of each of a trial's vectors."""
        return [dict(self._adamw.state[vector]) for vector in flat.vectors]

    def restore(self, flat: Flat, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the state of each of a trial's vectors."""
        for vector, state in zip(flat.vectors, states, strict=True):
            self._adamw.state[vector] = {k: v.to(vector.device) for k, v in state.items()}


def norms(flats: Sequence[Flat]) -> list[float]:
    """Return the norm of each trial's gradient. The host waits for the device once."""
    grads = [vector.grad for flat in flats for vector in flat.vectors]
    each = iter(torch.stack(list(_norms(grads))).tolist())
    return [math.hypot(*(next(each) for _ in flat.vectors)) for flat in flats]


def clip(flats: Sequence[Flat], norms: Sequence[float], most: Sequence[float | None]) -> None:
    """Scale the gradients whose norm is above its limit, as torch's `clip_grad_norm_` does."""
    factors = [
        1.0 if m is None else min(1.0, m / (n + 1e-6)) for n, m in zip(norms, most, strict=True)
    ]
    pairs = [
        (v.grad, f) for flat, f in zip(flats, factors, strict=True) if f < 1.0 for v in flat.vectors
    ]
    if pairs:
        grads, each = zip(*pairs, strict=True)
        _multiply(grads, each)


def _norm_each(tensors: Sequence[Any]) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def _multiply_each(tensors: Sequence[Any], factors: Sequence[float]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


# In one launch for all tensors where this torch can.
_norms: Callable[[Sequence[Any]], Sequence[Tensor]] = look_up("torch._foreach_norm") or _norm_each
_multiply: Callable[[Sequence[Any], Sequence[float]], None] = (
    look_up("torch._foreach_mul_") or _multiply_each
)

"""Whether a layer's first axis is the rows: seen, never guessed from a length that fits.

A vision tower may get as many pictures as there are rows, a table of positions as many positions,
an expert as many tokens. So it is seen on an example (`see_rows`), or in a call that no example has
told of:

1. Each layer whose axis was not seen before takes the length that fits for the rows.
2. The whole batch then runs under each adapter, and each row takes its own from the outputs.
3. So does another batch of the same tokens, in which marks on what the layers give stand for the
   adapters: new ones add nothing yet, and experts that pick tokens may once get one of each row.
4. Where all is equal, these layers were seen, and are not asked again.
5. Where it differs, or a layer has another length, what was computed in 2 is the output.

Rows and positions in one axis say another thing where each row is one position, as in decoding:
that is seen by itself. An example begins each run where the first began. A live forward that writes
to a buffer, or adds to an attribute, is not run again: its state would be that of another run.

A layer that once had a length that does not follow from the rows is asked
each time. So is one of which the structure of the model says it: experts that are layers of their
own, and what a model of transformers puts in the place of some tokens, such as pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lora_inject.core.functional.torch_inside import version_of
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Attached, attached_to
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.selection import Selected, in_context
from lora_inject.core.layers.survey import Survey, evaluating
from lora_inject.core.roots.root import Root, adapted_modules, root_of
from lora_inject.core.spec.names import joined, parent
from lora_inject.errors import LayerError
from lora_inject.rows.by_row import Marked, Row, Rows
from lora_inject.rows.kept import (
    PLAIN,
    Kept,
    Versions,
    alike,
    contents,
    items,
    random_kept,
    rows_alike,
)

_PLAIN = (Tensor, *PLAIN)
_Form = tuple[int, bool, bool | None]
"""Of an input: how many axes it has, whether the first is the rows alone, and whether each row is
one position; None where it has an axis of positions."""
_FOLLOWED: WeakKeyDictionary[Attached, frozenset[_Form]] = WeakKeyDictionary()
"""Layers whose first axis was seen to be the rows, for inputs of these forms."""
_At = tuple[tuple[Any, ...], int]
"""Of a tensor of outputs: the steps to it, and how many axes it has."""
_RETURNED: WeakKeyDictionary[nn.Module, dict[_At, bool]] = WeakKeyDictionary()
"""Of modules whose rows run one after the other: whether tensors of their outputs have the rows."""
_NOTED: WeakKeyDictionary[Root, int] = WeakKeyDictionary()
"""How often adapters had come or gone when the layers of a root were noted."""


@dataclass
class _Call:
    """One call of a module with a batch."""

    routed: Routed
    module: nn.Module
    own: tuple[Any, Any]  # what the caller gave
    given: tuple[Any, Any]  # the same, or a copy of it from before the forward
    copied: bool
    buffers: list[tuple[Tensor | None, int]]
    tensors: list[tuple[Tensor, int]]
    positions: set[int]
    single: bool  # whether each row is one position
    depth: int = 1  # how often it is in its own forward
    guessed: set[tuple[Attached, _Form]] = field(default_factory=set)
    problem: LayerError | None = None
    misfits: set[Attached] = field(default_factory=set)


_Run = Callable[..., tuple[Any, Any]]
"""Runs a call's module under whoever takes part; its output, and the arguments that it got."""
_TRIED = 3
"""So many rows are changed, one after the other, to see which tensors of the outputs have rows."""
_OPEN: ContextVar[_Call | None] = ContextVar("lora_inject_routed_call", default=None)
_WATCHING: ContextVar[Routed | None] = ContextVar("lora_inject_routed", default=None)


# Functions without a closure, so that compiled code is the same whatever is routed. Another thread
# may leave its context meanwhile, and its hooks then lose their flags.
def _before(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    if torch.compiler.is_compiling():
        return
    call, routed = _OPEN.get(), _WATCHING.get()
    if call is not None:
        call.depth += call.module is module
    elif routed is not None:
        routed.begin(module, args, kwargs or {})


def _after(module: nn.Module, *rest: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    call = _OPEN.get()
    if call is None or call.module is not module:
        return None
    call.depth -= 1
    if call.depth:
        return None
    call.depth = 1  # while it is checked
    try:
        return call.routed.end(call, rest[-1])
    finally:
        _OPEN.set(None)


class Routed(Rows):
    """The adapters of the rows of the calls under one `routed`."""

    asked = "routed()"
    kept: Kept | None = None  # where each run of an example begins

    def __init__(self, rows: Sequence[str | Mapping[str, float] | None], repeat: int = 1) -> None:
        super().__init__(rows, repeat)
        # Whether the last call asked nothing, where each row is one position and where it is not:
        # what the next one gets is then not copied.
        self.quiet: set[bool] = set()
        # The last input of each layer whose rows were seen, and how many positions it has, or 0.
        self._seen: dict[Attached, tuple[Any, int]] = {}

    # ------------------------------------------------------------------------------ asked by layers

    def number_of_rows(self, layer: Adapted, x: Tensor) -> int | None:
        """Return how long the first axis of an input is; None if that is not the rows."""
        length = super().number_of_rows(layer, x)
        if length is not None:
            refuse_ambiguous(layer, x, len(self.rows), self.repeat)
            return length
        each, rest = divmod(x.shape[0] if x.dim() else 0, len(self.rows))
        return x.shape[0] if each and not rest and self._are_positions(layer, each) else None

    def rows_first(self, layer: Adapted, x: Tensor) -> int | None:
        """Return the same; of an input like the last, in which rows were seen, at once."""
        call, attached = _OPEN.get(), layer._lora
        like, n_positions = self._seen.get(attached, (None, 0))
        if call is None or attached.no_rows or like != (call.single, x.dtype, x.shape):
            return super().rows_first(layer, x)
        if n_positions:
            call.positions.add(n_positions)
        return x.shape[0]

    def sees_rows(self, layer: Adapted, x: Tensor) -> bool:
        """Note that a layer takes the first axis for the rows; return False if it never is."""
        attached, call = layer._lora, _OPEN.get()
        if len(self.mixes) == 1:
            return True
        if attached.no_rows:
            self.cannot(layer, self.misfit(layer, x))
            return False
        if call is None:  # the layer by itself
            return True
        whole = self._has_rows(x)
        n_positions = x.shape[1:-1].numel() if whole and x.dim() > 2 else 0
        if n_positions:
            call.positions.add(n_positions)
        in_one_axis = x.dim() < (3 if x.is_floating_point() else 2)
        form = (x.dim(), whole, call.single if in_one_axis else None)
        if form not in _FOLLOWED.get(attached, ()):
            call.guessed.add((attached, form))
        elif whole:
            self._seen[attached] = (call.single, x.dtype, x.shape), n_positions
        return True

    def _are_positions(self, layer: Adapted, n: int) -> bool:
        """Return whether so many tokens for each row may be all positions of the batch."""
        call = _OPEN.get()
        if call is not None:
            return n in call.positions or n / self.repeat in call.positions
        followed = any(not whole for _, whole, _ in _FOLLOWED.get(layer._lora, ()))
        return followed or hasattr(layer, "_is_expert_parallel")  # a stack, by transformers

    def cannot(self, layer: Adapted, problem: LayerError) -> None:
        """Let the batch run under each adapter, because the rows of a layer cannot be told.

        Raises:
            LayerError: The layer was called by itself.
        """
        call = _OPEN.get()
        if call is None:
            raise problem
        call.problem = call.problem or problem
        call.misfits.add(layer._lora)

    # ------------------------------------------------------------------------------------- a call

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Check the calls of a model, or of a part with adapted layers, while the body runs."""
        note_structure(model)
        survey = Survey(model)
        self._selection = root_of(model, "routed", whole=False)[1].selection
        self._carrying = [attached for _, _, attached in adapted_modules(survey)]
        self._versions = Versions(survey.named)
        outer = _WATCHING.get()
        with _hooked([model, *_around_adapted(survey)]):
            try:
                _WATCHING.set(self)
                yield
            finally:
                _WATCHING.set(outer)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a call."""
        if self._selection.current() is self:
            positions = self._positions((args, kwargs))
            copies = self._copies(single := 1 in positions)
            own = args, kwargs
            given = copied(own) if copies else own
            buffers, tensors = self._versions.now(), _versions_of(own)
            _OPEN.set(_Call(self, module, own, given, copies, buffers, tensors, positions, single))

    def end(self, call: _Call, output: Any) -> Any:
        """End a call, and return what takes the place of its output; None for nothing."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or any(t.is_meta for t in tensors):  # it has raised, or there are no values
            return None
        if not (call.guessed or call.problem):
            self.quiet.add(call.single)
            return None
        return self._checked(call, output)

    def _copies(self, single: bool) -> bool:
        """Return whether a call may have to run again. A long cache is not copied for nothing."""

        def is_seen(attached: Attached) -> bool:
            known = {each for *_, each in _FOLLOWED.get(attached, ())}
            return not attached.no_rows and (known == {None} or single in known)

        return single not in self.quiet and not all(map(is_seen, self._carrying))

    def _positions(self, given: Any) -> set[int]:
        """Return how many positions a row may have, by the tensors of a batch."""
        tensors = (t for t in tree_leaves(given) if isinstance(t, Tensor) and not t.is_nested)
        return {t.shape[1] for t in tensors if t.dim() > 1 and self._has_rows(t)}

    def _checked(self, call: _Call, output: Any) -> Any:
        """Return what takes the place of a call's output; None if it is right."""
        self.quiet.discard(call.single)
        if self.kept is None:
            self._refuse_moving(call, self._moved(call))
        if not call.copied and not all(isinstance(x, _PLAIN) for x in tree_leaves(call.given)):
            self._raise(call, "the cache of the call has changed")
        kept = self.kept or Kept(call.module)

        def run(which: Selected, given: Any = call.given) -> tuple[Any, Any]:
            kept.put_back()
            args, kwargs = used = copied(given, tensors=self.kept is not None)
            with in_context({self._selection: which}):
                return call.module(*args, **kwargs), used

        try:
            if call.problem is None and self._is_seen(call, output, run, kept):
                return None
            return self._in_turn(call, run, kept)
        finally:
            kept.put_back()
            for attached in call.misfits:
                attached.no_rows = True

    def _moved(self, call: _Call) -> str:
        """Say what a call has written to; "" if nothing."""
        name = self._versions.moved(call.buffers)
        return repr(name) if name else _written(call.tensors)

    def _is_seen(self, call: _Call, output: Any, run: _Run, kept: Kept) -> bool:
        """Whether each row gets its own adapter where the first axis is taken for the rows."""
        with torch.no_grad(), evaluating(call.module), random_kept(call.module):
            together = output if self.kept else run(self)[0]
            self._refuse_adding(call, kept)
            adapted = [(row, mix) for row, mix in self.mixes.items() if row]
            alike = all(self._has(together, row, run(mix)[0]) for row, mix in adapted)
            if not alike or not self._marks_stay(call, run):
                return False
        for attached, form in call.guessed:
            _FOLLOWED[attached] = _FOLLOWED.get(attached, frozenset()) | {form}
        return True

    def _in_turn(self, call: _Call, run: _Run, kept: Kept) -> Any:
        """Return outputs in which each row is that of the run under its own adapter."""
        apart = self._without_rows(call, run)
        if self.kept is not None:  # an example
            return None
        outputs, used = {}, []
        for row, mix in self.mixes.items():
            outputs[row], given = run(mix)
            used.append(given)
            self._refuse_adding(call, kept)
        return self._by_row(outputs, used, call, apart)

    def _refuse_moving(self, call: _Call, name: str) -> None:
        """Refuse to run a forward again that has written to what later ones read.

        Raises:
            LayerError: It has, and the rows are not told yet, or cannot be.
        """
        if not name:
            return
        found = f"its forward writes to {name}, so it cannot run again to tell the rows"
        remedy = "Call li.see_rows(model, ...) with an example, and begin this batch anew"
        if call.problem is not None:
            found = f"{call.problem.found}; and {found}"
            remedy = "Leave the layers that li.see_rows(model, ...) names out of the adapters"
        raise LayerError(f"{self.asked} with {len(self.rows):,} rows", found, remedy)

    def _refuse_adding(self, call: _Call, kept: Kept) -> None:
        """Refuse a live forward that leaves something else if it runs again."""
        if self.kept is None and (name := kept.moved()):
            self._refuse_moving(call, repr(name))

    def _marks_stay(self, call: _Call, run: Any) -> bool:
        """Whether the rows of another batch, if the module takes it, have their own marks alone."""
        for change in (self._by_value, self._later, _same):
            try:
                if (given := change(call.given)) is None:
                    continue
                together = run(Marked(self), given)[0]
                alone = {row: run(Marked(self, row), given)[0] for row in self.mixes}
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: BLE001, S112 - the module, or a device, refuses such rows
                continue
            return call.problem is None and all(
                self._has(together, row, each) for row, each in alone.items()
            )
        return False

    def _by_value(self, given: Any) -> Any:
        """Return the same tokens in the order of their values; None if they stand in it.

        Tokens of one value are then in few rows: what picks them gets an uneven number of each.
        """
        plain = [t for t in tree_leaves(given) if self._has_rows(t) and not t.is_complex()]
        for tokens in (t.flatten(0, 1) for t in plain if t.dim() > 1 and t.numel()):
            values = tokens.flatten(1)[:, 0] if tokens.dim() > 1 else tokens
            # Not every device can sort numbers of one byte as they are.
            order = (values.float() if values.element_size() == 1 else values).argsort(stable=True)
            if (order[1:] < order[:-1]).any():
                return tree_map(partial(self._in_order, order=order), given)
        return None

    def _in_order(self, leaf: Any, order: Tensor) -> Any:
        """Return the tokens of a batch in another order; other entries as they are."""
        if not self._has_rows(leaf) or leaf.shape[:2].numel() != len(order):
            return leaf
        each = leaf.reshape(len(order), *leaf.shape[2:])
        return each[order.to(leaf.device)].view_as(leaf)

    def _later(self, given: Any) -> Any:
        """Return the same tokens half a row later, the last of a row in the next row.

        Those of a picture are then not in its row.
        """

        def later(leaf: Any) -> Any:
            if not self._has_rows(leaf) or leaf.dim() < 2:
                return leaf
            return leaf.flatten(0, 1).roll((leaf.shape[1] + 1) // 2, 0).view_as(leaf)

        return tree_map(later, given)

    def _has(self, together: Any, row: Row, alone: Any) -> bool:
        """Return whether the rows of one mix are what it gives alone."""
        number, n_compared = [*self.mixes].index(row), 0
        for mine, its in zip(tree_leaves(together), tree_leaves(alone), strict=True):
            alike = isinstance(its, Tensor) and self._has_rows(mine) and its.shape == mine.shape
            if not alike:
                continue
            index = self.index(len(mine), mine.device)[0][number][1]
            n_compared += 1
            if not rows_alike(mine.index_select(0, index), its.index_select(0, index)):
                return False
        return n_compared > 0

    def _without_rows(self, call: _Call, run: _Run) -> set[_At]:
        """Return the tensors of a module's outputs that are as long as the rows by chance.

        Where the tokens of one row change, a tensor that has the rows changes in that row alone.
        """
        known = _RETURNED.setdefault(call.module, {})
        with torch.no_grad(), evaluating(call.module), random_kept(call.module):
            mix = next(mix for row, mix in self.mixes.items() if row)
            whole = dict(_tensors(tree_leaves(run(mix)[0])))
            new = {at: t for at, t in whole.items() if at not in known and self._has_rows(t)}
            for number in range(min(_TRIED, len(self.rows)) if new else 0):
                try:
                    if (given := self._with_other_row(call.given, number)) is None:
                        continue
                    other = dict(_tensors(tree_leaves(run(mix, given)[0])))
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # noqa: BLE001, S112 - the module refuses such rows
                    continue
                for at, tensor in new.items():
                    has_rows = self._is_of_row(number, tensor, other.get(at))
                    if at not in known and has_rows is not None:
                        known[at] = has_rows
        return {at for at, has_rows in known.items() if not has_rows}

    def _is_of_row(self, number: int, before: Tensor, after: Any) -> bool | None:
        """Whether a tensor changes in a row alone; None if it does not change."""
        if not isinstance(after, Tensor) or after.shape != before.shape:
            return False
        each = len(before) // len(self.rows)
        mine, rest = range(number * each, (number + 1) * each), [*range(len(before))]
        del rest[mine.start : mine.stop]
        if not rows_alike(before[rest], after[rest]):
            return False
        return None if rows_alike(before[[*mine]], after[[*mine]]) else True

    def _with_other_row(self, given: Any, number: int) -> Any:
        """Return a batch in which one row has its tokens in another order, or those of the next.

        None if that is the same batch.
        """
        leaves, form = tree_flatten(given)
        rows = [i for i, leaf in enumerate(leaves) if self._has_rows(leaf)]
        tokens = [i for i in rows if not leaves[i].is_floating_point()] or rows
        changed = False
        for i in tokens:
            leaf, each = leaves[i], len(leaves[i]) // len(self.rows)
            mine = slice(number * each, (number + 1) * each)
            other = leaf[mine].roll(1, 1) if leaf.dim() > 1 else leaf[mine]
            if torch.equal(other, leaf[mine]):
                other = leaf.roll(-each, 0)[mine]
            changed |= not torch.equal(other, leaf[mine])
            leaves[i] = leaf.clone()
            leaves[i][mine] = other
        return tree_unflatten(leaves, form) if changed else None

    def _by_row(
        self, outputs: Mapping[Row, Any], used: Sequence[Any], call: _Call, apart: set[_At]
    ) -> Any:
        """Return outputs in which each row is that of the run under its own adapter.

        What the caller gave, such as a cache, then holds the same.
        """
        trees = {row: tree_flatten(output) for row, output in outputs.items()}
        (first, form), *_ = trees.values()
        if not any(self._has_rows(t) and at not in apart for at, t in _tensors(first)):
            self._raise(call, "no tensor of its outputs has the rows first")
        own = self._filled(call, used)
        columns = enumerate(zip(*(leaves for leaves, _ in trees.values()), strict=True))
        whole = [self._merged([*column], (i,), apart, own) for i, column in columns]
        return tree_unflatten(whole, form)

    def _filled(self, call: _Call, used: Sequence[Any]) -> dict[int, Any]:
        """Fill what the caller gave with what each row's run has left in its copy.

        Returns:
            By the address of what the first run got, what the caller gave in its place.
        """
        filled = {}
        for mine, before, *each in zip(*map(_objects, (call.own, call.given, *used)), strict=True):
            held = contents(mine)
            if held is None or all(alike(before, one) for one in each):
                continue
            made = self._merged([contents(one) for one in each], (), set(), {})
            if isinstance(held, dict):
                held.clear()
                held.update(made)
            else:
                held[:] = made
            filled[id(each[0])] = mine
        return filled

    def _merged(
        self, values: list[Any], path: tuple[Any, ...], apart: set[_At], own: Mapping[int, Any]
    ) -> Any:
        """Return one value for those of each run: each row's own, in what holds tensors too.

        None for a tensor without rows that differs, such as a mean over the batch.
        """
        one = values[0]
        if id(one) in own:
            return own[id(one)]
        if all(value is one for value in values):
            return one
        if isinstance(one, Tensor):
            if not self._has_rows(one) or (path, one.dim()) in apart:
                alike = all(torch.equal(one, other) for other in values[1:])
                return one if alike else None
            each, order = self.index(len(one), one.device)
            both = zip(values, each, strict=True)
            parts = [value.index_select(0, index) for value, (_, index) in both]
            return torch.cat(parts).index_select(0, order)
        if isinstance(one, list | tuple):
            columns = enumerate(zip(*values, strict=True))
            return type(one)(self._merged([*c], (*path, i), apart, own) for i, c in columns)
        held = one if isinstance(one, dict) else contents(one)
        if not held:
            return one
        each_held = [value if isinstance(one, dict) else vars(value) for value in values]
        merged = {
            key: self._merged([h[key] for h in each_held], (*path, key), apart, own) for key in held
        }
        if isinstance(one, dict):
            return merged
        made = copy.copy(one)
        made.__dict__.update(merged)
        return made

    def _has_rows(self, leaf: Any) -> bool:
        """Whether the first axis of a tensor is as long as the rows."""
        n = len(self.rows)
        several = isinstance(leaf, Tensor) and leaf.dim() > 0
        return several and leaf.shape[0] in (n, n * self.repeat)

    def _raise(self, call: _Call, why: str) -> None:
        if call.problem is not None:
            raise call.problem
        asked = f"{self.asked} with {len(self.rows):,} rows"
        problem = f"rows cannot be told apart in all layers, and {why}"
        remedy = "Leave layers that do not get the rows first out of the adapters"
        raise LayerError(asked, problem, remedy)


class Example(Routed):
    """The adapters of the rows of an example, of which layers and outputs are noted.

    Args:
        rows: The adapters.
        kept: Of the model, from before the example.
    """

    asked = "see_rows()"

    def __init__(self, rows: Sequence[str | None], kept: Kept) -> None:
        super().__init__(rows)
        self.kept = kept
        self.untold: set[Attached] = set()

    def end(self, call: _Call, output: Any) -> Any:
        """End a call, and note the layers whose rows it has not told."""
        made = super().end(call, output)
        if call.problem is None:  # else that layer is noted
            self.untold |= {a for a, form in call.guessed if form not in _FOLLOWED.get(a, ())}
        return made

    def _copies(self, single: bool) -> bool:
        del single
        return True


_HOOK: Any = "lora_inject.routed"  # one key, as compiled code looks at it
# Which contexts want the hooks. No lock, which an interrupt as it is left would leave taken.
_HOOKED: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def _around_adapted(survey: Survey) -> list[nn.Module]:
    """Return the modules that hold adapted layers, one of which a caller may call by itself."""
    inside = {name for name, module in survey.named if attached_to(module) is not None}
    around = {at for name in inside for at in accumulate(name.split(".")[:-1], joined)}
    return [module for name, module in survey.named if not name or name in around]


@contextmanager
def _hooked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules tell their calls while the body runs, as `register_forward_hook` does it."""
    mine, hooked = object(), dict.fromkeys(modules)
    try:
        for module in hooked:
            _HOOKED.setdefault(module, set()).add(mine)
            for table, value in _tables(module):
                table[_HOOK] = value
        yield
    finally:
        for module in hooked:
            wanting = _HOOKED.setdefault(module, set())
            wanting.discard(mine)
            for table, _ in reversed(_tables(module)) if not wanting else ():
                table.pop(_HOOK, None)
            for table, value in _tables(module) if wanting else ():  # another thread came meanwhile
                table[_HOOK] = value


def _tables(module: nn.Module) -> tuple[tuple[dict[Any, Any], Any], ...]:
    """Return where torch looks for hooks of a module, and what stands there for ours."""
    tables: tuple[tuple[Any, Any], ...] = (
        (module._forward_pre_hooks_with_kwargs, True),
        (module._forward_hooks_with_kwargs, True),
        (module._forward_hooks_always_called, True),
        (module._forward_pre_hooks, _before),
        (module._forward_hooks, _after),
    )
    return tables


def copied(given: Any, *, tensors: bool = False) -> Any:
    """Return arguments in which what a forward may change, such as a cache, is a copy."""

    def copied_one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone() if tensors else leaf
        return leaf if isinstance(leaf, PLAIN) else copy.deepcopy(leaf)

    return tree_map(copied_one, given)


def _objects(given: Any) -> list[Any]:
    """Return what is given, and what tuples of it hold."""
    args, kwargs = given
    listed = [*args, *kwargs.values()]
    for each in listed:
        if type(each) is tuple:
            listed += each
    return listed


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[_At, Tensor]]:
    """Yield the tensors of outputs, with the steps to each."""
    if isinstance(value, Tensor):
        yield (path, value.dim()), value
        return
    held = value if isinstance(value, list | tuple | dict) else contents(value)
    for key, each in [] if held is None else items(held):
        yield from _tensors(each, (*path, key))


def _versions_of(given: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors that are given, with their versions."""
    return [(t, version_of(t)) for t in tree_leaves(given) if isinstance(t, Tensor)]


def _written(tensors: Iterable[tuple[Tensor, int]]) -> str:
    """Say what of the tensors that were given has been written to."""
    moved = any(version_of(tensor) != version for tensor, version in tensors)
    return "a tensor that it is given" if moved else ""


def _same(given: Any) -> Any:
    return given


# ---------------------------------------------------------------------------- what structure says


def note_structure(model: nn.Module) -> None:
    """Note the layers of which no length says anything, until the next inject or eject.

    Layers next to a module with `batch_first=False` may have time before batch.
    """
    injected, root = root_of(model, "routed", whole=False)
    if _NOTED.get(root) == root.n_changes:
        return
    survey = Survey(injected)
    _NOTED[root] = root.n_changes
    picked = {name for mixture in inventory(survey).mixtures for name in mixture.experts}
    pictured, whole = _pictured(survey)
    put = tuple(f"{name}." if name else "" for name in pictured)
    kept = tuple(f"{name}." for name in whole)
    parts = [name for name, m in survey.named if m.__dict__.get("batch_first") is False]
    around = tuple({f"{parent(name)}." if parent(name) else "" for name in parts})
    for path, _, attached in adapted_modules(survey):
        if path in picked or (path.startswith(put) and not path.startswith(kept)):
            attached.no_rows = True
        if f"{path}.".startswith(around):
            attached.time_major = True


def _pictured(survey: Survey) -> tuple[list[str], list[str]]:
    """Return the models of transformers that put features in the place of some tokens.

    And the parts of these that run on all tokens.
    """
    names = {id(module): name for name, module in survey.named}
    models: list[Any] = [m for _, m in survey.named if hasattr(m, "get_placeholder_mask")]
    decoders = [model.get_decoder() for model in models if hasattr(model, "get_decoder")]
    whole = [name for each in decoders if (name := names.get(id(each)))]
    return [names[id(model)] for model in models], whole


def refuse_ambiguous(layer: Adapted, x: Tensor, n_rows: int, repeat: int) -> None:
    """Raise where time, before or after the batch, is as long as the batch."""
    if not layer._lora.time_major:
        return
    if x.dim() > (2 if x.is_floating_point() else 1) and x.shape[1] in (n_rows, n_rows * repeat):
        raise LayerError(
            f"routed() with {n_rows} rows",
            f"a {type(layer).__name__} got an input of shape {tuple(x.shape)} next to a layer "
            "with batch_first=False: which dimension is the batch cannot be told",
            "Give batch_first=True, or pad the batch to another length",
        )

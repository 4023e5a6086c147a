"""Passes that trials share, where each gets what it gets alone.

Whether they may is observed, not derived from the model: the outputs of a shared pass must be those
of each batch alone, and stay as they are when another trial's tensors move. Where they do not, the
trials run in turn, which is always right and only slower.

| a base that | shows it |
|---|---|
| mixes rows (BatchNorm in training, `x - x.mean(0)`) | the outputs are not those alone |
| averages over the longest row of the batch | likewise, of rows whose second half is 0 |
| needs a mask for padding, or draws random numbers | likewise |
| reads one weight for the whole batch | an error of the shared pass |
| has experts that pick tokens | numbers of tokens that do not follow from the batch's shape |
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.generators import generators_of
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.roots.disabling import selecting
from lora_inject.errors import LayerError, LoraInjectError
from lora_inject.rows.seen import rows_alike
from lora_inject.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten
from lora_inject.trials.batches import Forward, Joined, joined_batch, n_tokens, parted, without
from lora_inject.trials.run import Run
from lora_inject.trials.trial_rows import TrialRows


class _Same:
    """An object that equals only itself."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._held is self._held

    def __hash__(self) -> int:
        return id(self._held)


def parts_of(forward: Any) -> Any:
    """Return what tells a forward from others; made anew of the same parts it is the same."""
    if isinstance(forward, partial):
        given = (*forward.args, *forward.keywords.values())
        return parts_of(forward.func), *forward.keywords, *map(_Same, given)
    code = getattr(forward, "__code__", None)
    if code is None:
        return _Same(forward)
    held = [getattr(forward, "__self__", None), *(forward.__defaults__ or ())]
    held += [cell.cell_contents for cell in forward.__closure__ or ()]
    return code, *map(_Same, held)


class _Source(NamedTuple):
    """A generator: how to read its state, to set it, and to seed it."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    seed: Callable[[int], Any]


def _comparable(state: Any) -> Any:
    """Return a state as values that `==` compares."""
    if isinstance(state, tuple):
        return tuple(map(_comparable, state))
    return state.tolist() if hasattr(state, "tolist") else state


@dataclass
class _Known:
    """What was observed of a forward.

    Attributes:
        sites: Where the adapters were that shared a pass; None if trials run in turn.
        shapeless: Entries of the outputs that are built in another way for other rows.
        padded: For each leaf of the outputs, the axes that have positions; None before it was seen.
        lengths: See `TrialRows`.
        draws: Whether the base draws random numbers; None before it was seen.
    """

    sites: frozenset[Any] | None = frozenset()
    shapeless: frozenset[Any] = frozenset()
    padded: Sequence[Sequence[int]] | None = None
    lengths: dict[nn.Module, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    draws: bool | None = None


class Passes:
    """Runs the base for several trials, with one pass for all or few.

    Args:
        model: The model, with the adapters of the trials.
        runs: The trials by name.
        max_tokens: As for `Trials`.
        packed: As for `Trials`.
    """

    def __init__(
        self, model: nn.Module, runs: Mapping[str, Run], max_tokens: int | None, *, packed: bool
    ) -> None:
        self.model, self.runs, self.max_tokens, self.packed = model, runs, max_tokens, packed
        self._modules = [*model.modules()]
        self._numbers = {module: i for i, module in enumerate(self._modules)}
        self._known: dict[Any, _Known] = {}
        self._sites: dict[str, frozenset[Any]] = {}

    def forget(self, name: str) -> None:
        """Forget where a trial's adapter is: another may get its name."""
        self._sites.pop(name, None)

    def outputs(
        self, batches: Mapping[str, Any], forward: Forward, *, drops: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield the outputs of each trial, those of one pass together.

        Args:
            batches: By trial.
            forward: Runs the model on a joined batch.
            drops: Whether dropout of the adapters acts.
        """
        known = self._known_of(batches, forward)
        groups = [*self._groups(batches, known)]
        while groups:
            group = groups.pop(0)
            try:
                made = self._run(group, forward, known, drops=drops)
            except LayerError as error:
                if len(group) == 1:
                    raise
                self._in_turn(known, str(error))
                groups = [{name: batch} for name, batch in group.items()] + groups
                continue
            yield made

    def _groups(self, batches: Mapping[str, Any], known: _Known) -> Iterator[dict[str, Any]]:
        """Yield groups of batches with at most `max_tokens`; each has one trial at least."""
        group: dict[str, Any] = {}
        tokens = 0
        for name, batch in batches.items():
            size = n_tokens(batch)
            full = self.max_tokens is not None and tokens + size > self.max_tokens
            if group and (full or known.sites is None):
                yield group
                group, tokens = {}, 0
            group[name] = batch
            tokens += size
        yield group

    def _run(
        self, group: Mapping[str, Any], forward: Forward, known: _Known, *, drops: bool
    ) -> dict[str, Any]:
        """Run the base once."""
        of = joined_batch(group, packed=self.packed)
        seeds = {n: hash((self.runs[n].trial.seed, self.runs[n].n_passes)) for n in group}
        rows = TrialRows(of, seeds if drops else None, self._numbers, known.lengths)
        seed = seeds[rows.lone] if drops and rows.lone is not None else None
        with selecting(self.model, rows, "Trials.step"), self._drawing(seed, known):
            made = forward(of.batch)
        return parted(without(made, known.shapeless), of, known.padded or ())

    @contextmanager
    def _drawing(self, seed: int | None, known: _Known) -> Iterator[None]:
        """Let a base that draws random numbers draw those of a trial that runs alone."""
        if seed is None or known.draws is False:
            yield
            return
        with self._random_kept() as sources:
            for source in sources:
                source.seed(seed % 2**32)
            start = [_comparable(source.read()) for source in sources]
            yield
            ends = [_comparable(source.read()) for source in sources]
            known.draws = start != ends

    @contextmanager
    def _random_kept(self) -> Iterator[list[_Source]]:
        """Put all generators back where they were: torch's, Python's and NumPy's."""
        devices = {p.device for p in self.model.parameters()}
        sources = [_Source(g.get_state, g.set_state, g.manual_seed) for g in generators_of(devices)]
        sources.append(_Source(random.getstate, random.setstate, random.seed))
        if "numpy" in sys.modules:  # else nobody can draw from it
            of_numpy: Any = sys.modules["numpy"].random
            sources.append(_Source(of_numpy.get_state, of_numpy.set_state, of_numpy.seed))
        before = [source.read() for source in sources]
        try:
            yield sources
        finally:
            for source, state in zip(sources, before, strict=True):
                source.write(state)

    # --------------------------------------------------------------------------------- the referee

    def _known_of(self, batches: Mapping[str, Any], forward: Forward) -> _Known:
        """Return what is known of a forward, after looking at what is not."""
        of = joined_batch(batches, packed=self.packed)
        modes = tuple(module.training for module in self._modules)
        shapes = tuple(t.dim() for t in tree_leaves(of.batch) if isinstance(t, Tensor))
        uneven = len(set(of.lengths.values())) > 1
        known = self._known.setdefault((parts_of(forward), modes, shapes, uneven), _Known())
        sites = frozenset[Any]().union(*map(self._sites_of, batches))
        if len(batches) > 1 and known.sites is not None and not sites <= known.sites:
            self._look(batches, forward, known)
        return known

    def _sites_of(self, name: str) -> frozenset[Any]:
        """Return what tells where an adapter is."""
        if name not in self._sites:
            self._sites[name] = frozenset(
                (module, entry.param, entry.spec is None)
                for module in self._modules
                if (attached := attached_to(module)) is not None
                for entry in attached.entries(name)
            )
        return self._sites[name]

    def _look(self, batches: Mapping[str, Any], forward: Forward, known: _Known) -> None:
        """Look whether trials may share passes of a forward, and note it."""
        new: list[str] = []  # each of them has a layer that no one before it has
        seen = known.sites or frozenset()
        for name in batches:
            if not self._sites_of(name) <= seen:
                new.append(name)
                seen |= self._sites_of(name)
        others = (name for name in batches if name not in new)
        some = {n: batches[n] for n in [*new, *others][: max(2, len(new))]}
        with torch.no_grad(), _buffers_kept(self.model), self._random_kept():
            problem = self._why_not(some, new, forward, known)
        if problem:
            self._in_turn(known, problem)
        else:
            known.sites = seen

    def _in_turn(self, known: _Known, problem: str) -> None:
        known.sites, known.padded = None, None
        warnings.warn(f"trials run in turn: {problem}", stacklevel=2)

    def _why_not(
        self, some: Mapping[str, Any], new: Sequence[str], forward: Forward, known: _Known
    ) -> str:
        """Say why trials cannot share a pass; "" if they can."""

        def run(group: Mapping[str, Any]) -> dict[str, Any]:
            return self._run(tree_map(_own, dict(group)), forward, known, drops=False)

        alone = {name: run({name: batch})[name] for name, batch in some.items()}
        try:
            together = run(some)
            pairs = [(alone[name], together[name]) for name in some]
            known.shapeless = frozenset(key for pair in pairs for key in _other_entries(*pair))
            if known.shapeless:
                alone = {name: without(each, known.shapeless) for name, each in alone.items()}
                together = run(some)
            if known.padded is None:
                known.padded = _padded(together, alone, joined_batch(some, packed=self.packed))
                together = run(some) if any(known.padded) else together
            for name in some:
                if not _alike(together[name], alone[name]):
                    return (
                        f"the rows of {name!r} have other outputs beside those of others: the base "
                        "mixes rows, draws random numbers, or needs a mask for padding"
                    )
            for name in new:
                with _moved(self.runs[name].parameters):
                    after = run(some)
                if any(not _alike(together[n], after[n]) for n in some if n != name):
                    return f"the adapter of {name!r} changes outputs of others"
            if not self.packed:
                return self._why_not_others(some, run, alone)
        except (LoraInjectError, RuntimeError) as error:
            return str(error)
        return ""

    def _why_not_others(self, some: Mapping[str, Any], run: Any, alone: Mapping[str, Any]) -> str:
        """Look at other rows than those that are given, if the base takes such.

        1. The first trial's stay, and the others get other ones: one batch for all hides mixing.
        2. Those of the first trial are shorter than the others'.
        3. All are alike, and of one token: experts that pick tokens get other numbers of these.
        """
        first, *others = some
        changed = {name: tree_map(_other_values, some[name]) for name in others}
        short = tree_map(_half, some[first])
        like = tree_leaves(some[first])
        alike = {name: _filled(batch, like) for name, batch in some.items()}
        try:
            beside = run({first: some[first], **changed})[first]
            shorter, shorter_alone = run({**some, first: short})[first], run({first: short})[first]
            run(alike)
        except LayerError as error:
            return str(error)
        except Exception:  # noqa: BLE001 - the base refuses such rows
            return ""
        if not _alike(beside, alone[first]):
            return (
                f"the rows of {first!r} have other outputs beside other rows: the base mixes rows"
            )
        if not _alike(shorter, shorter_alone):
            return f"shorter rows of {first!r} have other outputs beside longer ones of others"
        return ""


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back, such as the statistics of BatchNorm."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextmanager
def _moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Add 1 to parameters, without a change of their versions."""
    kept = [p.detach().clone() for p in parameters]
    try:
        for parameter in parameters:
            parameter.data.add_(1.0)
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def _own(leaf: Any) -> Any:
    """Return a leaf of a batch that a forward may change."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _half(leaf: Any) -> Any:
    """Return rows of whole numbers (tokens, masks) whose second half is 0."""
    if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.is_floating_point():
        return leaf
    short = leaf.clone()
    short[:, (leaf.shape[1] + 1) // 2 :] = 0
    return short


def _other_values(leaf: Any) -> Any:
    """Return other rows: numbers within their range, or all tokens as the first."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    return leaf * 0.5 + 0.1 if leaf.is_floating_point() else _first_of(leaf).expand_as(leaf).clone()


def _filled(batch: Any, like: Sequence[Any]) -> Any:
    """Return rows that are all the first token of some others."""
    leaves, form = tree_flatten(batch)
    filled = [
        _first_of(other).expand_as(leaf).clone()
        if isinstance(leaf, Tensor) and leaf.dim()
        else leaf
        for leaf, other in zip(leaves, like, strict=True)
    ]
    return tree_unflatten(filled, form)


def _first_of(leaf: Tensor) -> Tensor:
    """Return the first position of the first row, with as many axes."""
    return leaf[(slice(1),) * min(leaf.dim(), 2)]


def _padded(
    together: Mapping[str, Any], alone: Mapping[str, Any], of: Joined
) -> list[tuple[int, ...]]:
    """Return for each leaf the axes that are longer beside longer rows than alone."""
    shortest = min(of.lengths, key=of.lengths.__getitem__)
    pair = (of.lengths[shortest], of.longest)
    leaves = zip(_leaves(alone[shortest]), _leaves(together[shortest]), strict=True)
    axes: list[tuple[int, ...]] = []
    for one, both in leaves:
        tensors = isinstance(one, Tensor) and isinstance(both, Tensor) and one.dim() == both.dim()
        shapes = enumerate(zip(one.shape, both.shape, strict=True)) if tensors else ()
        axes.append(tuple(d for d, sizes in shapes if d and sizes == pair and pair[0] != pair[1]))
    return axes if any(axes) else []


def _other_entries(one: Any, other: Any) -> list[Any]:
    """Return the keys of entries with other numbers of leaves."""
    if not isinstance(one, Mapping):
        return []
    return [key for key in one if len(tree_leaves(one[key])) != len(tree_leaves(other[key]))]


def _leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, None among them."""
    leaves: list[Any] = tree_flatten(tree)[0]
    return leaves


def _alike(one: Any, other: Any) -> bool:
    """Whether outputs are equal but for what rounding may do."""
    mine, its = _leaves(one), _leaves(other)
    if len(mine) != len(its):
        return False
    for a, b in zip(mine, its, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_floating_point():
            continue
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        if not rows_alike(a.nan_to_num(), b.nan_to_num()):
            return False
    return True

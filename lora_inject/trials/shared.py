"""Passes that trials share, where each gets what it gets alone.

Whether they may is observed, not derived from the model: a trial's outputs must be those of its
batch alone, beside the others' rows, and beside other rows of others whose tensors have moved.
Where they are not, the trials run in turn, which is always right and only slower.

| a base that | shows it |
|---|---|
| mixes rows (`x - x.mean(0)`, negatives within the batch) | other outputs beside other rows |
| averages over the longest row of the batch | other outputs of shorter rows |
| needs a mask for padding, or draws random numbers | other outputs beside the others |
| reads one weight for the whole batch | an error of the shared pass |
| has experts that pick tokens | numbers of tokens that do not follow from the batch's shape |

A trial's dropout is a function of its seed, the number of its pass and the layer. So it is the same
whoever else trains, and in a checkpoint that recomputes, and draws from no generator of others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Entry, factors_of, held_by
from lora_inject.core.layers.kinds import LoRALinear, gains_in_forward
from lora_inject.core.layers.selection import Mix, Selected
from lora_inject.core.roots.selecting import selecting
from lora_inject.errors import LayerError, LoraInjectError, StateError
from lora_inject.rows.by_row import Marked, Rows, Taking, row_of
from lora_inject.rows.kept import Kept, random_kept, rows_alike
from lora_inject.trials.batches import Form, Forward, Joined, joined_batch, leaves_of, n_tokens
from lora_inject.trials.run import Run, Sites

MOST_KNOWN = 64
"""Forms of batches that are remembered: one with a number of its step is another one each time."""
Lengths = dict[nn.Module, tuple[int, tuple[int, ...]]]
"""For each layer what it got for each row in the first pass, and the widths of that batch."""


class TrialRows(Rows):
    """The trial of each row of a pass.

    Args:
        of: The joined batch.
        seeds: What the dropout of each trial follows from; None for no dropout.
        numbers: The number of each module.
        lengths: What layers got before. It must go on so.
    """

    asked = "Trials.step"

    def __init__(
        self,
        of: Joined,
        seeds: Mapping[str, int] | None,
        numbers: Mapping[nn.Module, int],
        lengths: Lengths,
    ) -> None:
        super().__init__([n for n, size in of.sizes.items() for _ in range(size)])
        self.of, self.seeds, self.numbers, self.lengths = of, seeds, numbers, lengths
        (lone, *others) = of.sizes
        self.lone = None if others else lone
        self._whole = Mix({lone: 1.0})

    # ------------------------------------------------------------------------------------ seams

    def forward(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each row, or of the only trial."""
        if self.lone is None:
            return super().forward(layer, args, kwargs)
        if isinstance(layer, LoRALinear):
            recipes = layer._lora.recipes(self._whole)
            if any(recipe.dropout for recipe in recipes):
                return self._alone(layer, self.lone, args, kwargs)
        return self._whole.forward(layer, args, kwargs)

    def read(
        self, layer: Adapted, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool
    ) -> Any:
        """Return W + delta of the only trial; of several its values are those of none."""
        if self.lone is None:
            return super().read(layer, param, raw, entries, outside=outside)
        return self._whole.read(layer, param, raw, entries, outside=outside)

    def drops(self, layer: nn.Module) -> bool:
        """Return whether dropout of adapters acts in a layer: in any mode of the base."""
        del layer
        return self.seeds is not None

    def alone(self, mix: Mix, n: int) -> Selected:
        """Return the pass of n rows of one trial by themselves; it drops the same elements."""
        (name,) = mix.names
        sizes, lengths = {name: n}, {name: self.of.lengths[name]}
        of = self.of._replace(sizes=sizes, lengths=lengths)
        return TrialRows(of, self.seeds, self.numbers, self.lengths)

    def number_of_rows(self, layer: Adapted, x: Tensor) -> int | None:
        """Return how long the first axis of an input is; None if that is not the rows.

        A layer gets all positions of each row, or always as many, or always as many more. What got
        all positions at first must go on so: experts that pick tokens by their values may get all
        of a short batch, and half of each row of one that is twice as long.
        """
        n, widths = len(self.rows), self.of.widths
        if not x.dim() or not x.shape[0] or x.shape[0] % n:
            return None
        each = x.shape[0] // n
        first, before = self.lengths.setdefault(layer, (each, widths))
        both = zip(widths, before, strict=False)
        follows = any(each - now == first - then for now, then in both)
        return x.shape[0] if follows or (each == first and first not in before) else None

    # ------------------------------------------------------------------------------------- dropout

    def dropped(self, layer: Adapted, x: Tensor, taking: Taking) -> tuple[Tensor, bool]:
        """Return the input of the adapters after the dropout of each trial."""
        p = {entry.adapter: entry.spec.dropout for entry in taking.entries if entry.spec}
        if self.seeds is not None and any(p.values()):
            each = len(x) // len(self.rows)
            parts = torch.split(x, [n * each for n in self.of.sizes.values()])
            named = zip(self.of.sizes, parts, strict=True)
            x = torch.cat([self._drop(layer, n, part, p.get(n, 0.0)) for n, part in named])
        return x, False

    def _alone(
        self, layer: LoRALinear, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a linear layer of one trial that has dropout."""
        recipes = layer._lora.choose(self._whole)  # notes the use
        x = layer._lora_input(args, kwargs)
        kept = self._drop(layer, name, x, max(recipe.dropout for recipe in recipes))
        updates = factors_of(recipes, held_by(layer), training=False)
        gains = gains_in_forward(layer, self._whole, recipes)
        return layer._lora_dropped(args, kwargs, kept, updates, gains)

    def _drop(self, layer: Adapted, name: str, x: Tensor, p: float) -> Tensor:
        """Drop elements of one trial's rows, drawn for what is not padded; the rest stays."""
        if not p or self.seeds is None:
            return x
        seed = hash((self.seeds[name], self.numbers[layer])) % 2**63
        draw = torch.Generator(x.device).manual_seed(seed)
        each = x.reshape(self.of.sizes[name], -1, x.shape[-1])
        own = self.of.lengths[name] if each.shape[1] == self.of.longest else each.shape[1]
        part = each[:, :own]
        kept = torch.rand(part.shape, generator=draw, device=x.device, dtype=torch.float32) >= p
        dropped = part * kept.to(x.dtype) / (1 - p)
        return torch.cat([dropped, each[:, own:]], 1).view(x.shape)


_PLAIN = (bool, int, float, str, bytes, type(None))


def told_by(batch: Any) -> tuple[Any, list[Any]]:
    """Return what tells a batch from others: all but sizes and values of its rows.

    A forward may compute something else where an entry has another name, is missing, or is a flag.

    Returns:
        What is compared by value, and what by identity.
    """
    leaves, form = tree_flatten(batch)
    values: list[Any] = []
    objects: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            values.append((leaf.dtype, leaf.dim(), None if leaf.dim() else leaf.item()))
        elif isinstance(leaf, _PLAIN):
            values.append((type(leaf), leaf))
        else:
            objects.append(leaf)
    return (repr(form), *values), objects


@dataclass
class _Known:
    """What was observed of the forward with batches of one form.

    Attributes:
        objects: Of the batch; kept, so that no other object gets the address of one.
        in_turn: Whether trials run in turn.
        sites: Where those that were looked at have their tensors.
        form: Of the outputs; None before it was seen.
        lengths: What layers got.
        moved: The buffers of the base that it moves in training; None before it was seen.
    """

    objects: list[Any]
    in_turn: bool = False
    sites: set[Sites] = field(default_factory=set)
    form: Form | None = None
    lengths: Lengths = field(default_factory=dict)
    moved: list[str] | None = None


class Passes:
    """Runs the base for several trials, with one pass for all or few.

    Args:
        model: The model, with the adapters of the trials.
        runs: The trials by name.
        forward: As for `Trials`.
        max_tokens: As for `Trials`.
    """

    def __init__(
        self, model: nn.Module, runs: Mapping[str, Run], forward: Forward, max_tokens: int | None
    ) -> None:
        self.model, self.runs, self.forward, self.max_tokens = model, runs, forward, max_tokens
        self._modules = [*model.modules()]
        self._numbers = {module: i for i, module in enumerate(self._modules)}
        self._known: dict[Any, _Known] = {}

    def outputs(self, batches: Mapping[str, Any], *, drops: bool) -> Iterator[dict[str, Any]]:
        """Yield the outputs of each trial, those of one pass together.

        Args:
            batches: By trial.
            drops: Whether dropout of the adapters acts.
        """
        whole = joined_batch(batches)
        known = self._known_of(batches, whole, drops=drops)
        groups = [*self._groups(batches, known)]
        while groups:
            group = groups.pop(0)
            of = whole if len(group) == len(batches) else joined_batch(group)
            try:
                made = self._pass(of, known, drops=drops)
            except LayerError as error:
                if len(group) == 1:
                    raise
                self._let_run_in_turn(known, str(error))
                groups = [{name: batch} for name, batch in group.items()] + groups
                continue
            yield (known.form or Form()).parted(made, of)

    def _groups(self, batches: Mapping[str, Any], known: _Known) -> Iterator[dict[str, Any]]:
        """Yield groups of batches with at most `max_tokens`; each has one trial at least."""
        group: dict[str, Any] = {}
        tokens = 0
        for name, batch in batches.items():
            size = n_tokens(batch)
            full = self.max_tokens is not None and tokens + size > self.max_tokens
            if group and (full or known.in_turn):
                yield group
                group, tokens = {}, 0
            group[name] = batch
            tokens += size
        yield group

    def _pass(self, of: Joined, known: _Known, *, drops: bool) -> Any:
        """Return the outputs of a pass, in which a base that draws does it by trial."""
        seeds = {n: hash((self.runs[n].trial.seed, self.runs[n].n_passes)) for n in of.sizes}
        rows = self._rows(of, known, seeds if drops else None)
        alone = drops and rows.lone is not None
        own = [seed % 2**63 for seed in seeds.values()]
        with random_kept(self.model, *own) if alone else nullcontext():
            return self._run(of, rows)

    def _rows(self, of: Joined, known: _Known, seeds: Mapping[str, int] | None = None) -> TrialRows:
        """Return the rows of a pass; without seeds no dropout acts."""
        return TrialRows(of, seeds, self._numbers, known.lengths)

    def _run(self, of: Joined, selected: Selected) -> Any:
        """Run the base once, and return its outputs."""
        with selecting(self.model, selected, "Trials.step"):
            return self.forward(of.batch)

    # --------------------------------------------------------------------------------- the referee

    def _known_of(self, batches: Mapping[str, Any], of: Joined, *, drops: bool) -> _Known:
        """Return what is known of such a batch, after a look at trials on sites that are new."""
        modes = tuple(module.training for module in self._modules)
        values, objects = told_by(of.batch)
        uneven = len(set(of.lengths.values())) > 1
        key = (*map(id, objects), modes, values, uneven)
        known = self._known.setdefault(key, _Known(objects))
        if len(self._known) > MOST_KNOWN:
            self._known.pop(next(iter(self._known)))
        if drops and len(self.runs) > 1:
            self._check_still(known, batches)
        for group in [*self._groups(batches, known)] if not known.in_turn else ():
            new = {sites: n for n in group if (sites := self.runs[n].sites) not in known.sites}
            if not new or len(group) == 1:
                continue
            names = dict.fromkeys([*new.values(), *group])
            some = {name: group[name] for name in [*names][: max(2, len(new))]}
            kept = Kept(self.model, buffers=True)
            try:
                with torch.no_grad(), random_kept(self.model):
                    problem = self._why_not(some, known)
            finally:
                kept.put_back()
            if problem:
                self._let_run_in_turn(known, problem)
                break
            known.sites |= new.keys()
        return known

    def _check_still(self, known: _Known, batches: Mapping[str, Any]) -> None:
        """Refuse a base whose buffers move in training: the trials would share them.

        Each would be judged with what the others left in the statistics of BatchNorm.
        """
        if known.moved is None:
            one = dict([next(iter(batches.items()))])
            kept = Kept(self.model, buffers=True)
            try:
                with torch.no_grad(), random_kept(self.model):
                    self._pass(joined_batch(one), known, drops=False)
                known.moved = kept.moved_buffers()
            finally:
                kept.put_back()
        if known.moved:
            problem = f"its forward moves {known.moved[0]!r} of the base, which all trials share"
            remedy = "Put that layer in eval mode, or train each of them by itself"
            raise StateError("Trials.step", problem, remedy)

    def _let_run_in_turn(self, known: _Known, problem: str) -> None:
        known.in_turn, known.form = True, None
        warnings.warn(f"trials run in turn: {problem}", stacklevel=2)

    def _why_not(self, some: Mapping[str, Any], known: _Known) -> str:
        """Say why trials cannot share a pass; "" if each gets in it what it gets alone."""
        try:
            unlike = self._unlike(some, known, marked=False)
            for short in range(2):
                unlike = unlike or self._unlike_with(_others(some, short), known)
        except torch.OutOfMemoryError:
            raise
        except (LoraInjectError, RuntimeError, ValueError) as error:
            return str(error) or type(error).__name__
        if unlike is None:
            return ""
        return (
            f"the rows of {unlike!r} have other outputs beside those of others: the base mixes "
            "rows, draws random numbers, or needs a mask for padding"
        )

    def _unlike_with(self, choices: Sequence[Mapping[str, Any]], known: _Known) -> str | None:
        """Return the same with marks, for the first of some batches that the base takes."""
        *others, given = choices
        for batches in others:
            try:
                return self._unlike(batches, known, marked=True)
            except (LayerError, torch.OutOfMemoryError):
                raise
            except Exception:  # noqa: BLE001, S112 - the base refuses such rows
                continue
        return self._unlike(given, known, marked=True)

    def _unlike(self, batches: Mapping[str, Any], known: _Known, *, marked: bool) -> str | None:
        """Return a trial whose outputs beside the others are not those of its batch alone."""
        whole = joined_batch(batches)
        rows, alone = self._rows(whole, known), {}
        outputs = self._run(whole, Marked(rows) if marked else rows)
        for name, batch in batches.items():
            of = joined_batch({name: batch})
            mine = Marked(rows, row_of(name)) if marked else self._rows(of, known)
            alone[name] = self._run(of, mine)
        if known.form is None:
            known.form = Form.seen(outputs, alone, whole)
        form, together = known.form, known.form.parted(outputs, whole)
        return next((n for n in batches if not _alike(together[n], form.kept(alone[n]))), None)


def _others(some: Mapping[str, Any], short: int) -> list[Mapping[str, Any]]:
    """Return other rows of the same sizes, first those that tell most; the given ones last.

    Every second trial has the first token of the next one throughout: one batch for all hides
    mixing, and experts that pick tokens get other numbers of these. The rows of the rest are
    shorter. The base may refuse either.
    """
    names = [*some]

    def other(i: int, change: Callable[[Any], Any]) -> Any:
        mine, its = some[names[i]], some[names[(i + 1) % len(names)]]
        return tree_map(change, mine) if i % 2 == short else tree_map(_one_token, mine, its)

    changes = (_half, lambda leaf: leaf)
    return [
        *({name: other(i, change) for i, name in enumerate(names)} for change in changes),
        some,
    ]


def _half(leaf: Any) -> Any:
    """Return rows of whole numbers (tokens, masks) whose second half is 0."""
    if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.is_floating_point():
        return leaf
    short = leaf.clone()
    short[:, (leaf.shape[1] + 1) // 2 :] = 0
    return short


def _one_token(leaf: Any, other: Any) -> Any:
    """Return rows that are all the first token of others, or numbers of the other sign."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    first = other[(slice(1),) * min(leaf.dim(), 2)].expand_as(leaf)
    return first * -0.5 if leaf.is_floating_point() else first.clone()


def _alike(one: Any, other: Any) -> bool:
    """Whether outputs are equal but for what rounding may do."""
    mine, its = leaves_of(one), leaves_of(other)
    if len(mine) != len(its):
        return False
    for a, b in zip(mine, its, strict=True):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        if not both or not (a.is_floating_point() or a.is_complex()):
            continue
        if a.shape != b.shape or not rows_alike(a, b):
            return False
    return True

"""Checks that a forward keeps trials apart, before the first step.

The hypothesis of all of them: the outputs of a trial depend on its own rows and adapter alone. A
forward is run again with other values where they must have no influence, and every other output
must stay as it was.

    linear layers, attention within a row:  other rows of 'a' leave the outputs of 'b': passes
    BatchNorm in training, x - x.mean(0):   other rows of 'a' move the outputs of 'b':  refused

"As it was" is bit for bit, as both runs have the same shapes. Only a stack of experts sorts the
tokens of all trials and multiplies as many as an expert gets: there it is up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.errors import LoraInjectError, StateError
from lora_inject.rows.expert_rows import sorts_tokens
from lora_inject.trees import tree_leaves, tree_map
from lora_inject.trials.batches import Joined, Padding, joined_batch, parted
from lora_inject.trials.counts import Counts
from lora_inject.trials.drawing import Draws
from lora_inject.trials.flat import Flat
from lora_inject.trials.other_rows import with_other_rows

Run = Callable[[Joined], Any]
"""Runs the base on a joined batch, without dropout."""


class Checks:
    """The checks that were made, by forward, training modes and entries of the batch.

    Whether a forward mixes trials does not depend on the values of their adapters, but on where
    these are. So another trial on the same layers is not checked again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [*model.modules()]
        self._exact = not any(map(sorts_tokens, self._modules))
        self._sites: dict[str, frozenset[Any]] = {}
        self._apart: dict[Any, frozenset[Any]] = {}
        self._paddings: dict[Any, Padding] = {}
        self._counts: dict[Any, Counts] = {}

    def joined(
        self,
        batches: Mapping[str, Any],
        flats: Mapping[str, Flat],
        run: Run,
        forward: Any,
        *,
        packed: bool,
    ) -> Joined:
        """Join batches, and check that their forward keeps the trials apart.

        Args:
            batches: By trial.
            flats: The tensors of the trials.
            run: Runs the base on a joined batch, without dropout.
            forward: What tells this forward from others.
            packed: Whether the batches are packed.
        """
        of = joined_batch(batches, packed=packed)
        key = self._key_of(of, forward)
        if key not in self._apart:  # also after a check that failed
            self._counts[key] = Counts()
        of = of._replace(counts=self._counts[key])
        unchecked = self._unchecked(batches, key)
        if key not in self._apart or (unchecked and len(batches) > 1):
            self._check_apart(batches, unchecked, flats, run, key, packed=packed)
        if of.lengths is None:
            return of
        if key not in self._paddings:
            padding = check_padding(run, batches, of, self._layers(), exact=self._exact)
            self._paddings[key] = padding
        return of._replace(padding=self._paddings[key])

    def forget(self, name: str) -> None:
        """Forget where a trial's adapter is: another may get its name."""
        self._sites.pop(name, None)

    def _key_of(self, of: Joined, forward: Any) -> Any:
        """Return what a check holds for: a forward, modules' modes, the entries of a batch."""
        modes = tuple(module.training for module in self._modules)
        entries = tuple(of.batch) if isinstance(of.batch, Mapping) else type(of.batch)
        return _parts_of(forward), modes, entries, len(of.sizes) == 1

    def _unchecked(self, batches: Iterable[str], key: Any) -> list[str]:
        """Return trials of which each has a layer that no trial before it has, or one checked."""
        checked, unchecked = self._apart.get(key, frozenset()), []
        for name in batches:
            if not self._sites_of(name) <= checked:
                unchecked.append(name)
                checked |= self._sites_of(name)
        return unchecked

    def _check_apart(
        self,
        batches: Mapping[str, Any],
        unchecked: Sequence[str],
        flats: Mapping[str, Flat],
        run: Run,
        key: Any,
        *,
        packed: bool,
    ) -> None:
        """Check that some trials do not change each other's outputs, and note their layers."""
        few = {name: batches[name] for name in _two_at_least(unchecked, batches)}
        some = joined_batch(few, packed=packed)._replace(counts=self._counts[key])
        broken = {name: flats[name] for name in unchecked}
        _Apart(_on_copies(run), some, self._layers(), exact=self._exact).check(broken)
        if self._counts[key].unsure:
            _check_counts(run, some)
        known = self._apart.get(key, frozenset())
        self._apart[key] = known.union(*map(self._sites_of, unchecked))

    def _layers(self) -> list[nn.Module]:
        return [module for module in self._modules if attached_to(module) is not None]

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


class _Same:
    """An object that equals only itself."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._held is self._held

    def __hash__(self) -> int:
        return id(self._held)


def _parts_of(forward: Any) -> Any:
    """Return what tells a forward from others; made anew of the same parts it is the same."""
    if isinstance(forward, functools.partial):
        keywords = ((key, _Same(value)) for key, value in sorted(forward.keywords.items()))
        return _parts_of(forward.func), *map(_Same, forward.args), *keywords
    code = getattr(forward, "__code__", None)
    if code is None:
        return _Same(forward)
    held = [getattr(forward, "__self__", None), *(forward.__defaults__ or ())]
    held += [cell.cell_contents for cell in forward.__closure__ or ()]
    return code, *map(_Same, held)


def _two_at_least(names: Sequence[str], of: Iterable[str]) -> list[str]:
    """Return names, with another one next to a name that would be alone.

    Whether rows mix does not depend on how many there are, so few trials make a check cheap.
    """
    return [*names, *(name for name in of if name not in names)][: max(2, len(names))]


def _on_copies(run: Run) -> Run:
    """Return a run that gets a batch of its own each time, as a forward may change its batch."""

    def own(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return lambda of: run(of._replace(batch=tree_map(own, of.batch)))


class _Apart:
    """The check that no trial's rows or adapter change another's outputs.

    Args:
        run: Runs the base on a joined batch.
        of: The rows of some trials.
        layers: The adapted layers.
        exact: Whether outputs must stay bit for bit.
    """

    def __init__(self, run: Run, of: Joined, layers: Sequence[nn.Module], *, exact: bool) -> None:
        self._run, self._of, self._layers, self._exact = run, of, layers, exact

    @torch.no_grad()
    def check(self, flats: Mapping[str, Flat]) -> None:
        """Run the base with other rows of each trial, and with broken adapters of those in `flats`.

        Raises:
            StateError: Trials mix, or the forward draws numbers or leaves an adapter out.
        """
        draws = Draws(p.device for layer in self._layers for p in layer.parameters())
        if self._of.counts is not None:
            self._of.counts.learns = True
        plain = parted(self._run(self._of), self._of)
        if self._of.counts is not None:
            self._of.counts.learns = False
        if draws.were_used():
            raise StateError(
                "step",
                "the forward of the base draws random numbers, one stream for all trials",
                "Set the base's own dropout to 0, or train in eval mode",
            )
        if len(self._of.sizes) > 1:
            self._check_repeats(plain)
            for name in self._of.sizes:
                self._check_other_rows(name, plain)
            for name, flat in flats.items():
                self._check_broken(name, flat, plain)

    def _check_repeats(self, plain: Mapping[str, Any]) -> None:
        again = parted(self._run(self._of), self._of)
        if not all(_same(plain[name], again[name], self._exact) for name in plain):
            raise StateError(
                "step",
                "the forward of the base returns other values when it runs again on the same rows",
                "Let it depend on its batch alone, without state or random numbers of its own",
            )

    def _check_other_rows(self, name: str, plain: Mapping[str, Any]) -> None:
        """Check the outputs of the others when a trial has other rows."""
        failure: Exception | None = None
        for changed in with_other_rows(self._of, name):
            try:
                outputs = parted(self._run(changed), changed)
            except LoraInjectError:
                raise
            except Exception as error:  # noqa: BLE001 - the model refuses such rows
                failure = error
                continue
            self._compare(name, plain, outputs)
            return
        raise StateError(
            f"step, rows of {name!r}",
            "whether they change the outputs of other trials cannot be seen: "
            + (f"with other rows the forward raises {failure!r}" if failure else "all are 0"),
            "Give other rows in the first step, or train that adapter by itself",
        )

    def _check_broken(self, name: str, flat: Flat, plain: Mapping[str, Any]) -> None:
        """Check the outputs of the others when a trial's A is NaN, and that its own are then, too.

        Packed, 1 is added to the outputs of its tokens, because a masked attention multiplies them
        by 0.
        """
        with self._moved(name) if self._of.packed else flat.broken():
            broken = parted(self._run(self._of), self._of)
        self._compare(name, plain, broken)
        if not _same(plain[name], broken[name], True):
            return
        leaves = [t for t in tree_leaves(plain[name]) if isinstance(t, Tensor)]
        if any(t.isnan().any() for t in leaves):
            raise StateError(
                "step",
                f"the forward returns NaN for the rows of {name!r} before any training",
                "Look at its batch, and at the dtype and the values of the base",
            )
        raise StateError(
            "step",
            f"the adapter of {name!r} takes no part in the forward",
            "See li.unreached",
        )

    def _moved(self, name: str) -> Any:
        """Add 1 to the outputs of layers at a trial's tokens, within a context."""
        ends = dict(zip(self._of.sizes, accumulate(self._of.sizes.values()), strict=True))
        place = torch.arange(sum(self._of.sizes.values()))
        where = (place >= ends[name] - self._of.sizes[name]) & (place < ends[name])
        return _changed(self._layers, where[None])

    def _compare(self, name: str, plain: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for other in self._of.sizes:
            if other != name and not _same(plain[other], outputs[other], self._exact):
                _refuse_mixing(name, other, packed=self._of.packed)


def _check_counts(run: Run, of: Joined) -> None:
    """Check that layers get as many tokens of other rows: all alike, and each of one token.

    A model picks other numbers of tokens then. One that raises an error for such rows is checked by
    the numbers of its later passes alone.
    """
    for n_dims in (1, 2):
        places = (slice(1),) * n_dims

        def alike(t: Any, places: Any = places) -> Any:
            is_row = isinstance(t, Tensor) and t.dim()
            return t[places[: t.dim()]].expand_as(t).clone() if is_row else t

        try:
            run(of._replace(batch=tree_map(alike, of.batch)))
        except LoraInjectError:
            raise
        except Exception:  # noqa: BLE001, S112 - the model refuses such rows; numbers still count
            continue


def _refuse_mixing(name: str, other: str, *, packed: bool) -> NoReturn:
    mixes = "mixes rows (BatchNorm in training, negatives or a mean within the batch)"
    remedy = "Use a forward that treats rows independently, or BatchNorm in eval mode"
    if packed:
        mixes = "does not keep packed sequences apart"
        remedy = (
            "Give position_ids that start at 0 in each sequence; transformers reads them "
            "so without attention_mask and with model.config.use_cache = False only"
        )
    problem = f"the rows of {name!r} change the outputs of {other!r}: the forward {mixes}"
    raise StateError("step", problem, remedy)


@torch.no_grad()
def check_padding(
    run: Run,
    batches: Mapping[str, Any],
    of: Joined,
    layers: Sequence[nn.Module],
    *,
    exact: bool,
) -> Padding:
    """Check that padding changes no output, and return what has padded positions.

    The shortest rows must give the outputs that they give alone. Other values of the padding, in
    the outputs of adapted layers, must not change them by a bit.
    """
    assert of.lengths is not None
    lengths = of.lengths
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    both = joined_batch({name: batches[name] for name in batches if name in (short, long)})
    one = joined_batch({short: batches[short]})
    with _seen(layers) as tokens_of_one:
        alone = _tensors(run(one))
    with _seen(layers) as tokens_of_both:
        outputs = run(both)
    differs = StateError(
        f"step, rows of {lengths[short]} and {lengths[long]} positions",
        f"padding to one length changes the outputs of {short!r}",
        "Give a mask of padding (attention_mask) that the model uses, or rows of one length",
    )
    if len(alone) != len(_tensors(outputs)):
        raise differs
    sizes = (sum(one.sizes.values()), sum(both.sizes.values()))
    widths = (lengths[short], lengths[long])
    padded, fixed = _padded_layers(tokens_of_one, tokens_of_both, sizes, widths)
    dims = [
        tuple(d for d in range(1, min(a.dim(), t.dim())) if (a.shape[d], t.shape[d]) == widths)
        for a, t in zip(alone, _tensors(outputs), strict=True)
    ]
    padding = Padding(dims, padded, fixed)
    per_row = [lengths[name] for name, size in both.sizes.items() for _ in range(size)]
    where = torch.arange(lengths[long]) >= torch.tensor(per_row)[:, None]
    with _changed(padded, where):
        with_others = parted(run(both), both._replace(padding=padding))[short]
    in_both = parted(outputs, both._replace(padding=padding))[short]
    if not _same(in_both, with_others, exact) or not _close(tree_leaves(in_both), alone):
        raise differs
    return padding


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _padded_layers(
    of_one: Mapping[nn.Module, Sequence[int]],
    of_both: Mapping[nn.Module, Sequence[int]],
    sizes: tuple[int, int],
    widths: tuple[int, int],
) -> tuple[set[nn.Module], dict[nn.Module, int]]:
    """Return the layers whose inputs have padded positions, and the tokens a row of the others.

    A layer has padded positions if its tokens are rows times positions, for the short rows alone
    and for both. It has none if it has as many tokens for each row in both. What is neither, or
    both at different calls, stays unknown.
    """
    padded, fixed = set[nn.Module](), dict[nn.Module, int]()
    for layer in of_one.keys() & of_both.keys():
        calls = {*zip(of_one[layer], of_both[layer], strict=False)}
        if len(calls) != 1 or len(of_one[layer]) != len(of_both[layer]):
            continue
        n, m = calls.pop()
        if (n, m) == (sizes[0] * widths[0], sizes[1] * widths[1]):
            padded.add(layer)
        elif n * sizes[1] == m * sizes[0]:
            fixed[layer] = n // sizes[0]
    return padded, fixed


@contextmanager
def _seen(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[int]]]:
    """Yield how many tokens the output of each layer has, for each of its calls."""
    tokens: dict[nn.Module, list[int]] = {}

    def note(layer: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            tokens.setdefault(layer, []).append(out.shape[:-1].numel())

    with _hooked(layers, note):
        yield tokens


@contextmanager
def _changed(layers: Iterable[nn.Module], tokens: Tensor) -> Iterator[None]:
    """Add 1 to the outputs of layers where `tokens`, bool `(rows, positions)`, is true."""

    def add(_: nn.Module, __: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or out.dim() < 2:
            return out
        where = tokens.to(out.device)
        if out.shape[:2] == where.shape:
            return out + where.view(*where.shape, *[1] * (out.dim() - 2)).to(out.dtype)
        flat = len(out) == where.numel()
        return out + where.flatten()[:, None].to(out.dtype) if flat else out

    with _hooked(layers, add):
        yield


@contextmanager
def _hooked(layers: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(first: Any, second: Any, exact: bool) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    if exact:
        return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in tensors)
    alike = all(torch.equal(a.isnan(), b.isnan()) for a, b in tensors)
    return alike and _close(
        [a.nan_to_num() for a, _ in tensors], [b.nan_to_num() for _, b in tensors]
    )


def _close(outputs: Iterable[Any], wanted: Iterable[Tensor]) -> bool:
    """Whether tensors are equal but for what rounding may do."""
    for a, b in zip((t for t in outputs if isinstance(t, Tensor)), wanted, strict=True):
        if a.shape != b.shape:
            return False
        if a.is_floating_point():
            off = (a.double() - b.double()).norm() > 8 * torch.finfo(
                a.dtype
            ).eps ** 0.5 * b.double().norm()
            if off:
                return False
    return True

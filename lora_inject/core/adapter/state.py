"""The adapter as a value: tensors and numbers, apart from any model.

Reading off a live model, loading, writing to files and folding into a checkpoint all take or make
an `AdapterState`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_inject.algebra import reshape
from lora_inject.algebra.parts import (
    Cut,
    Term,
    check_alike,
    compared,
    mixed,
    total,
    truncated,
)
from lora_inject.algebra.renaming import distinct, named, renaming, some_of
from lora_inject.checks.fingerprint import Fingerprint, check_one_base, common_copies
from lora_inject.core.adapter.site_state import SiteState, plain, same
from lora_inject.core.functional import all_finite
from lora_inject.core.spec.names import counted, joined, matching
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import LoraInjectError, StateError, check_type

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class AdapterState:
    """An adapter as a value. It can be compared, copied, pickled and computed with.

    `a * 0.5`, `-a`, `a + b` and `a - b` scale and add updates of W exactly: ranks are concatenated,
    and a frozen start (pissa, olora) becomes further ranks where sites are added. Results are new
    values that share tensors with the old ones, without a config. Values are equal if their
    contents are. They cannot be hashed, since tensors are mutable.

    Examples:
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> a = AdapterState({"fc": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> a + a * 0.5
        AdapterState(1 site, rank 4, 0 trained tensors, 40 parameters)
        >>> round((a + a).distance(a * 2), 12), round(a.cosine(-a), 12)
        (0.0, -1.0)

    Attributes:
        sites: Site name to its state, in the order of the model.
        trained: Full trained copies by the name of the base's tensor (`classifier.weight`).
        config: The config it was made from, as plain data, or None if it is not known.
        fingerprint: Values that identify the base, or None if it is not known.
        base_copies: Tensors of the base that the file holds with the adapter, by the base's
            name: PEFT stores a whole embedding that way. They are not part of the adapter: loading
            compares them with the base, and refuses others.
        rows: For a trained tensor of which only some rows are held: their indices in the base.
        source: The files that it was read from, for messages; not part of its value.
    """

    sites: Mapping[str, SiteState]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    def __eq__(self, other: object) -> bool:
        """Compare by content: specs, config, fingerprint, and tensors with their dtypes."""
        if not isinstance(other, AdapterState):
            return NotImplemented
        parts = (f.name for f in fields(self) if f.compare)
        return all(same(getattr(self, name), getattr(other, name)) for name in parts)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle read-only mappings as dicts, since Python cannot do either."""
        values = (getattr(self, f.name) for f in fields(self))
        return AdapterState, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __repr__(self) -> str:
        """Show the size, not the contents."""
        ranks = sorted({site.spec.rank for site in self.sites.values()}) or [0]
        rank = f"ranks {ranks[0]} to {ranks[-1]}" if ranks[1:] else f"rank {ranks[0]}"
        n_parameters = sum(site.spec.n_parameters for site in self.sites.values())
        n_parameters += sum(t.numel() for t in self.trained.values())
        counts = counted(len(self.sites), "site"), counted(len(self.trained), "trained tensor")
        return f"AdapterState({counts[0]}, {rank}, {counts[1]}, {n_parameters:,} parameters)"

    def check_finite(self, asked: str, error: type[LoraInjectError] = StateError) -> None:
        """Refuse values that are NaN or infinite, or on the meta device, by raising `error`.

        A model with one of them returns NaN.
        """
        tensors = {
            f"{role} of site {name!r}": tensor
            for name, site in self.sites.items()
            for role, tensor in site.tensors.items()
        }
        tensors |= {f"trained tensor {name!r}": t for name, t in self.trained.items()}
        ok = all_finite(*tensors.values()) and not any(t.is_meta for t in tensors.values())
        for name, tensor in () if ok else tensors.items():
            where = f"{asked}, {name}" if asked else name
            if tensor.is_meta:
                found = "it is on the meta device and has no values"
                raise error(where, found, "Load its values first")
            if not all_finite(tensor):
                found = f"it holds {int((~torch.isfinite(tensor)).sum()):,} NaN or infinite values"
                remedy = "Its training diverged; take an earlier checkpoint of the adapter"
                raise error(where, found, remedy)

    # Arithmetic ---------------------------------------------------------------------------------

    def __mul__(self, weight: float) -> AdapterState:
        """Scale the update; of A and B only the sign of B can change."""
        check_type("multiply an adapter", weight, Real, "Give a number")
        return weighted_sum([self], [float(weight)], f"{weight} * an adapter")

    __rmul__ = __mul__

    def __neg__(self) -> AdapterState:
        """Return the update with the opposite sign."""
        return self * -1.0

    def __add__(self, other: AdapterState) -> AdapterState:
        """Add two updates of one base."""
        return weighted_sum([self, other], [1.0, 1.0], "add adapters")

    def __sub__(self, other: AdapterState) -> AdapterState:
        """Subtract the update of another adapter of the same base."""
        return weighted_sum([self, other], [1.0, -1.0], "subtract adapters")

    __radd__, __rsub__ = __add__, __sub__  # of what is not an adapter: the same error

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> AdapterState:
        """Return the best adapter of a lower rank, without forming a delta.

        See `lora_inject.truncate`, which also reports the error of each site.
        """
        return truncation(self, rank, energy).state

    def cosine(self, other: AdapterState) -> float:
        """Return the cosine of the angle between two updates, over all sites; NaN for no update.

        A site that one of them lacks counts as zero there. Trained tensors are not counted: their
        change from the base is not known.
        """
        found = [compared(*pair) for _, *pair in paired(self, other, "cosine of adapters")]
        ours, theirs = (math.hypot(*(each.norms[k] for each in found)) for k in (0, 1))
        return sum(each.dot for each in found) / (ours * theirs) if ours and theirs else math.nan

    def distance(self, other: AdapterState) -> float:
        """Return the Frobenius norm of the difference of two updates, over all sites.

        Trained tensors are not counted; `lora_inject.diff` lists them.
        """
        pairs = paired(self, other, "distance of adapters")
        return math.hypot(*(compared(*pair).distance for _, *pair in pairs))

    # The same update in another shape -----------------------------------------------------------

    def mapped(self, change: Callable[[Tensor], Tensor]) -> AdapterState:
        """Return the adapter with each of its tensors changed; what was one tensor stays one."""
        made: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = change(tensor)
            return made[id(tensor)]

        sites = {name: site.mapped(once) for name, site in self.sites.items()}
        return replace(self, sites=sites, trained={n: once(t) for n, t in self.trained.items()})

    def to(self, dtype: torch.dtype) -> AdapterState:
        """Return the adapter with its floating point tensors in another dtype.

        Args:
            dtype: A floating point dtype.

        Raises:
            StateError: `dtype` is not one, or a finite value would become infinite.
        """
        check_type("to, dtype", dtype, torch.dtype, "Give torch.bfloat16")
        if not dtype.is_floating_point:
            found = "it is not a floating point dtype"
            raise StateError(f"to({dtype})", found, "Give torch.bfloat16")

        def cast(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            made = tensor.to(dtype)
            if not made.is_meta and int(made.isinf().sum()) > int(tensor.isinf().sum()):
                found = "it holds values that would become infinite"
                raise StateError(f"to({dtype}), '{name}'", found, "Give torch.bfloat16")
            return made

        sites = {name: site.mapped(partial(cast, name)) for name, site in self.sites.items()}
        trained = {name: cast(name, tensor) for name, tensor in self.trained.items()}
        return replace(self, sites=sites, trained=trained)

    def select(self, *patterns: str) -> AdapterState:
        r"""Return the sites and trained tensors that patterns match.

        Args:
            *patterns: As in a config: a regex for the end of a name, or of a parent module's name.

        Raises:
            StateError: A pattern matches nothing.

        Examples:
            >>> spec = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), rank=2, alpha=4)
            >>> q = SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))
            >>> other = replace(q, spec=spec.at("h.1.q", "h.1.q.weight"))
            >>> a = AdapterState({"h.0.q": q, "h.1.q": other})
            >>> list(a.select(r"h\.1").sites)
            ['h.1.q']
        """
        kept = named([*self.sites, *self.trained], patterns, "select")
        return replace(self.only(kept), config=None)

    def only(self, names: Collection[str]) -> AdapterState:
        """Return the sites and trained tensors of these names."""

        def kept(values: Mapping[str, T]) -> dict[str, T]:
            return {name: value for name, value in values.items() if name in names}

        sites, trained, rows = kept(self.sites), kept(self.trained), kept(self.rows)
        return replace(self, sites=sites, trained=trained, rows=rows)

    def rename(self, new: Mapping[str, str] | Callable[[str], str]) -> AdapterState:
        r"""Return the adapter with other names of sites, trained tensors and the fingerprint.

        Args:
            new: Regexes of whole segments and their replacements (`\1` for a group, empty to
                remove them), applied in order to every name; or a function of a name.

        Raises:
            StateError: A regex is not valid or matches no name, two names would become one, or a
                new name is empty or has spaces or slashes.

        Examples:
            >>> spec = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), 2, 4.0, weight="h.0.q.weight")
            >>> a = AdapterState({"h.0.q": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
            >>> site = a.rename({"h": "model.layers", "q": "self_attn.q_proj"}).sites
            >>> [site.spec.weight for site in site.values()]
            ['model.layers.0.self_attn.q_proj.weight']
        """
        change = renaming(new, [*self.sites, *self.trained])
        sites, weights = [], {}
        for name, site in self.sites.items():
            spec = reshape.renamed(site.spec, change(name))
            weights[site.spec.weight] = spec.weight
            sites.append((spec.name, replace(site, spec=spec)))

        def place(name: str) -> str:
            return weights.get(name) or change(name)

        marks = self.fingerprint
        return replace(
            self,
            sites=distinct(sites),
            trained=distinct((place(name), tensor) for name, tensor in self.trained.items()),
            base_copies=distinct((place(name), t) for name, t in self.base_copies.items()),
            rows={place(name): rows for name, rows in self.rows.items()},
            fingerprint=marks and marks.renamed(place),
            config=None,
        )

    def split(self, pattern: str, sizes: Mapping[str, int] | None = None) -> AdapterState:
        """Split fused projections: `attn.qkv` becomes `attn.q`, `attn.k` and `attn.v`.

        Args:
            pattern: Which sites, as in a config.
            sizes: Width of each part along the output, in order; those of its slices by default.

        Returns:
            A site for each adapted part, under the parent of the fused one.

        Raises:
            StateError: The pattern matches nothing, or the widths do not fit the site.
        """
        asked, sizes = f"split {pattern!r}", {} if sizes is None else sizes
        _check_sizes(asked, sizes)
        chosen = named(self.sites, [pattern], asked)
        sites = {name: plain(self.sites[name], asked) for name in chosen}
        return self._with({n: reshape.split(s, sizes, asked) for n, s in sites.items()})

    def join(self, name: str, sizes: Mapping[str, int]) -> AdapterState:
        """Join sites of one parent to sites on fused projections.

        Args:
            name: Name of the fused layer, such as `qkv_proj`.
            sizes: Name and width of each of its parts, in order: `{"q_proj": 8, "k_proj": 4}`.

        Returns:
            One site with slices for each module that holds some of the parts. Ranks are padded with
            zeros to the largest.

        Raises:
            StateError: No site is such a part, or a width does not fit.
        """
        asked = f"join {name!r}"
        check_type(f"{asked}, name", name, str, "Give the name of the fused layer")
        _check_sizes(asked, sizes)
        groups: dict[str, dict[str, str]] = {}
        for site in self.sites:
            for part in sizes:
                if f".{site}".endswith(f".{part}"):
                    head = site.removesuffix(part).rstrip(".")
                    groups.setdefault(joined(head, name), {})[part] = site
        put = partial(reshape.join, sizes=sizes, asked=asked)
        return self._joined(groups, put, asked, f"no site ends in {' or '.join(sizes)}")

    def split_experts(self, pattern: str) -> AdapterState:
        """Split stacks of experts: `experts.up` becomes `experts.0.up`, `experts.1.up`, ...

        Args:
            pattern: Which sites, as in a config.

        Returns:
            A linear site for each expert.

        Raises:
            StateError: The pattern matches nothing, or a site that is not a stack.
        """
        asked = f"split_experts {pattern!r}"
        new = {}
        for name in named(self.sites, [pattern], asked):
            site = plain(self.sites[name], asked)
            if site.spec.experts is None:
                raise StateError(asked, f"'{name}' is not a stack of experts", "Match stacks only")
            new[name] = reshape.split_experts(site)
        return self._with(new)

    def join_experts(self, pattern: str, n: int) -> AdapterState:
        """Join the sites of single experts to stacks: `experts.0.up`, ... become `experts.up`.

        Args:
            pattern: Which modules hold numbered experts, as in a config.
            n: How many experts there are; one without a site gets zeros.

        Returns:
            A site on a stacked parameter `(n, out, in)` for each kind of layer.

        Raises:
            StateError: No site is such an expert, or they do not fit on one stack.
        """
        asked = f"join_experts {pattern!r}"
        check_type(f"{asked}, pattern", pattern, str, "Give a regex for the end of a name")
        check_type(f"{asked}, n", n, Integral, "Give the number of experts")
        stacks: dict[str, dict[int, str]] = {}
        for name in self.sites:
            for found in re.finditer(r"\.(\d+)\.", name):
                head, end = name[: found.start()], name[found.end() :]
                if matching(pattern, [head], asked=asked, error=StateError):
                    stacks.setdefault(joined(head, end), {})[int(found[1])] = name
        if over := [name for group in stacks.values() for e, name in group.items() if e >= n]:
            raise StateError(asked, f"'{over[0]}' is beyond {n} experts", "Correct n")
        put = partial(reshape.join_experts, n=n, asked=asked)
        return self._joined(stacks, put, asked, "no site is in a numbered module there")

    def _joined(
        self,
        groups: Mapping[str, Mapping[Any, str]],
        put: Callable[[str, Mapping[Any, SiteState]], SiteState],
        asked: str,
        why: str,
    ) -> AdapterState:
        """Return the adapter with one site, under its name in `groups`, for each group."""
        if not groups:
            raise StateError(asked, why, f"Its sites are such as {some_of(self.sites)}")
        new: dict[str, Mapping[str, SiteState]] = {}
        for name, group in groups.items():
            first, *others = group.values()
            members = {part: plain(self.sites[old], asked) for part, old in group.items()}
            new |= {first: {name: put(name, members)}, **{old: {} for old in others}}
        return self._with(new)

    def _with(self, new: Mapping[str, Mapping[str, SiteState]]) -> AdapterState:
        """Return the adapter with new sites in the place of some, whose fingerprints go."""
        sites = [
            item
            for name, site in self.sites.items()
            for item in new.get(name, {name: site}).items()
        ]
        gone = {self.sites[name].spec.weight for name in new}
        marks = self.fingerprint and self.fingerprint.without(gone)
        return replace(self, sites=distinct(sites), fingerprint=marks, config=None)


class Truncated(NamedTuple):
    """The result of `lora_inject.truncate`.

    Attributes:
        state: The adapter.
        sites: For each site its rank before and now, and the relative error.
    """

    state: AdapterState
    sites: dict[str, Cut]


def truncation(state: AdapterState, rank: int | None, energy: float | None) -> Truncated:
    """Return the truncated adapter, with rank and error of each site; see `truncate`."""
    asked = "truncate"
    if rank is None and energy is None:
        raise StateError(asked, "neither rank nor energy is given", "Give one of them")
    if rank is not None:
        check_type(f"{asked}, rank", rank, Integral, "Give a whole number from 1")
        if rank < 1:
            raise StateError(asked, f"rank is {rank}", "Give 1 or more")
    if energy is not None:
        check_type(f"{asked}, energy", energy, Real, "Give a share, in (0, 1]")
        if not 0 < energy <= 1:
            raise StateError(asked, f"energy is {energy}", "Give a share of the squares, in (0, 1]")
    state.check_finite(asked)
    made = {name: truncated(site, rank, energy, asked) for name, site in state.sites.items()}
    sites = {name: site for name, (site, _) in made.items()}
    return Truncated(
        replace(state, sites=sites, config=None), {name: cut for name, (_, cut) in made.items()}
    )


def called(states: Sequence[Any]) -> list[str]:
    """Return what messages call each of several adapters: its files, or its place among them."""
    places = [f"adapter {n} of {len(states)}" for n in range(1, 1 + len(states))]
    sources = [getattr(state, "source", "") for state in states]
    names = [repr(s) if s else place for s, place in zip(sources, places, strict=True)]
    return names if len(names) > 1 or any(sources) else ["the adapter"][: len(names)]


def paired(
    one: AdapterState, two: AdapterState, asked: str
) -> Iterator[tuple[str, SiteState | None, SiteState | None]]:
    """Yield the sites of two adapters by name; check base, shapes and finite values.

    Values that are in a file are read here, once.
    """
    names = _check_adapters([one, two], asked)
    for state, name in zip((one, two), names, strict=True):
        replace(state, sites={}).check_finite(f"{asked}, {name}")
    for site in {**one.sites, **two.sites}:
        found: list[SiteState | None] = []
        for state, name in zip((one, two), names, strict=True):
            found.append(state.sites.get(site) and state.sites[site].mapped(_read))
            if (there := found[-1]) is not None:
                plain(there, where := f"{asked}, {name}")
                AdapterState({site: there}).check_finite(where)
        holders = [name for name, s in zip(names, found, strict=True) if s]
        check_alike([s.spec for s in found if s], holders, asked)
        yield site, found[0], found[1]


def _read(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def weighted_sum(
    states: Sequence[AdapterState], weights: Sequence[float], asked: str
) -> AdapterState:
    """Return the exact `sum of weight * adapter`, ranks concatenated."""

    def make(sites: Sequence[Term], like: SiteSpec, names: Sequence[str]) -> SiteState:
        if len(sites) == 1 and sites[0][1] == 1:
            return sites[0][0]
        for (site, _), name in zip(sites, names, strict=True):
            plain(site, f"{asked}, {name}", bias=True)
        if len(sites) > 1:
            return total(sites, like)
        ((site, weight),) = sites
        spec = replace(site.spec, alpha=site.spec.alpha * abs(weight))
        if not 0 < spec.alpha < math.inf:
            where = f"{asked}, {names[0]}, site '{spec.name}'"
            found = f"its alpha would become {spec.alpha}"
            raise StateError(where, found, "Give a weight nearer to 1")
        turned = {r: t if r[0] == "A" or weight > 0 else -t for r, t in site.tensors.items()}
        return SiteState.of(spec, turned)

    return with_sites(states, weights, make, asked)


def with_sites(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    make: Callable[[Sequence[Term], SiteSpec, Sequence[str]], SiteState],
    asked: str,
) -> AdapterState:
    """Return one adapter of several: `make` makes each site; trained tensors are mixed.

    `make` gets the sites with their weights, what the new site is like, and the adapters' names.
    """
    names, several = _check_adapters(states, asked), list(zip(states, weights, strict=True))
    for (state, weight), name in zip(several, names, strict=True):
        where, remedy = f"{asked}, the weight of {name}", "Give a finite number other than 0"
        check_type(where, weight, Real, remedy)
        if not math.isfinite(weight) or weight == 0:
            raise StateError(where, f"it is {weight}", remedy)
        for rows in state.rows:
            found = f"it trains single rows of '{rows}', which replace the base's"
            remedy = "Merge the adapters into the base one after the other"
            raise StateError(f"{asked}, {name}", found, remedy)
    marked = sorted(states, key=lambda state: state.fingerprint is None)
    trained = mixed([(state.trained, weight) for state, weight in several], names, asked)
    sites = {}
    for site in dict.fromkeys(name for state in states for name in state.sites):
        there = [(state.sites[site], weight) for state, weight in several if site in state.sites]
        holders = [n for n, state in zip(names, states, strict=True) if site in state.sites]
        check_alike([one.spec for one, _ in there], holders, asked)
        # With the base known, kinds of layers are known; for a foreign file they are assumed.
        like = next(state.sites[site].spec for state in marked if site in state.sites)
        sites[site] = make(there, like, holders)
        if twice := _tensors_of(sites[site].spec) & trained.keys():
            (name,) = sorted(twice)[:1]
            other = next(n for n, s in zip(names, states, strict=True) if name in s.trained)
            found = f"{holders[0]} updates '{name}' and {other} holds a trained copy of it"
            raise StateError(asked, found, "Merge both adapters into the base instead")
    marks = [state.fingerprint for state in states if state.fingerprint is not None]
    copies = common_copies([state.base_copies for state in states], names, asked)
    union = Fingerprint.union(marks) if marks else None
    return AdapterState(sites, trained, None, union, copies)


def _check_adapters(states: Sequence[AdapterState], asked: str) -> list[str]:
    """Refuse what is no adapter, and adapters of different bases; return what to call each."""
    names = called(states)
    remedy = "Give an AdapterState, as adapter_state(model) does"
    for state, name in zip(states, names, strict=True):
        check_type(f"{asked}, {name}", state, AdapterState, remedy)
    check_one_base([state.fingerprint for state in states], names, asked)
    return names


def _tensors_of(spec: SiteSpec) -> set[str]:
    """Return the names of the base's tensors that a site updates."""
    bias = f"{spec.weight.removesuffix('weight')}bias"
    return {spec.weight, *([bias] if spec.lora_bias else [])}


def _check_sizes(asked: str, sizes: Mapping[str, int]) -> None:
    remedy = "Give a dict from the name of each part to its width"
    check_type(f"{asked}, sizes", sizes, Mapping, remedy)
    for part, width in sizes.items():
        check_type(f"{asked}, the width of {part!r}", width, Integral, remedy)
        if width < 1:
            raise StateError(asked, f"the width of {part!r} is {width}", "Give 1 or more")

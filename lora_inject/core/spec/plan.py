"""What a config does to a model, as a value before it is done.

A plan is data. It can be counted, compared, printed and written as JSON; it changes
nothing and holds no tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from lora_inject.core.spec.config import Active, Config, Normal, Rule
from lora_inject.core.spec.names import counted, templates
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tables import ListReport, Shown, columns, sides, wrapped


class Skipped(NamedTuple):
    """A name that a rule matched but that is not a site: `container`, `LayerNorm`, `excluded`."""

    name: str
    rule: int
    reason: str


class Trained(NamedTuple):
    """A parameter of the base that trains with the adapter, as its own copy; `why` names it.

    With `rows` only these rows train, and `shape` is theirs.
    """

    name: str
    shape: tuple[int, ...]
    why: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, repr=False)
class Plan(Shown, ListReport):
    """What a config does to a model, before it is done.

    Attributes:
        config: The config.
        sites: The sites in model order.
        trained: Further parameters that train, in model order.
        skipped: What else the rules matched.
        notes: What the user should know, in sentences.
        n_base: Elements of the base's parameters.
    """

    config: Config
    sites: tuple[SiteSpec, ...]
    trained: tuple[Trained, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    n_base: int = 0

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @cached_property
    def n_lora(self) -> int:
        """Elements of A and B of all sites."""
        return sum(math.prod(site.a_shape) + math.prod(site.b_shape) for site in self.sites)

    @cached_property
    def n_further(self) -> dict[str, int]:
        """Elements of the other tensors that sites train, by role: `m` of DoRA, ..."""
        counts: Counter[str] = Counter()
        for site in self.sites:
            for role in site.shapes.keys() - {"A", "B"}:
                counts[role] += math.prod(site.shapes[role])
        return dict(counts)

    @cached_property
    def n_trained(self) -> int:
        """Elements of the parameters that `train`, `tokens` and `bias` add."""
        return sum(math.prod(entry.shape) for entry in self.trained)

    @property
    def n_trainable(self) -> int:
        """Elements of all that trains: of the sites, and what `train`, `tokens` and `bias` add."""
        return self.n_lora + sum(self.n_further.values()) + self.n_trained

    @cached_property
    def n_sites_by_rule(self) -> tuple[int, ...]:
        """Number of sites of each rule."""
        counts = Counter(site.rule for site in self.sites)
        return tuple(counts[i] for i in range(len(self.config.targets)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        names = ("n_sites", "n_lora", "n_further", "n_trained", "n_trainable", "n_base")
        return {
            "config": self.config.to_dict(),
            **{name: getattr(self, name) for name in names},
            "sites": [_as_data(site) for site in self.sites],
            "trained": [entry._asdict() for entry in self.trained],
            "skipped": [entry._asdict() for entry in self.skipped],
            "notes": list(self.notes),
        }

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield sites by rule, what else trains, what was skipped, totals."""
        for i, rule in enumerate(self.config.targets):
            sites = [site for site in self.sites if site.rule == i]
            numbers = _numbers(self.config.filled(rule), sites)
            yield from wrapped(f"rule {i + 1} '{rule.match}': {numbers}", width, "  ")
            entries = [(site.name, _cells(site)) for site in sites]
            yield from _table(entries, width, everything=everything)
        yield from _trained_lines(self, width, everything=everything)
        yield from _skipped_lines(self, width, everything=everything)
        for line in (*(f"note: {note}" for note in self.notes), _totals(self)):
            yield from wrapped(line, width, "  ")

    def __str__(self) -> str:
        return self.text()


def _as_data(site: SiteSpec) -> dict[str, Any]:
    slices = site.slices and {"sizes": dict(site.slices.sizes), "adapt": site.slices.adapt}
    names = [field.name for field in fields(site) if field.name != "shapes"]
    return {**{name: getattr(site, name) for name in names}, "slices": slices}


def _trained_lines(plan: Plan, width: int, *, everything: bool) -> Iterator[str]:
    for why in dict.fromkeys(entry.why for entry in plan.trained):
        mine = [entry for entry in plan.trained if entry.why == why]
        has_rows = any(entry.rows for entry in mine)
        yield f"{why}: {'rows that train' if has_rows else 'trained in full'}"
        cells = [(entry.name, _cells(entry)) for entry in mine]
        yield from _table(cells, width, everything=everything)


def _skipped_lines(plan: Plan, width: int, *, everything: bool) -> Iterator[str]:
    for reason in dict.fromkeys(entry.reason for entry in plan.skipped):
        full = dict.fromkeys(e.name for e in plan.skipped if e.reason == reason)
        names = list(full if everything else templates(full))
        most = len(names) if everything else 4
        some = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
        yield from wrapped(f"skipped, {reason}: {some}", width, "  ")


def _numbers(rule: Rule, sites: Iterable[SiteSpec]) -> str:
    shared = rule.rank
    rank = " and ".join(str(r) for r in sorted({site.rank for site in sites}))
    root = f"sqrt({rank})" if rule.scaling == "rslora" else rank
    init = f"normal({rule.init.normal:g})" if isinstance(rule.init, Normal) else str(rule.init)
    of = f" ({shared.active} over a token's experts)" if isinstance(shared, Active) else ""
    parts = [f"rank {rank}{of}", f"scale {rule.alpha:g}/{root}", init]
    parts += [f"dropout {rule.dropout:g}"] if rule.dropout else []
    parts += ["compute float32"] if rule.compute == "float32" else []
    parts += [str(rule.variant)] if rule.variant != "lora" else []
    return ", ".join(parts)


def _table(
    entries: Iterable[tuple[str, tuple[str, str, int]]], width: int, *, everything: bool
) -> Iterator[str]:
    """Return rows of kind, shape and size; names with equal values are joined, or not."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, alike in entries:
        groups.setdefault(alike, []).append(name)
    rows = [
        (name, f"x{n:,}", kind, shape, f"{each:,} each", f"{each * n:,}")
        for (kind, shape, each), names in groups.items()
        for name, n in (dict.fromkeys(names, 1) if everything else templates(names)).items()
    ]
    return columns(rows, 4, width)


def _cells(entry: SiteSpec | Trained) -> tuple[str, str, int]:
    """Return kind, shape and number of parameters of a site, or of what else trains."""
    if not isinstance(entry, SiteSpec):
        return "trained", sides(entry.shape), math.prod(entry.shape)
    some = "" if entry.only is None else f"{len(entry.only):,} of a "
    share = f", one {entry.share}" if entry.share else ""
    stack = "" if entry.experts is None else f"{some}stack of {entry.experts:,}{share}: "
    shape = f"{stack}{entry.in_features:,} -> {entry.out_features:,}"
    if entry.slices:
        shape += f" [{', '.join(entry.slices.adapt)}]"
    by_weight = entry.update == "weight" and entry.kind != "parameter"
    return f"{entry.kind} (weight)" if by_weight else entry.kind, shape, entry.n_parameters


def _totals(plan: Plan) -> str:
    percent = 100 * plan.n_trainable / max(plan.n_base, 1)
    share = f", {percent:.3g} % of {plan.n_base:,}" if plan.n_base else ""
    extra = "".join(f", {n:,} in {role}" for role, n in plan.n_further.items())
    extra += f" + {plan.n_trained:,} trained in full" if plan.trained else ""
    return (
        f"{counted(plan.n_sites, 'site')}: {plan.n_lora:,} in A and B{extra} = "
        f"{plan.n_trainable:,} trainable{share}; {4 * plan.n_trainable / 1e6:,.1f} MB in float32"
    )

"""A plan as plain data, and as a table, whose names that differ in numbers share a row."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from lora_inject.core.spec.config import Active, Normal, Rule
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.site_tables import columns, sides
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.spellings import templates


def as_data(plan: Any) -> dict[str, Any]:
    """Return a plan as plain data for JSON."""
    plain = ("n_sites", "n_lora", "n_trained", "n_trainable", "n_base", "assumed")
    return {
        "config": plan.config.to_dict(),
        **{name: getattr(plan, name) for name in plain},
        "sites": [_site_dict(site) for site in plan.sites],
        "trained": [t._asdict() for t in plan.trained],
        "skipped": [s._asdict() for s in plan.skipped],
        "tied": [t._asdict() for t in plan.tied],
        "notes": list(plan.notes),
    }


def _site_dict(site: SiteSpec) -> dict[str, Any]:
    slices = site.slices and {"sizes": dict(site.slices.sizes), "adapt": site.slices.adapt}
    names = [field.name for field in fields(site) if field.name != "shapes"]
    return {**{name: getattr(site, name) for name in names}, "slices": slices}


def table_of(plan: Any, width: int, *, everything: bool) -> Iterator[str]:
    """Yield the plan line by line: sites by rule, what else trains, what was skipped, totals."""
    if plan.assumed:
        yield "kinds are assumed from names and shapes"
    for i, rule in enumerate(plan.config.targets):
        sites = [site for site in plan.sites if site.rule == i]
        numbers = _numbers(plan.config.filled(rule), sites)
        yield from _filled(f"rule {i + 1} '{rule.match}': {numbers}", width)
        entries = [(site.name, _cells(site)) for site in sites]
        yield from _table(entries, width, everything=everything)
    yield from _trained_lines(plan, width, everything=everything)
    yield from _skipped_lines(plan, width, everything=everything)
    closing = [f"tied: {' = '.join(tied.names)}; {_tied_text(tied)}" for tied in plan.tied]
    for line in (*closing, *(f"note: {note}" for note in plan.notes), _totals(plan)):
        yield from _filled(line, width)


def _trained_lines(plan: Any, width: int, *, everything: bool) -> Iterator[str]:
    for why in dict.fromkeys(entry.why for entry in plan.trained):
        mine = [entry for entry in plan.trained if entry.why == why]
        has_rows = any(entry.rows for entry in mine)
        yield f"{why}: {'rows that train' if has_rows else 'trained in full'}"
        cells = [(entry.name, _cells(entry)) for entry in mine]
        yield from _table(cells, width, everything=everything)


def _skipped_lines(plan: Any, width: int, *, everything: bool) -> Iterator[str]:
    for reason in dict.fromkeys(entry.reason for entry in plan.skipped):
        full = dict.fromkeys(e.name for e in plan.skipped if e.reason == reason)
        names = list(full if everything else templates(full))
        most = len(names) if everything else 4
        some = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
        yield from _filled(f"skipped, {reason}: {some}", width)


def _filled(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


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
    parts += ["lora_bias"] if rule.lora_bias else []
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


def _cells(entry: Any) -> tuple[str, str, int]:
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


def _tied_text(tied: Any) -> str:
    each = ", each with its own delta" if len(tied.sites) > 1 else " only"
    texts = [f"adapted at {' and '.join(tied.sites)}{each}"] if tied.sites else []
    texts += ["trained under all its names"] if tied.trained else []
    return "; ".join(texts)


def _totals(plan: Any) -> str:
    percent = 100 * plan.n_trainable / max(plan.n_base, 1)
    share = f", {percent:.3g} % of {plan.n_base:,}" if plan.n_base else ""
    extra = f" + {plan.n_trained:,} trained in full" if plan.trained else ""
    return (
        f"{counted(plan.n_sites, 'site')}: {plan.n_lora:,} in A and B{extra} = "
        f"{plan.n_trainable:,} trainable{share}; {4 * plan.n_trainable / 1e6:,.1f} MB in float32"
    )

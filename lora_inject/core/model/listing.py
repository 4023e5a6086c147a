"""The list of adapters on a model.

An adapter is what its entries on the modules say, summed up by its name.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Carried
from lora_inject.core.model.used import took_part
from lora_inject.core.roots.root import Injected, entries, find_root
from lora_inject.core.spec.config import WORDS
from lora_inject.core.spec.plan_notes import left_out
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tables import Shown, columns
from lora_inject.formats.live_models import notes_on_files


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter on a model, as `adapters` lists it.

    Attributes:
        sites: Site name to its spec.
        trained: Names of the base tensors that the adapter has copies of, or copies of rows.
        n_parameters: Elements of all its trainable tensors.
        weight: Its mixing weight in the current selection, None where it is not active.
        trainable: Whether its tensors require gradients.
        merged: Whether the weights of the base hold it, until `unmerge`.
        idle: Its sites and trained tensors that took no part in any forward so far, where others
            did: never called and never read, they are inert. Compiled graphs leave no trace.
    """

    sites: Mapping[str, SiteSpec]
    trained: tuple[str, ...]
    n_parameters: int
    weight: float | None
    trainable: bool
    idle: tuple[str, ...] = ()
    merged: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({spec.rank for spec in self.sites.values()}))

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in a forward."""
        return self.weight is not None


class Table(Shown, str):
    """Text in columns that shows itself instead of its quotes and escapes."""

    __slots__ = ()
    __repr__ = Shown.__repr__


class Adapters(Shown, dict[str, AdapterInfo]):
    """Adapter name to what it is. It shows itself as the table of `summary`."""

    def __str__(self) -> str:
        return "\n".join(_table(self)) if self else "no adapters"


def adapters(model: nn.Module) -> Adapters:
    """List the adapters on a model.

    Returns:
        Adapter name to what it is, in the order of injection.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> adapters(net)["sql"].n_parameters
        8
    """
    if find_root(model, "adapters") is None:
        return Adapters()
    survey = Injected(model, "adapters")
    carried: dict[str, list[Carried]] = {name: [] for name in survey.root.adapters}
    for item in entries(survey):
        carried[item.entry.adapter].append(item)
    selection = survey.root.selection
    merged = selection.merged
    weights = merged or selection.current().names
    return Adapters(
        (name, _info(items, weights.get(name), merged=name in merged))
        for name, items in carried.items()
    )


def _info(items: list[Carried], weight: float | None, *, merged: bool) -> AdapterInfo:
    tensors = [t for _, m, e in items for role, t in e.tensors(m).items() if e.trains(role)]
    return AdapterInfo(
        sites={e.spec.name: e.spec for _, _, e in items if e.spec is not None},
        trained=tuple(item.name for item in items if "T" in item.entry.names),
        n_parameters=sum(t.numel() for t in {*tensors}),
        weight=weight,
        trainable=any(t.requires_grad for t in tensors),
        idle=idle_among(items),
        merged=merged,
    )


def _table(infos: Mapping[str, AdapterInfo]) -> Iterator[str]:
    """Yield the table of adapters line by line; base tensors that train have a column if any do."""
    has_copies = any(info.trained for info in infos.values())
    heads = ("adapter", "sites", "ranks", "base tensors", "parameters", "active", "trainable")
    rows = (
        (
            name,
            str(len(info.sites)),
            ", ".join(map(str, info.ranks)) or "-",
            str(len(info.trained)),
            f"{info.n_parameters:,}",
            _activity(info),
            "yes" if info.trainable else "no",
        )
        for name, info in infos.items()
    )
    table = [row if has_copies else row[:3] + row[4:] for row in (heads, *rows)]
    return columns(table, len(table[0]), sys.maxsize, indent="")


def _activity(info: AdapterInfo) -> str:
    """Say whether an adapter takes part, how strongly, and whether the weights hold it."""
    if info.weight is None:
        return "no"
    return f"merged x {info.weight:g}" if info.merged else f"x {info.weight:g}"


def summary(model: nn.Module) -> Table:
    """Return the adapters of a model as a table, with what is active and what trains.

    It is text that shows itself at a prompt and in a notebook.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> summary(net)
        adapter  sites  ranks  parameters  active  trainable
        sql      1      1      8           x 1     yes
        trainable: 8 of 28 parameters (28.5714 %)
    """
    infos = adapters(model)
    lines = [*_table(infos)]
    if infos:
        lines += _notes(Injected(model, "summary"), infos)
    parameters = [*model.parameters()]  # what is stored: of a packed weight, its bytes
    n_all = sum(p.numel() for p in parameters)
    n_trainable = sum(p.numel() for p in parameters if p.requires_grad)
    share = 100 * n_trainable / n_all if n_all else 0.0
    lines.append(f"trainable: {n_trainable:,} of {n_all:,} parameters ({share:.4f} %)")
    return Table("\n".join(lines))


def _notes(survey: Injected, infos: Mapping[str, AdapterInfo]) -> Iterator[str]:
    for name, info in infos.items():
        if info.idle:
            some = ", ".join(map(repr, info.idle[:3])) + (", ..." if len(info.idle) > 3 else "")
            yield f"{name}: no forward has used {some} ({len(info.idle)}) so far"
        notes = (
            *notes_on_adapter(survey, name),
            *notes_on_files(survey, [*info.sites.values()], survey.weights),
        )
        yield from (f"{name}: {note}" for note in notes)


def idle_among(items: Collection[Carried]) -> tuple[str, ...]:
    """Return the names of sites and trained tensors that no forward has used, where others were."""
    idle = tuple(item.name for item in items if not took_part(item))
    return idle if len(idle) < len(items) else ()


def notes_on_adapter(survey: Injected, adapter: str) -> Iterator[str]:
    """Yield what an adapter on a model leaves out of experts, by the rules that it was made by."""
    config = survey.root.adapters[adapter].config or {}
    rules = config.get("targets", ())
    words = {rule if isinstance(rule, str) else rule["match"] for rule in rules} & WORDS
    if words:
        there = inventory(survey).mixtures
        taken = (item.entry.spec for item in entries(survey, adapter))
        yield from left_out(words, there, {spec.name for spec in taken if spec is not None})

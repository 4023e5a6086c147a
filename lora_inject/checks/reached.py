"""Which adapters take part when a model runs: an adapter that no forward reaches is inert.

Layers note which of their adapters took part; this module compares the notes of one run, or what
training has left unused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Carried, adapted_modules, entries, reach, refuse_merged
from lora_inject.core.spec.names import counted, quoted
from lora_inject.core.spec.patterns import matching
from lora_inject.errors import LayerError, StateError


def unreached(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    r"""Return the sites whose adapter did not take part when `run()` ran the model.

    Args:
        model: The root, or any module that holds roots.
        run: Runs the model, for instance `lambda: model(**batch)`.

    Returns:
        Names of sites of active adapters that no forward reached; empty when all took part. A
        layer that is neither called nor read shows up here.

    Raises:
        StateError: The model is merged or carries no active adapter.
    """
    reached = reach(model)
    refuse_merged("unreached", *reached.selections)
    active = {name for selection in reached.selections for name in selection.current().names}
    if not active:
        raise StateError("unreached", "no adapter is active", "Call activate(model, name) first")
    return list(dict.fromkeys(_missed_sites(model, run)))


def refuse_unreached(model: nn.Module, probe: Callable[[], Any]) -> None:
    """Check that a run in eval mode, without gradients, reaches all sites of active adapters."""
    training = {id(module): module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            missed = _missed_sites(model, probe)
    finally:
        for module in model.modules():
            module.training = training[id(module)]
    if missed:
        some = ", ".join(map(repr, missed[:3]))
        raise LayerError(
            f"inject, site {missed[0]!r}",
            "the probe neither reached its layer nor read its weight "
            f"({counted(len(missed), 'such site')}: {some}): its adapter would be inert",
            "Leave it out of the adapter",
        )


def _missed_sites(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return the sites of active adapters that took no part when `run()` ran the model."""
    survey = Survey(model)
    states = {one: one.current() for one in reach(model, survey).selections}
    carried = {id(m): (a, a.took_part) for _, m, a in adapted_modules(survey)}
    for attached, _ in carried.values():
        attached.forget_use()
    for selected in states.values():
        selected.forget_use()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled graphs do not note anything
            run()
        return [
            item.name
            for item in entries(survey)
            for attached in (carried[id(item.module)][0],)
            if item.entry.adapter in states[attached.selection].names
            and item.entry.mark not in attached.took_part
        ]
    finally:
        for attached, before in carried.values():
            attached.took_part |= before


class _Use(Enum):
    FULL = "a forward used it, and it has a gradient where others have one"
    CUT = "a forward used it, and no gradient came back"
    NONE = "no forward used it"


class _Site(NamedTuple):
    """An entry of an adapter, with the use that is known of it."""

    item: Carried
    group: str  # its name, with `*` for the member of a list or dict of modules
    use: _Use


def refuse_unused(
    survey: Survey,
    name: str,
    changed: Callable[[Carried], bool],
    unused: Iterable[str],
    asked: str,
    *,
    lists: bool = True,
) -> bool:
    """Raise if an adapter was trained, and a site of it neither changed nor takes part in training.

    1. A site takes part if a forward has used it and, where others have gradients, it has one too.
    2. What stands in a ModuleList or ModuleDict may be skipped, as experts and dropped layers are:
       of the members of one list, one that takes part is enough.
    3. `changed` says whether training has reached an entry, which it also does in compiled graphs,
       where no use is noted.
    4. `unused` are patterns of sites that may stay without use.
    5. Where there is neither a forward nor a gradient, or nothing has changed, values were only
       set, and nothing is said of use.

    Returns:
        Whether nothing is missing, which without `lists` may be members of lists.
    """
    items = list(entries(survey, name))
    have_gradients = any(map(has_gradient, items))
    sites = [
        _Site(item, _in_any_member(survey, item.name), _use_of(item, have_gradients))
        for item in items
    ]
    seen = any(site.use is not _Use.NONE for site in sites)
    if not (have_gradients or seen):
        return True
    missing = _missing(sites, _allowed(items, unused, asked))
    if not missing:
        return True
    reached = {site.group for site in sites if changed(site.item)}
    if not reached:
        return True
    absent = [site for site in missing if site.group not in reached]
    refused = [site for site in absent if lists or "*" not in site.group]
    if refused:
        raise _unused_error(refused, asked)
    return not absent


def _use_of(item: Carried, others_have_gradients: bool) -> _Use:
    attached = attached_to(item.module)
    if attached is not None and item.entry.mark not in attached.took_part:
        return _Use.NONE
    if has_gradient(item) or not others_have_gradients or _shares_work():
        return _Use.FULL
    return _Use.CUT


def _allowed(items: Iterable[Carried], unused: Iterable[str], asked: str) -> set[str]:
    """Return the names that the patterns of `unused` match."""
    names = [item.name for item in items]
    hits = (matching(pattern, names, asked=asked, error=StateError) for pattern in unused)
    return {name for matched in hits for name in matched}


def _missing(sites: Iterable[_Site], allowed: Collection[str]) -> list[_Site]:
    """Return the sites that have to take part and do not, nor does another of their list."""
    used = {site.group for site in sites if site.use is _Use.FULL}
    return [
        site
        for site in sites
        if site.group not in used and site.item.name not in allowed and trains(site.item)
    ]


def _unused_error(sites: Sequence[_Site], asked: str) -> StateError:
    names = [site.item.name for site in sites if site.use is _Use.NONE]
    problem = "neither a forward nor training has reached {} ({}): the adapter is inert there"
    if not names:
        names = [site.item.name for site in sites]
        problem = (
            "forwards used {} ({}), and no gradient came back: the output is detached, or the loss "
            "does not depend on it"
        )
    return StateError(
        asked,
        problem.format(quoted(names[:3]), counted(len(names), "such site")),
        "Inject without them, or give patterns of all that may be without use: "
        f"unused=[{names[0]!r}{', ...' if names[1:] else ''}]",
    )


def _shares_work() -> bool:
    """Whether this is one of several processes, each of which may hold the gradients of a part."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def has_gradient(item: Carried) -> bool:
    """Return whether a tensor of an entry has a gradient."""
    return any(t.grad is not None for t in item.entry.tensors(item.module).values())


def trains(item: Carried) -> bool:
    """Return whether a tensor of an entry is trainable."""
    return any(t.requires_grad for t in item.entry.tensors(item.module).values())


def _in_any_member(survey: Survey, site: str) -> str:
    """Return a site's name with `*` for the member of each list or dict of modules."""
    parts = site.split(".")
    owners = (survey.by_name.get(".".join(parts[:i])) for i in range(len(parts)))
    stacks = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    both = zip(parts, owners, strict=True)
    return ".".join("*" if isinstance(owner, stacks) else part for part, owner in both)

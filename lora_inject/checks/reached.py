"""Which adapters take part when a model runs: an adapter that no forward reaches is inert.

Layers note which of their adapters took part; this module compares the notes of one run, or what
training has left unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Carried, adapted_modules, entries, reach, refuse_merged
from lora_inject.core.spec.names import counted, matching, quoted
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
    found = reach(model)
    refuse_merged("unreached", *found.selections)
    active = {name for selection in found.selections for name in selection.current().names}
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

    A site takes part if a forward has used it and, where others have gradients, it has one too.
    What stands in a ModuleList or ModuleDict may be skipped, as experts and dropped layers are:
    members of one list count together. `changed` says whether training has reached an entry, which
    it also does in compiled graphs; `unused` are patterns of sites that may stay without use. Where
    there is neither a forward nor a gradient, values were only set, and nothing is said of use.

    Returns:
        Whether nothing is missing, which without `lists` may be members of lists.
    """
    items = list(entries(survey, name))
    names = [item.name for item in items]
    may = {n for each in unused for n in matching(each, names, asked=asked, error=StateError)}
    ran, seen = any(map(has_gradient, items)), False
    used: set[str] = set()
    idle: dict[str, list[str]] = {}
    cut: set[str] = set()  # used by a forward, and no gradient came back
    for site, item in zip(names, items, strict=True):
        attached, group = attached_to(item.module), _in_any_member(survey, site)
        ran_here = attached is None or item.entry.mark in attached.took_part
        seen = seen or ran_here
        if ran_here and (has_gradient(item) or not ran or _shares_work()):
            used.add(group)
        elif site not in may and trains(item):
            idle.setdefault(group, []).append(site)
            cut.update({site} if ran_here else ())
    if used.issuperset(idle) or not (seen or ran):
        return True
    reached = {_in_any_member(survey, item.name) for item in items if changed(item)}
    absent = {group: idle[group] for group in idle.keys() - used - reached} if reached else {}
    missed = [s for group, sites in absent.items() if lists or "*" not in group for s in sites]
    if missed:
        found = "neither a forward nor training has reached {} ({}): the adapter is inert there"
        if cut.issuperset(missed):
            found = "forwards used {} ({}), and no gradient came back: the output is detached, or "
            found += "the loss does not depend on it"
        missed = sorted(set(missed) - cut or missed, key=names.index)
        raise StateError(
            asked,
            found.format(quoted(missed[:3]), counted(len(missed), "such site")),
            "Inject without them, or give patterns of all that may be without use: "
            f"unused=[{missed[0]!r}{', ...' if missed[1:] else ''}]",
        )
    return not absent


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

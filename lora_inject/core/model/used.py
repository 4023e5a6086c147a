"""Adapters that are inert: sites that a run does not reach, or that training has left without use.

Layers note which of their adapters took part in a forward (compiled graphs do not). `unreached` and
the probe of `inject` compare the notes of one run; a save and Trainer's first steps ask what
training has reached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Carried, Survey, evaluating
from lora_inject.core.roots.root import (
    Injected,
    adapted_modules,
    check_unmerged,
    entries,
    has_gradient,
    root_of,
)
from lora_inject.core.spec.names import counted, quoted
from lora_inject.core.spec.patterns import Names, in_a_list
from lora_inject.errors import LayerError, StateError

LOG = logging.getLogger("lora_inject")


def unreached(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    r"""Return the sites whose adapter did not take part when `run()` ran the model.

    Args:
        model: The root, or a module that holds it.
        run: Runs the model, for instance `lambda: model(**batch)`.

    Returns:
        Names of sites of active adapters that no forward reached; empty when all took part. A
        layer that is neither called nor read shows up here.

    Raises:
        StateError: The model is merged or carries no active adapter.
    """
    _, root = root_of(model, "unreached")
    check_unmerged("unreached", root)
    if not root.selection.current().names:
        raise StateError("unreached", "no adapter is active", "Call activate(model, name) first")
    return list(dict.fromkeys(_missed_sites(model, run)))


def refuse_unreached(model: nn.Module, probe: Callable[[], Any]) -> None:
    """Check that a run in eval mode, without gradients, reaches all sites of active adapters."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), evaluating(model):
        missed = _missed_sites(model, probe)
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
    survey = Injected(model, "unreached")
    selected = survey.root.selection.current()
    carried = {id(m): (a, a.took_part) for _, m, a in adapted_modules(survey)}
    for attached, _ in carried.values():
        attached.forget_use()
    selected.forget_use()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled graphs do not note anything
            run()
        return [
            item.name
            for item in entries(survey)
            if item.entry.adapter in selected.names
            and item.entry.mark not in carried[id(item.module)][0].took_part
        ]
    finally:
        for attached, before in carried.values():
            attached.took_part |= before


def say_untrained(name: str, state: AdapterState) -> None:
    """Log that an adapter adds nothing yet: right at a first step, a lost run at the last."""
    if state.sites and not state.trained and all(site.is_zero for site in state.sites.values()):
        LOG.warning(
            "save adapter %r: its update is 0 at each of its sites (%d), as before training. "
            "If it was trained, the optimizer did not have its tensors: make the optimizer after "
            "inject, from adapter_parameters(model).values()",
            name,
            len(state.sites),
        )


def took_part(item: Carried) -> bool:
    """Return whether a forward has used an entry."""
    attached = attached_to(item.module)
    return attached is None or item.entry.mark in attached.took_part


def refuse_unused_sites(
    survey: Survey, name: str, state: AdapterState, unused: Iterable[str], asked: str
) -> None:
    """Raise if an adapter was trained, and has sites of no use; `state` has its values."""

    def changed(item: Carried) -> bool:
        if item.entry.spec is not None:
            return not state.sites[item.name].is_zero
        held = item.entry.held(item.module).detach()
        if hasattr(held, "full_tensor"):  # a comparison would have to be made by all processes
            return True
        return not torch.equal(held, item.entry.start(item.weight).to(held.dtype))

    refuse_unused(survey, name, changed, unused, asked)


def refuse_unused(
    survey: Survey,
    name: str,
    changed: Callable[[Carried], bool],
    unused: Iterable[str],
    asked: str,
    *,
    lists: bool = True,
) -> None:
    """Raise if an adapter was trained, and a site of it neither changed nor takes part in training.

    1. A site takes part if a forward has used it and, where others have gradients, it has one too.
    2. What stands in a ModuleList or ModuleDict may be skipped, as experts and dropped layers are:
       of the members of one list, one that takes part is enough.
    3. `changed` says whether training has reached an entry, which it also does in compiled graphs,
       where no use is noted.
    4. `unused` are patterns of sites that may stay without use.
    5. Where there is neither a forward nor a gradient, or nothing has changed, values were only
       set, and nothing is said of use.
    6. Without `lists` nothing is said of members of lists.
    """
    items = [*entries(survey, name)]
    names = [item.name for item in items]
    known = Names(names)
    patterns = in_a_list(unused, f"{asked}, unused")
    hits = (known.matching(pattern, asked, StateError) for pattern in patterns)
    allowed = {each for matched in hits for each in matched}
    # One of several processes may hold the gradients of a part.
    shares = torch.distributed.is_available() and torch.distributed.is_initialized()
    by_gradients = any(map(has_gradient, items))
    full = [
        took_part(item) and (has_gradient(item) or shares or not by_gradients) for item in items
    ]
    if all(full) or not (by_gradients or any(map(took_part, items))):
        return
    groups = [_in_any_member(survey, each) for each in names]
    used = {group for group, is_full in zip(groups, full, strict=True) if is_full}
    reached = {group for item, group in zip(items, groups, strict=True) if changed(item)}
    absent = [
        item
        for item, group in zip(items, groups, strict=True)
        if group not in used | reached and item.name not in allowed and trains(item)
        if lists or "*" not in group
    ]
    if reached and absent:
        raise _unused_error(absent, asked)


def _unused_error(items: Iterable[Carried], asked: str) -> StateError:
    names = [item.name for item in items if not took_part(item)]
    problem = "neither a forward nor training has reached {} ({}): the adapter is inert there"
    if not names:
        names = [item.name for item in items]
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

"""Which sites training has left without use, by what layers have noted and by gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.roots.carried import entries, has_gradient
from lora_inject.core.spec.names import counted, quoted
from lora_inject.core.spec.patterns import matching
from lora_inject.errors import StateError

LOG = logging.getLogger("lora_inject")


def say_untrained(name: str, n_sites: int) -> None:
    """Log that an adapter adds nothing yet: right at a first step, a lost run at the last."""
    LOG.warning(
        "save adapter %r: its update is 0 at each of its sites (%d), as before training. "
        "If it was trained, the optimizer did not have its tensors: make the optimizer after "
        "inject, from adapter_parameters(model).values()",
        name,
        n_sites,
    )


class _Use(Enum):
    FULL = "a forward used it, and it has a gradient where others have one"
    CUT = "a forward used it, and no gradient came back"
    NONE = "no forward used it"


class _Site(NamedTuple):
    """An entry of an adapter, with the use that is known of it."""

    item: Carried
    group: str  # its name, with `*` for the member of a list or dict of modules
    use: _Use


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

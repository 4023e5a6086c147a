"""Where an adapter goes on a model, and why a module cannot take it; nothing is changed here."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache

from torch.nn.parameter import is_lazy

from lora_inject.core.layers.attached import Entry, attached_to, attribute
from lora_inject.core.layers.class_swap import check_swappable
from lora_inject.core.layers.kinds import mixin_of
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.in_full import places_of_copies
from lora_inject.core.model.unusable import check_values, refuse_lazy, refuse_taken
from lora_inject.core.spec.sites import SiteSpec


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Carried]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all.
    """
    if any(map(is_lazy, survey.tensors)):
        refuse_lazy(survey, name)
    wanted = [*_of_sites(survey, name, sites)]
    if copies:
        wanted += places_of_copies(survey, name, copies)
    taken: set[tuple[int, str]] = set()
    classes: set[Hashable] = set()  # what holds of one layer of a class holds of all
    for place in wanted:
        tensor = id(place.module), place.entry.param
        _check_free(place, classes, again=tensor in taken)
        taken.add(tensor)
    if unusual := [place for place in wanted if not _is_usual(place)]:
        for place in unusual:
            check_values(place, _asked(place))
    return wanted


def _is_usual(place: Carried) -> bool:
    """Whether an entry is LoRA on a plain tensor, whose values it can always use."""
    spec = place.entry.spec
    return spec is not None and spec.variant == "lora" and not is_quantized(place.weight)


def _asked(place: Carried) -> str:
    return f"{'site' if place.entry.spec else 'trained tensor'} {place.name!r}"


def _of_sites(survey: Survey, name: str, sites: Iterable[SiteSpec]) -> Iterator[Carried]:
    """Yield the place of each site, and of the bias of its B where it has one."""
    modules, paths = survey.by_name, survey.paths

    @cache  # shared by sites
    def names_of(roles: tuple[str, ...], read: str | None) -> dict[str, str]:
        return {role: attribute(role, name, read) for role in roles if role != "b"}

    for spec in sites:
        owner, _, param = spec.weight.rpartition(".")
        module = modules[owner]
        read = None if spec.update == "forward" else param
        names = names_of(spec.roles, read)
        path = paths[id(module)]
        yield Carried(path, module, Entry(name, spec, param, names))
        if spec.lora_bias:
            b = {"b": attribute("b", name, "bias")}
            entry = Entry(name, None, "bias", b, spec.shapes["b"], None, spec.scale)
            yield Carried(path, module, entry)


def _check_free(place: Carried, classes: set[Hashable], *, again: bool) -> None:
    """Check that a module has room for an entry; of each class and set of names once."""
    alike = type(place.module), attached_to(place.module) is None, id(place.entry.names)
    is_new = alike not in classes
    if again or not _is_free(place) or (is_new and not _class_is_free(place)):
        refuse_taken(place, _asked(place), again=again)
    if is_new:
        check_swappable(place.module, mixin_of(place.entry), _asked(place))
        classes.add(alike)


def _is_free(place: Carried) -> bool:
    """Whether a module has room for an entry; `hasattr` would raise and catch for each name."""
    module, entry = place.module, place.entry
    if entry.scale is not None and module._parameters.get("bias") is None:
        return False
    own, parameters = module.__dict__, module._parameters
    buffers, modules = module._buffers, module._modules
    for flat in entry.names.values():
        if flat in own or flat in parameters or flat in buffers or flat in modules:
            return False
    return True


def _class_is_free(place: Carried) -> bool:
    """Whether a class has room for an entry."""
    cls, entry = type(place.module), place.entry
    if any(hasattr(cls, flat) for flat in entry.names.values()):
        return False
    plain = attached_to(place.module) is None
    return entry.on_output or not plain or not hasattr(cls, entry.param)

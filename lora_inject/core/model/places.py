"""Where an adapter goes on a model, and why a module cannot take it; nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from torch import nn
from torch.nn.parameter import is_lazy

from lora_inject.core.layers.attached import Entry, attached_to, attribute
from lora_inject.core.layers.class_swap import check_swappable
from lora_inject.core.layers.kinds import mixin_of
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Carried
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import LayerError


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Carried]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all.
    """
    for holder in survey.holders if any(map(is_lazy, survey.tensors)) else ():
        if is_lazy(holder.tensor):
            lazy = "it is lazy and not initialized"
            raise LayerError(f"adapter {name!r}, {holder.name!r}", lazy, "Run the model once first")
    wanted = [*_of_sites(survey, name, sites)]
    if copies:
        from lora_inject.core.model.in_full import places_of_copies

        wanted += places_of_copies(survey, name, copies)
    taken: set[tuple[int, str]] = set()
    swappable: set[tuple[type, bool]] = set()  # what holds of one layer of a class holds of all
    for place in wanted:
        for reason in _reasons_here(place, taken):
            raise LayerError(_asked(place), *reason)
        alike = type(place.module), attached_to(place.module) is None
        if alike not in swappable:
            check_swappable(place.module, mixin_of(place.entry), _asked(place))
            swappable.add(alike)
        taken.add((id(place.module), place.entry.param))
    if unusual := [place for place in wanted if not _is_usual(place)]:
        from lora_inject.core.model.unusable import check_values

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
    flat_names = cache(lambda roles, read: {role: attribute(role, name, read) for role in roles})
    for spec in sites:
        _, module, param = survey.at(spec.weight)
        starts = ("A0", "B0") * (spec.init in FROM_WEIGHT)
        roles = (*(role for role in spec.shapes if role != "b"), *starts)
        names = flat_names(roles, None if spec.update == "forward" else param)  # shared by sites
        path = survey.paths[id(module)]
        yield Carried(path, module, Entry(name, spec, param, names))
        if spec.lora_bias:
            b = {"b": attribute("b", name, "bias")}
            entry = Entry(name, None, "bias", b, spec.shapes["b"], None, spec.scale)
            yield Carried(path, module, entry)


def _reasons_here(place: Carried, taken: set[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """Yield why a module cannot take an entry, and what to do."""
    module, entry, cls = place.module, place.entry, type(place.module)
    if (id(module), entry.param) in taken:
        problem = f"its {entry.param!r} is adapted and trained, or gets a bias twice"
        yield problem, "Leave one of train, bias and lora_bias out"
    if entry.scale is not None and module._parameters.get("bias") is None:
        problem = (
            "lora_bias is added to the layer's bias, which is None: no merge could hold the sum"
        )
        yield problem, "Leave lora_bias out there, or give the layer a bias of zeros"
    for flat in entry.names.values():
        if _is_taken(module, flat):
            yield f"the module has an attribute {flat!r}", "Choose another adapter name"
    if not entry.on_output and attached_to(module) is None and hasattr(cls, entry.param):
        problem = f"{cls.__name__}.{entry.param} is computed by the class"
        yield problem, "A parameter that is itself computed cannot take an update"


def _is_taken(module: nn.Module, flat: str) -> bool:
    """Whether a module has an attribute; `hasattr` would raise and catch for each that is free."""
    own = flat in module.__dict__ or hasattr(type(module), flat)
    return own or flat in module._parameters or flat in module._buffers or flat in module._modules

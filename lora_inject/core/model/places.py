"""Where an adapter goes on a model, and why a module cannot take it; nothing is changed here."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache

from torch.nn.parameter import is_lazy

from lora_inject.core.functional.weight import reads_as_sum
from lora_inject.core.layers.attached import Entry, attached_to, attribute
from lora_inject.core.layers.class_swap import check_swappable
from lora_inject.core.layers.kinds import mixin_of
from lora_inject.core.layers.packed_weights import weight_kind
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.in_full import places_of_copies, reasons_against_copy
from lora_inject.core.spec.layouts import why_no_gain
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
    for holder in survey.holders:
        if is_lazy(holder.tensor):
            problem = "it is lazy and not initialized"
            where = f"adapter {name!r}, {holder.name!r}"
            raise LayerError(where, problem, "Run the model once first")
    wanted = [*_of_sites(survey, name, sites)]
    if copies:
        wanted += places_of_copies(survey, name, copies)
    taken: set[tuple[int, str]] = set()
    classes: set[Hashable] = set()  # what holds of one layer of a class holds of all
    for place in wanted:
        tensor = id(place.module), place.entry.param
        _check_free(place, classes, again=tensor in taken)
        taken.add(tensor)
    for place in wanted:
        for reason in _reasons(place):
            raise LayerError(_asked(place), *reason)
    return wanted


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
    """Check that a module has room for an entry; of each class and set of names once.

    `again` if another entry is on the same tensor.
    """
    module, entry, cls = place.module, place.entry, type(place.module)
    if again:
        problem = f"its {entry.param!r} is adapted and trained, or gets a bias twice"
        remedy = "Leave one of train, bias and lora_bias out"
        raise LayerError(_asked(place), problem, remedy)
    if entry.scale is not None and module._parameters.get("bias") is None:
        problem = "lora_bias is added to the layer's bias, which is None: no merge could hold the "
        remedy = "Leave lora_bias out there, or give the layer a bias of zeros"
        raise LayerError(_asked(place), f"{problem}sum", remedy)
    plain = attached_to(module) is None
    alike = cls, plain, id(entry.names)
    is_new = alike not in classes
    # On the module by the dicts: `hasattr` would raise and catch for each name.
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    for flat in entry.names.values():
        if any(flat in names for names in held) or (is_new and hasattr(cls, flat)):
            problem = f"the module has an attribute {flat!r}"
            raise LayerError(_asked(place), problem, "Choose another adapter name")
    if is_new:
        if plain and not entry.on_output and hasattr(cls, entry.param):
            problem = f"{cls.__name__}.{entry.param} is computed by the class"
            remedy = "A parameter that is itself computed cannot take an update"
            raise LayerError(_asked(place), problem, remedy)
        check_swappable(module, mixin_of(entry), _asked(place))
        classes.add(alike)


def _reasons(place: Carried) -> Iterator[tuple[str, str]]:
    """Yield why an entry cannot use the values of its tensor, and what to do.

    | entry | tensor | refused |
    |---|---|---|
    | copy | packed, or of a layer that moves statistics | always |
    | site with a gain | any | where the layer has no norms of its outputs |
    | site on the output | packed | with an init from W, or a gain whose norms its kind hides |
    | site that is read | packed | the same, in float32, and where it cannot read as a sum |
    """
    spec = place.entry.spec
    if spec is None:
        yield from reasons_against_copy(place)
        return
    if place.entry.gained and (why := why_no_gain(spec)):
        yield f"variant {spec.variant} on {why}", "Train it with variant: lora"
    if is_quantized(place.weight):
        yield from reasons_of_packed(place, spec)


def reasons_of_packed(place: Carried, spec: SiteSpec) -> Iterator[tuple[str, str]]:
    """Yield why a site cannot be on a packed weight, and what to do.

    1. A weight that is read has to read as a sum, and not in float32, which would unpack all of it.
    2. The norms that a gain needs must be known of its kind.
    3. An init from W would need its values.
    """
    module, weight = place.module, place.weight
    packed = f"quantized ({type(weight).__name__})"
    on_output = place.entry.on_output
    fits = on_output or reads_as_sum(weight)
    if fits and not on_output and spec.compute == "float32":
        yield "compute: float32 would unpack all experts at once", "Use compute: base"
    hidden = None
    if fits and place.entry.gained:
        hidden = weight_kind(module, weight).why_not("norms", module, weight)
    advice = {
        "the layer rather than its weight": not fits,
        "variant: lora": hidden is not None,
        "an init that does not start from W": spec.init in FROM_WEIGHT,
    }
    wanted = [words for words, holds in advice.items() if holds]
    if wanted:
        how = packed if hidden is None else f"{packed}: {hidden.found}"
        reads = f"{_reader(spec, fits=fits)} reads its values, and they are {how}"
        yield reads, f"Use {' and '.join(wanted)}"


def _reader(spec: SiteSpec, *, fits: bool) -> str:
    """Return what of a site reads the values of W, for a message."""
    if not fits:
        return "a weight update"
    return f"init {spec.init}" if spec.init in FROM_WEIGHT else f"variant {spec.variant}"

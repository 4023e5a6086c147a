"""Where an adapter goes on a model, and why a module cannot take it; nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.core.functional.factors import reads_as_sum
from lora_inject.core.layers.attached import Entry, attached_to, attribute
from lora_inject.core.layers.class_swap import check_swappable
from lora_inject.core.layers.packed_weights import weight_kind
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Carried
from lora_inject.core.spec.names import Below
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import LayerError


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Carried]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all. Nothing
    is changed.
    """
    for holder in survey.holders if any(map(is_lazy, survey.tensors)) else ():
        if is_lazy(holder.tensor):
            lazy = "it is lazy and not initialized"
            raise LayerError(f"adapter {name!r}, {holder.name!r}", lazy, "Run the model once first")
    wanted = [*_of_sites(survey, name, sites), *_of_copies(survey, name, copies)]
    taken: set[tuple[int, str]] = set()
    for place in wanted:
        target = f"{'site' if place.entry.spec else 'trained tensor'} {place.name!r}"
        for reason in chain(_reasons_here(place, taken), _reasons_of_values(place)):
            raise LayerError(target, *reason)
        check_swappable(place.module, target)
        taken.add((id(place.module), place.entry.param))
    return wanted


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


def _of_copies(
    survey: Survey, name: str, copies: Mapping[str, tuple[int, ...] | None]
) -> Iterator[Carried]:
    """Yield the place of each copied tensor."""
    for copy, rows in copies.items():
        _, module, param = holder = survey.at(copy)
        whole = holder.tensor.shape
        shape = tuple(whole) if rows is None else (len(rows), *whole[1:])
        entry = Entry(name, None, param, {"T": attribute("T", name, param)}, shape, rows)
        yield Carried(survey.paths[id(module)], module, entry)


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


def refuse_statistics(survey: Survey, modules: Collection[str], asked: str) -> None:
    """Raise if one of the modules that are to train in full has a layer with statistics inside."""
    below = Below(modules)
    for name, module in survey.by_name.items() if modules else ():
        for reason in _reasons_in_full(module) if name in below else ():
            raise LayerError(f"{asked}, {name!r}", *reason)


def _reasons_in_full(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield why a layer that moves statistics, which are buffers, cannot train in full."""
    if isinstance(getattr(module, "running_mean", None), Tensor):
        problem = (
            f"its {type(module).__name__} moves running_mean and running_var as well while it "
        )
        problem += (
            "trains: those are the base's buffers, which an adapter neither holds nor restores"
        )
        remedy = "Leave it out, or give the layer track_running_stats=False and no running_mean"
        yield problem, remedy


def _reasons_of_values(place: Carried) -> Iterator[tuple[str, str]]:
    """Yield why an entry cannot use the values of its tensor, and what to do.

    | entry | tensor | refused |
    |---|---|---|
    | copy | packed, or of a layer that moves statistics | always |
    | site with a gain | any | where the layer has no norms of its outputs |
    | site on the output | packed | with an init from W, or a gain whose norms its kind hides |
    | site that is read | packed | the same, in float32, and where it cannot read as a sum |
    """
    spec, weight = place.entry.spec, place.weight
    packed = f"quantized ({type(weight).__name__})" if is_quantized(weight) else ""
    if spec is None:
        if packed:
            remedy = "Adapt the layer with a rule (targets) instead, or load the base unquantized"
            yield f"it is {packed}: no copy of it can train", remedy
        yield from _reasons_in_full(place.module)
        return
    if spec.why_no_gain and place.entry.variant.gained:
        problem = f"variant {spec.variant} on {spec.why_no_gain}"
        yield problem, "Train it with variant: lora"
    if packed:
        yield from _reasons_of_packed(place, spec, packed)


def _reasons_of_packed(place: Carried, spec: SiteSpec, packed: str) -> Iterator[tuple[str, str]]:
    """Yield why a site cannot be on a packed weight; `packed` says how it is held."""
    module, weight = place.module, place.weight
    on_output = place.entry.on_output
    fits = on_output or reads_as_sum(weight)
    if fits and not on_output and spec.compute == "float32":
        yield "compute: float32 would unpack all experts at once", "Use compute: base"
    hidden = None
    if fits and place.entry.variant.gained:
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

"""Where an adapter goes on a model, and why a module cannot take it; nothing is changed here."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping

from torch.nn.parameter import is_lazy

from lora_inject.core.layers.adapted import has_fixed_class, plain_class
from lora_inject.core.layers.attached import Entry, attribute, check_class_kept
from lora_inject.core.layers.library import weight_kind
from lora_inject.core.layers.survey import Carried, Survey, base_tensor
from lora_inject.core.layers.weight_kinds import is_quantized
from lora_inject.core.spec.layouts import why_no_gain
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import LayerError, article

BIASED_KINDS = ("linear", "conv1d", "conv")


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Carried]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all.
    """
    lazy = [*map(is_lazy, survey.tensors)]
    if any(lazy):
        where = f"adapter {name!r}, {survey.holders[lazy.index(True)].name!r}"
        raise LayerError(where, "it is lazy and not initialized", "Run the model once first")
    wanted = [*_of_sites(survey, name, sites), *_of_copies(survey, name, copies)]
    taken: set[tuple[int, str]] = set()
    classes: set[Hashable] = set()  # what holds of one layer of a class holds of all
    for place in wanted:
        tensor = id(place.module), place.entry.param
        _check_free(place, classes, again=tensor in taken)
        _check_values(place)
        taken.add(tensor)
    return wanted


def _asked(place: Carried) -> str:
    return f"{'site' if place.entry.spec else 'trained tensor'} {place.name!r}"


def _of_sites(survey: Survey, name: str, sites: Iterable[SiteSpec]) -> Iterator[Carried]:
    """Yield the place of each site, and of the bias of its B where it has one."""
    modules, paths = survey.by_name, survey.paths
    known: dict[Hashable, dict[str, str]] = {}  # shared by sites that differ only in their names
    for spec in sites:
        owner, _, param = spec.weight.rpartition(".")
        module = modules[owner]
        alike = id(spec.shapes), param
        if (names := known.get(alike)) is None:
            read = None if spec.update == "forward" else param
            names = {role: attribute(role, name, read) for role in spec.roles if role != "b"}
            known[alike] = names
        path = paths[id(module)]
        yield Carried._make((path, module, Entry(name, spec, param, names)))  # at half the cost
        if spec.lora_bias:
            if spec.slices or spec.variant != "lora" or spec.kind not in BIASED_KINDS:
                what = "slices" if spec.slices else f"{spec.variant} on {article(spec.kind)}"
                problem = f"it has a bias of B (lora_bias) beside {what}"
                raise LayerError(f"site {spec.name!r}", problem, "Take that of a plain layer")
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


def _check_free(place: Carried, classes: set[Hashable], *, again: bool) -> None:
    """Check that a module has room for an entry; of each class and set of names once.

    `again` if another entry is on the same tensor.
    """
    module, entry, cls = place.module, place.entry, type(place.module)
    if again:
        problem = f"its {entry.param!r} is adapted and trained, or gets a bias twice"
        remedy = "Leave one of them out"
        raise LayerError(_asked(place), problem, remedy)
    if entry.scale is not None and module._parameters.get("bias") is None:
        problem = "the bias of B (lora_bias) is added to the layer's bias, which is None: no merge "
        raise LayerError(_asked(place), f"{problem}could hold the sum", "Give it a bias of zeros")
    alike = cls, id(entry.names)
    is_new = alike not in classes
    # By the dicts: `hasattr` would raise and catch for each name.
    own, held, buffers = module.__dict__, module._parameters, module._buffers
    for flat in entry.names.values():
        of_class = is_new and hasattr(cls, flat)
        if flat in own or flat in held or flat in buffers or flat in module._modules or of_class:
            problem = f"the module has an attribute {flat!r}"
            raise LayerError(_asked(place), problem, "Choose another adapter name")
    if is_new:
        if "_lora" not in own and has_fixed_class(cls):
            problem = f"{cls.__name__} has a class before nn.Module among its bases, and Python "
            problem += "lets no such module change its class"
            raise LayerError(_asked(place), problem, "Leave it out, or put nn.Module first")
        if not entry.on_output and hasattr(plain_class(cls), entry.param):
            problem = f"{cls.__name__}.{entry.param} is computed by the class"
            remedy = "A parameter that is itself computed cannot take an update"
            raise LayerError(_asked(place), problem, remedy)
        if entry.spec is not None and entry.gained and (why := why_no_gain(entry.spec)):
            problem = f"variant {entry.spec.variant} on {why}"
            raise LayerError(_asked(place), problem, "Train it with variant: lora")
        classes.add(alike)
    if "_lora" in own:
        check_class_kept(module, _asked(place))


def _check_values(place: Carried) -> None:
    """Raise if an entry cannot use the values of its tensor.

    | entry | tensor | refused |
    |---|---|---|
    | copy | packed | always |
    | site on the output | packed | with an init from W, or a gain whose norms its kind hides |
    | site that is read | packed | always |
    """
    spec, packed = place.entry.spec, is_quantized(base_tensor(place.module, place.entry.param))
    if spec is None:
        if packed:
            problem = f"it is quantized ({type(place.weight).__name__}): no copy of it can train"
            remedy = "Adapt the layer with a rule (targets) instead, or load the base unquantized"
            raise LayerError(_asked(place), problem, remedy)
        return
    if packed:
        _check_packed(place, spec)


def _check_packed(place: Carried, spec: SiteSpec) -> None:
    """Raise if a site cannot be on a packed weight.

    1. A weight that is read has no values to read.
    2. The norms that a gain needs must be known of its kind.
    3. An init from W would need its values.
    """
    module, weight = place.module, place.weight
    fits = place.entry.on_output
    hidden = None
    if fits and place.entry.gained:
        hidden = weight_kind(module, weight).why_not("norms", module, weight)
    starts_from_w = spec.init in FROM_WEIGHT
    advice = {
        "the layer rather than its weight": not fits,
        "variant: lora": hidden is not None,
        "an init that does not start from W": starts_from_w,
    }
    if wanted := [words for words, holds in advice.items() if holds]:
        reader = f"init {spec.init}" if starts_from_w else f"variant {spec.variant}"
        problem = f"{reader if fits else 'a weight update'} reads its values, and they are "
        problem += f"quantized ({type(weight).__name__})"
        if hidden is not None:
            problem += f": {hidden.found}"
        raise LayerError(_asked(place), problem, f"Use {' and '.join(wanted)}")

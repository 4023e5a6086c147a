"""Adapters under the names that older versions of transformers gave to a model's tensors.

Transformers 5 changes the names in older files to those of its classes, and stacks experts that
were separate modules. It has a table of these conversions for each class. This file does the same
to an adapter: it renames sites, and makes the sites of single experts one site on the stack.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_inject.core.adapter import reshape
from lora_inject.core.adapter.other_tensors import distinct, under_names
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.library import Library
from lora_inject.errors import FormatError

_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class PlaceInClass(NamedTuple):
    """Where a tensor of an older file is in a class: a whole tensor, or one expert in it.

    `part` says which of the `n_parts` matrices that are laid one above the other: of
    `gate_up_proj`, which has two.
    """

    name: str
    expert: int | None = None
    part: int = 0
    n_parts: int = 1


def places_in_class(
    model: Any, weights: Mapping[str, object]
) -> Callable[[str], PlaceInClass | None]:
    """Return a function from a tensor's name in a file of any age to its place.

    The function returns None for a tensor that is converted in another way than by stacking.
    """
    try:
        conversions = import_module("transformers.conversion_mapping")
        loading = import_module("transformers.core_model_loading")
    except ImportError:  # transformers 4, which stacks nothing
        return _renamed(model, weights)
    transforms = conversions.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    renamings += [t for t in transforms if t not in converters and t not in renamings]
    by_source = {source: t for t in converters for source in t.source_patterns}

    def place(name: str) -> PlaceInClass | None:
        new, source = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, weights
        )
        if source is None:
            return PlaceInClass(new)
        transform = by_source[source]
        number = re.search(re.escape(source).replace(r"\*", r"(\d+)"), name)
        steps = [type(step).__name__ for step in transform.operations]
        dims = [getattr(step, "dim", None) for step in transform.operations]
        if steps not in _STACKING or dims != [0, 1][: len(dims)] or number is None:
            return None
        if not number.groups():
            return None
        sources = transform.source_patterns
        return PlaceInClass(new, int(number[1]), sources.index(source), len(sources))

    return place


class OlderNames(Library):
    """Names that older versions of transformers gave to a model's tensors."""

    modules = ("transformers",)

    def in_names_of(
        self, model: nn.Module, state: AdapterState, weights: Mapping[str, Tensor]
    ) -> AdapterState:
        """Return an adapter under the names of a model, where transformers knows its older names.

        `weights` are the model's base tensors by each of their names. Sites that remain unknown
        keep their names. An adapter that already has the model's names is returned as it is.
        """
        named = [*(site.spec.weight for site in state.sites.values()), *state.trained]
        if all(name in weights for name in (*named, *state.base_copies)):
            return state
        if "transformers" not in sys.modules or not hasattr(model, "base_model_prefix"):
            return state
        try:
            place = places_in_class(model, weights)
        except AttributeError:
            return state
        return _in_places(place, state, weights)


def _in_places(
    place: Callable[[str], PlaceInClass | None], state: AdapterState, weights: Mapping[str, Tensor]
) -> AdapterState:
    def find(name: str) -> PlaceInClass | None:
        """The place of a tensor that is not in the model under its name."""
        converted = None if name in weights else place(name)
        return converted if converted is not None and converted.name in weights else None

    def new(name: str) -> str:
        converted = find(name)
        return name if converted is None or converted.expert is not None else converted.name

    sites: dict[str, SiteState] = {}
    experts: list[tuple[PlaceInClass, SiteState]] = []
    for name, site in state.sites.items():
        converted = find(site.spec.weight)
        if converted is None or converted.expert is None:
            sites[name] = site
        else:
            experts.append((converted, site))
    made = under_names(replace(state, sites=sites), new, FormatError)
    stacks: dict[str, dict[PlaceInClass, SiteState]] = {}
    for expert, site in distinct(experts, FormatError).items():
        stacks.setdefault(expert.name, {})[expert] = site
    stacked = [
        (name, _stacked(name, tuple(weights[name].shape), members))
        for name, members in stacks.items()
    ]
    # Single experts' values are elsewhere in a stack.
    mark = {name: known for name, known in (made.fingerprint or {}).items() if name in weights}
    all_sites = distinct([*made.sites.items(), *stacked], FormatError)
    return replace(made, sites=all_sites, fingerprint=mark or None)


def _stacked(
    name: str, shape: tuple[int, ...], members: Mapping[PlaceInClass, SiteState]
) -> SiteState:
    """One site on a stack (experts, out, in) from sites on its matrices.

    An expert without a site has zeros. Matrices that are laid one above the other are slices.
    """
    experts, n_out, n_in = shape
    n_parts = next(iter(members)).n_parts
    height = n_out // n_parts
    stacks: dict[str, dict[int, SiteState]] = {}
    for place, site in members.items():
        spec, where, number = site.spec, f"site '{site.spec.name}'", int(place.expert or 0)
        fits = (spec.in_features, spec.out_features) == (n_in, height)
        if not fits or spec.slices is not None or number >= experts:
            raise FormatError(
                where,
                f"it maps {spec.in_features} to {spec.out_features} features, and the model holds "
                f"'{name}' {list(shape)}, of which it would be a part",
                "Load the adapter onto the model that it was made for",
            )
        if site.further:
            problem = "its experts are one tensor in this model, which cannot hold the "
            problem += f"{' and '.join(site.further)} of each"
            remedy = "Merge it with the transformers and PEFT that it was made with"
            raise FormatError(where, problem, remedy)
        stacks.setdefault(str(place.part), {})[number] = site
    parts = {p: reshape.join_stack(name, of, experts, name) for p, of in sorted(stacks.items())}
    sizes = {str(part): height for part in range(n_parts)}
    made = parts["0"] if n_parts == 1 else reshape.join_sites(name, parts, sizes, name)
    return replace(made, spec=replace(made.spec, dropout=0.0))


def _renamed(model: Any, weights: Mapping[str, object]) -> Callable[[str], PlaceInClass | None]:
    """As `places_in_class` for transformers 4, which renames by patterns of a class."""
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    prefix = f"{model.base_model_prefix}."

    def place(name: str) -> PlaceInClass | None:
        for pattern, new in patterns.items():
            renamed = re.sub(pattern, new, name)
            if renamed != name:
                name = renamed
                break
        if name in weights:
            return PlaceInClass(name)
        candidates = (prefix + name, name.removeprefix(prefix))
        return PlaceInClass(next((n for n in candidates if n in weights), name))

    return place

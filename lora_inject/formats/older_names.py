"""Adapters under the names that older versions of transformers gave to a model's tensors.

Transformers 5 turns the names in older files into those of its classes, and stacks experts that
were modules of their own; its own conversions say how, for each class. The same is done here to an
adapter: sites are renamed, and the sites of single experts become one site on the stack.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_inject.adapter.fingerprint import Fingerprint
from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.spec.sites import SiteSpec

_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class Place(NamedTuple):
    """Where a tensor of an older file is in a class: a whole tensor, or one expert in it.

    `part` says which of the `n_parts` matrices that are laid one above the other: of
    `gate_up_proj`, which has two.
    """

    name: str
    expert: int | None = None
    part: int = 0
    n_parts: int = 1


def places(model: Any, weights: Mapping[str, object]) -> Callable[[str], Place | None]:
    """Return what tells the place of a tensor by its name in a file of any age.

    None where the tensor is converted in another way than by stacking. ImportError: transformers is
    older, or has no such conversions any more.
    """
    conversions = import_module("transformers.conversion_mapping")
    loading = import_module("transformers.core_model_loading")
    transforms = conversions.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    renamings += [t for t in transforms if t not in converters and t not in renamings]
    by_source = {source: t for t in converters for source in t.source_patterns}

    def place(name: str) -> Place | None:
        new, source = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, weights
        )
        if source is None:
            return Place(new)
        transform = by_source[source]
        number = re.search(re.escape(source).replace(r"\*", r"(\d+)"), name)
        steps = [type(step).__name__ for step in transform.operations]
        dims = [getattr(step, "dim", None) for step in transform.operations]
        if steps not in _STACKING or dims != [0, 1][: len(dims)] or number is None:
            return None
        if not number.groups():
            return None
        sources = transform.source_patterns
        return Place(new, int(number[1]), sources.index(source), len(sources))

    return place


def in_names_of(
    model: nn.Module, state: AdapterState, weights: Mapping[str, Tensor]
) -> AdapterState:
    """Return an adapter under the names of a model, where transformers knows its older names.

    `weights` are the model's base tensors by each of their names. What is still unknown keeps its
    name; an adapter that has the model's names already is returned as it is.
    """
    named = [*(site.spec.weight for site in state.sites.values()), *state.trained]
    if all(name in weights for name in (*named, *state.base_copies)):
        return state
    if "transformers" not in sys.modules or not hasattr(model, "base_model_prefix"):
        return state
    try:
        place = places(model, weights)
    except (ImportError, AttributeError):
        return state
    return _Renaming(place, weights).apply(state)


class _Renaming:
    """Applies the places of a model to an adapter."""

    def __init__(self, place: Callable[[str], Place | None], weights: Mapping[str, Tensor]) -> None:
        self.place = place
        self.weights = weights

    def apply(self, state: AdapterState) -> AdapterState:
        sites: dict[str, SiteState] = {}
        stacks: dict[str, dict[Place, SiteState]] = {}
        for name, site in state.sites.items():
            found = self._find(site.spec.weight)
            if found is None:
                sites[name] = site
            elif found.expert is not None:
                stacks.setdefault(found.name, {})[found] = site
            else:
                spec = _at(site.spec, found.name)
                sites[spec.name] = dataclasses.replace(site, spec=spec)
        for name, members in stacks.items():
            sites[name] = _stacked(name, tuple(self.weights[name].shape), members)
        return dataclasses.replace(
            state,
            sites=sites,
            trained=self._renamed(state.trained),
            rows=self._renamed(state.rows),
            base_copies=self._renamed(state.base_copies),
            fingerprint=self._fingerprint(state.fingerprint),
        )

    def _find(self, name: str) -> Place | None:
        """The place of a tensor that is not in the model under its name."""
        if name in self.weights:
            return None
        found = self.place(name)
        return found if found is not None and found.name in self.weights else None

    def _name(self, name: str) -> str:
        found = self._find(name)
        return name if found is None or found.expert is not None else found.name

    def _renamed(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {self._name(name): each for name, each in found.items()}

    def _fingerprint(self, of: Fingerprint | None) -> Fingerprint | None:
        """A fingerprint under the new names; single experts' values are elsewhere in a stack."""
        if of is None:
            return None
        names = {name: self._name(name) for name in of.shapes}
        kept = {name: new for name, new in names.items() if new in self.weights}
        return Fingerprint(
            {new: of.shapes[name] for name, new in kept.items()},
            {new: of.samples[name] for name, new in kept.items() if name in of.samples},
            {kept[name]: how for name, how in of.quantized.items() if name in kept},
        )


def _at(spec: SiteSpec, weight: str) -> SiteSpec:
    """A site whose weight is called otherwise."""
    end = spec.weight.removeprefix(spec.name)
    return spec.at(weight.removesuffix(end) if end else weight, weight)


def _stacked(name: str, shape: tuple[int, ...], members: Mapping[Place, SiteState]) -> SiteState:
    """One site on a stack (experts, out, in) from sites on its matrices.

    Matrices that are laid one above the other have ranks of their own: A is stacked, B is
    block-diagonal, and an expert without a site has zeros.
    """
    experts, n_out, n_in = shape
    n_parts = next(iter(members)).n_parts
    rank = max(site.spec.rank for site in members.values())
    first = next(iter(members.values()))
    A = first.A.new_zeros(experts, n_parts * rank, n_in)
    B = first.A.new_zeros(experts, n_out, n_parts * rank)
    for place, site in members.items():
        spec, height = site.spec, n_out // n_parts
        fits = (spec.in_features, spec.out_features) == (n_in, height)
        if not fits or site.A0 is not None or spec.slices is not None or place.expert >= experts:  # type: ignore[operator]
            raise FormatError(
                f"site '{spec.name}'",
                f"it maps {spec.in_features} to {spec.out_features} features, and the model holds "
                f"'{name}' {list(shape)}, of which it would be a part",
                "Load the adapter onto the model that it was made for",
            )
        start, row = place.part * rank, place.part * height
        A[place.expert, start : start + spec.rank] = site.A
        update = site.B * (site.scale / first.scale)
        B[place.expert, row : row + height, start : start + spec.rank] = update
    spec = SiteSpec(
        name=name,
        kind="parameter",
        in_features=n_in,
        out_features=n_out,
        weight_shape=shape,
        rank=n_parts * rank,
        alpha=first.scale * n_parts * rank,
        experts=experts,
        weight=name,
        update="weight",
    )
    return SiteState(spec, A, B)

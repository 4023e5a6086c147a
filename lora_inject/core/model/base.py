"""The base under an adapter: what is sampled of it, and whether it is the one that is meant.

An adapter's state has a fingerprint of the base that it was made on. It is taken, and compared with
the model at hand, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import (
    Fingerprint,
    Sampled,
    base_differences,
    packing,
    same_values,
    samples,
    unverifiable,
    without_weights,
)
from lora_inject.core.adapter.site_state import FLOATS
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.library import described, loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import whole
from lora_inject.core.spec.names import joined
from lora_inject.errors import FormatError

Base = Literal["same", "quantized", "any"]
"""How sure to be of the base: see `load_adapter`."""


def untouched(weights: Mapping[str, Tensor], state: AdapterState) -> dict[str, Tensor]:
    """Return the floating point tensors of a base that an adapter neither adapts nor replaces.

    What it replaces cannot identify a base: a new head has other values in every run.
    """
    own = {*state.trained, *(site.spec.weight for site in state.sites.values())}
    return {n: w for n, w in weights.items() if n not in own and w.dtype in FLOATS}


def fingerprint(
    adapted: Mapping[str, Tensor],
    others: Mapping[str, Tensor] = MappingProxyType({}),
    moved: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Fingerprint:
    """Sample weights by name, so that another base of the same shape can be told.

    Adapted tensors that are quantized are described (`adapter.packing`), meta tensors
    left out. `moved` are positions to sample as well.
    """
    weights = {**adapted, **others}
    floats = {n: w for n, w in weights.items() if w.dtype in FLOATS and not w.is_meta}
    plain = {n: w for n, w in floats.items() if type(w) in (nn.Parameter, Tensor) and w.numel()}
    sharded = {name: w for name, w in floats.items() if hasattr(w, "full_tensor")}
    inside = {
        name: moved[name]
        for name, weight in {**plain, **sharded}.items()
        if moved.get(name) and max(moved[name]) < weight.numel()
    }
    known = samples(plain, inside)
    for name, weight in sharded.items():  # one at a time, by all processes
        known |= samples({name: whole(weight)}, inside)
    mark = {name: Sampled(tuple(weights[name].shape), values) for name, values in known.items()}
    mark |= {name: mark[name]._replace(moved=positions) for name, positions in inside.items()}
    for name, weight in adapted.items():
        if name not in known:
            mark[name] = Sampled(tuple(weight.shape), packed=packing(weight, described))
    return {name: mark[name] for name in weights if name in mark}  # errors name an adapted one


def check_base(
    survey: Survey,
    state: AdapterState,
    adapted: Mapping[str, Tensor],
    base: Base,
    asked: str,
    *,
    leave_new: bool = False,
) -> None:
    """Refuse a base that is not the one that the adapter was made on, as far as values tell.

    1. The model is sampled where the adapter's fingerprint has samples.
    2. Adapted weights that cannot be compared are refused, unless `base` is `quantized`.
    3. Any other difference is refused.

    `adapted` are the model's weights under the names that the adapter has for them. With
    `leave_new`, weights that no checkpoint of this model had may differ.
    """
    saved = without_weights(state.fingerprint or {}, state.trained)
    if not saved:
        return
    here = _fingerprint_here(survey, state, saved, adapted)
    saved = without_weights(saved, saved.keys() - here.keys())
    unknown = unverifiable(saved, here)
    hidden = [name for name in unknown if name in adapted]
    if hidden and base != "quantized":
        raise FormatError(
            asked,
            f"the base cannot be compared at {len(hidden)} sites, of which {hidden[0]!r}: "
            "its weight is quantized here or where the adapter was made, but not in both, "
            "or it is sharded or on the meta device",
            'Pass base="quantized" where it is the right base',
        )
    saved = without_weights(saved, unknown)
    differences = base_differences(saved, here)
    new = _new_weights(survey) if differences.keys() - adapted.keys() else set()
    if leave_new:
        differences = {n: what for n, what in differences.items() if n not in new}
    if not differences:
        return
    key = next((name for name in differences if name in adapted), next(iter(differences)))
    what = differences[key]
    remedy = 'Load it onto its own base, or pass base="any"'
    if differences.keys() <= new:
        what += ", where no checkpoint had it"
        remedy = "Load the base with the weights that it had there, or pass leave_new=True "
        remedy += "where nothing uses them"
    raise FormatError(
        asked,
        f"the adapter was made on another base: {key!r} {what} ({len(differences)} of "
        f"{len(saved)} tensors differ)",
        remedy,
    )


def _fingerprint_here(
    survey: Survey, state: AdapterState, saved: Fingerprint, adapted: Mapping[str, Tensor]
) -> Fingerprint:
    """Sample the model where a saved fingerprint has samples; no vocabulary that was resized."""
    others = {n: w for n, w in untouched(survey.weights, state).items() if n in saved}
    grown = {n for n, tensor in others.items() if tuple(tensor.shape) != saved[n].shape}
    if grown:
        resized = grown & _vocabulary(survey)
        others = {name: tensor for name, tensor in others.items() if name not in resized}
    moved = {name: there.moved for name, there in saved.items()}
    return fingerprint(adapted, others, moved)


def _vocabulary(survey: Survey) -> set[str]:
    """Return all names of the tables and heads over a vocabulary, which is resized at times."""
    tables = survey.tables("get_input_embeddings", "get_output_embeddings")
    own = (
        joined(survey.paths[id(table)], key) for table in tables for key in survey.own[id(table)]
    )
    return {name for each in own for name in survey.names_of(each)}


def _new_weights(survey: Survey) -> set[str]:
    """Return the parameters that no checkpoint of this model had."""
    return {name for library in loaded_libraries() for name in library.new_weights(survey)}


def check_base_copies(state: AdapterState, survey: Survey, asked: str) -> None:
    """Refuse a copy of a base tensor, which some programs store, if it is not the model's."""
    for key, copy in state.base_copies.items():
        weight = survey.weights.get(key)
        if weight is None or not same_values(weight.detach().cpu(), copy):
            problem = "the file carries a copy of this base tensor that is not the model's"
            remedy = "Load the adapter onto the base that it was made on (was the vocabulary "
            raise FormatError(f"{asked}, {key!r}", problem, remedy + "resized?)")

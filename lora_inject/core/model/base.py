"""The base under an adapter: what is sampled of it, and whether it is the one that is meant.

An adapter's state has a fingerprint of the base that it was made on. It is taken, and compared with
the model at hand, here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import Fingerprint, Moved, samples, values_at
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.value_checks import FLOATS
from lora_inject.core.layers.packed_weights import described
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.rooms import room

Base = Literal["same", "quantized", "any"]
"""How sure to be of the base: see `load_adapter`."""


def untouched(
    weights: Mapping[str, Tensor], state: AdapterState, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the floating point tensors of a base that an adapter neither adapts nor replaces.

    Only those of `names` if they are given. What the adapter replaces cannot identify a base: a new
    head has other values in every run.
    """
    own = {*state.trained, *(site.spec.weight for site in state.sites.values())}
    wanted = weights if names is None else names
    return {
        name: weights[name]
        for name in wanted
        if name in weights and name not in own and weights[name].dtype in FLOATS
    }


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
    floats = {name: weight for name, weight in weights.items() if weight.dtype in FLOATS}
    shards = {name: weight for name, weight in floats.items() if hasattr(weight, "full_tensor")}
    plain = {
        name: weight
        for name, weight in floats.items()
        if not weight.is_meta and type(weight) in (nn.Parameter, Tensor)
    }
    known = samples(plain)
    if shards:
        known |= room("sharding").samples_of_shards(shards)
    return Fingerprint(
        shapes={n: tuple(w.shape) for n, w in weights.items() if n in adapted or n in known},
        samples=known,
        quantized=_in_words({n: w for n, w in adapted.items() if n not in known}),
        moved={
            name: Moved(positions, values_at(plain[name], positions))
            for name, positions in moved.items()
            if positions and name in plain and max(positions) < plain[name].numel()
        },
    )


def _in_words(packed: Mapping[str, Tensor]) -> dict[str, str]:
    """Return packed weights, and those without values, in words."""
    if not packed:
        return {}
    from lora_inject.core.adapter.packing import packing

    return {name: packing(weight, described) for name, weight in packed.items()}


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
    saved = state.fingerprint and state.fingerprint.without(state.trained)
    if saved is None:
        return
    here = _fingerprint_here(survey, state, saved, adapted)
    if saved == here and not here.quantized:
        return
    from lora_inject.core.model.other_base import check_differences

    check_differences(survey, saved, here, adapted, base, asked, leave_new=leave_new)


def _fingerprint_here(
    survey: Survey, state: AdapterState, saved: Fingerprint, adapted: Mapping[str, Tensor]
) -> Fingerprint:
    """Sample the model where a saved fingerprint has samples; no vocabulary that was resized."""
    others = untouched(survey.weights, state, saved.shapes)
    grown = {n for n, tensor in others.items() if tuple(tensor.shape) != tuple(saved.shapes[n])}
    if grown:
        from lora_inject.core.model.other_base import vocabulary

        resized = grown & vocabulary(survey)
        others = {name: tensor for name, tensor in others.items() if name not in resized}
    moved = {name: values.positions for name, values in saved.moved.items()}
    return fingerprint(adapted, others, moved)

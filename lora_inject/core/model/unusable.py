"""Why a copy, or an adapter with a gain or on a packed weight, cannot use a tensor's values."""

from __future__ import annotations

from collections.abc import Iterator

from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.model.carried import Carried
from lora_inject.core.spec.limits import why_no_gain
from lora_inject.errors import LayerError


def check_values(place: Carried, asked: str) -> None:
    """Raise if an entry cannot use the values of its tensor."""
    for reason in _reasons(place):
        raise LayerError(asked, *reason)


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
        from lora_inject.core.model.in_full import reasons_against_copy

        yield from reasons_against_copy(place)
        return
    if place.entry.variant.gained and (why := why_no_gain(spec)):
        yield f"variant {spec.variant} on {why}", "Train it with variant: lora"
    if is_quantized(place.weight):
        from lora_inject.core.model.packed_places import reasons_of_packed

        yield from reasons_of_packed(place, spec)

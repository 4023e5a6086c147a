"""Why a module has no room for an entry, or the entry cannot use its tensor's values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from torch.nn.parameter import is_lazy

from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.in_full import reasons_against_copy
from lora_inject.core.model.packed_places import reasons_of_packed
from lora_inject.core.spec.limits import why_no_gain
from lora_inject.errors import LayerError


def refuse_taken(place: Carried, asked: str, *, again: bool) -> NoReturn:
    """Raise for a place that has no room; `again` if another entry is on the same tensor."""
    module, entry, cls = place.module, place.entry, type(place.module)
    problem = f"{cls.__name__}.{entry.param} is computed by the class"
    remedy = "A parameter that is itself computed cannot take an update"
    if flat := next((flat for flat in entry.names.values() if hasattr(module, flat)), None):
        problem = f"the module has an attribute {flat!r}"
        remedy = "Choose another adapter name"
    if entry.scale is not None and module._parameters.get("bias") is None:
        problem = (
            "lora_bias is added to the layer's bias, which is None: no merge could hold the sum"
        )
        remedy = "Leave lora_bias out there, or give the layer a bias of zeros"
    if again:
        problem = f"its {entry.param!r} is adapted and trained, or gets a bias twice"
        remedy = "Leave one of train, bias and lora_bias out"
    raise LayerError(asked, problem, remedy)


def refuse_lazy(survey: Survey, name: str) -> NoReturn:
    """Raise for the first parameter of a model that is lazy, for an adapter of that name."""
    holder = next(holder for holder in survey.holders if is_lazy(holder.tensor))
    problem = "it is lazy and not initialized"
    raise LayerError(f"adapter {name!r}, {holder.name!r}", problem, "Run the model once first")


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
        yield from reasons_against_copy(place)
        return
    if place.entry.gained and (why := why_no_gain(spec)):
        yield f"variant {spec.variant} on {why}", "Train it with variant: lora"
    if is_quantized(place.weight):
        yield from reasons_of_packed(place, spec)

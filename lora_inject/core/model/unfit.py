"""Why a site of an adapter has no place on a model."""

from __future__ import annotations

from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import FormatError, LayerError, LoraInjectError

_ITS_MODEL = "Load the adapter onto the model that it was made for"


def why_unfit(
    spec: SiteSpec, candidate: Candidate | None, names: Inventory, where: str
) -> LoraInjectError:
    """Return the error of a site that `candidate`, of the same name, cannot take."""
    if spec.kind != "parameter" and all(row.kind != spec.kind for row in KINDS):
        unknown = f"its kind of layer, {spec.kind!r}, is not registered here"
        remedy = "Import the module that calls register_kind for it first"
        return FormatError(where, unknown, remedy)
    if candidate is None:
        close = ", ".join(map(repr, nearest(spec.name, names.sites))) or "none"
        return FormatError(where, "the model has no such module", f"Nearest: {close}. {_ITS_MODEL}")
    if candidate.refusal is not None:
        return LayerError(where, *candidate.refusal)
    fits = (candidate.in_features, candidate.out_features)
    if spec.kind == "parameter" and spec.transposed != candidate.transposed:
        fits = fits[::-1]
    there = f"it maps {spec.in_features} to {spec.out_features} features in the file"
    return FormatError(where, f"{there}, {fits[0]} to {fits[1]} here", _ITS_MODEL)

"""Why a site cannot be on a packed weight."""

from __future__ import annotations

from collections.abc import Iterator

from lora_inject.core.functional.weight import reads_as_sum
from lora_inject.core.layers.packed_values import weight_kind
from lora_inject.core.layers.survey import Carried
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec


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

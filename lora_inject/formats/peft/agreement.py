"""Whether adapter_config.json still says what was written with the tensors.

The header of the tensors has the numbers of each site, and the config as it was written. What PEFT
would read otherwise since is an error which the caller decides (`prefer`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_inject.core.adapter.native import Described
from lora_inject.core.files.strict_json import parse_json
from lora_inject.errors import FormatError
from lora_inject.formats.peft.adapter_config import Claims
from lora_inject.formats.peft.tensor_layout import PREFIX, attentions, file_alpha, file_rank

WRITTEN = "lora_adapter_metadata"
"""Key of the config in the header, where diffusers looks for it, too."""

_DECIDE = 'Decide which is right: prefer="metadata" is what was saved, prefer="config" what was '
_DECIDE += "edited since"

# What PEFT asks the config besides numbers: which tensors it makes and loads, and how it uses them.
_MEANINGS = (
    "bias",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)


def check_fields(config: Mapping[str, Any], header: Mapping[str, str]) -> None:
    """Refuse a config that means other tensors than the one that was written.

    Raises:
        FormatError: A field has another value; the order of names does not matter.
    """
    plain = parse_json(header.get(WRITTEN, "{}"), f"metadata {WRITTEN!r}")
    written = plain if isinstance(plain, dict) else {}
    for field in _MEANINGS:
        now, then = _meant(config.get(field)), _meant(written.get(PREFIX + field))
        if now != then:
            raise FormatError(
                f"adapter_config.json, {field!r}",
                f"it is {_shown(config.get(field))}, and was {_shown(written.get(PREFIX + field))} "
                "when the tensors were written",
                _DECIDE,
            )


def _meant(value: Any) -> Any:
    """Return a value in a form that is equal for what PEFT reads alike."""
    if value in (None, False, "none", [], {}):
        return None
    if isinstance(value, list):
        return sorted(map(repr, value))
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_numbers(said: Described, claims: Claims) -> None:
    """Refuse a config whose ranks or scales are not those of the metadata."""
    called = {
        name: spec.weight if spec.weight in claims.target_parameters else name
        for name, spec in said.specs.items()
    } | attentions(said.specs.values())
    numbers = claims.numbers(called.values())
    for name, spec in said.specs.items():
        rank, (claimed, alpha) = file_rank(spec), numbers[called[name]]
        scale = claims.scale(alpha, claimed or rank)
        if claimed in (None, rank) and math.isclose(scale, spec.scale, rel_tol=1e-6):
            continue
        due = file_alpha(spec, rslora=claims.use_rslora)
        edited = f"rank {claimed or rank} and alpha {alpha:g} (scale {scale:g})"
        saved = f"rank {rank} and alpha {due:g} (scale {spec.scale:g})"
        raise FormatError(
            f"site '{name}'",
            f"adapter_config.json says {edited}, the metadata of adapter_model.safetensors says "
            f"{saved}",
            _DECIDE,
        )

"""Kinds of layers and of weights, variants, formats of your own: `docs/extending.md` adds each."""

from lora_inject.core.adapter.fingerprint import Sampled
from lora_inject.core.layers.adapted import WeightUpdate
from lora_inject.core.layers.kinds import LoRALinear, register_kind
from lora_inject.core.layers.weight_kinds import WeightKind, register_weight_kind
from lora_inject.core.spec.sites import Geometry, SiteSpec, Slices
from lora_inject.core.spec.variants import Variant, register_variant
from lora_inject.formats.exchange import register_format
from lora_inject.formats.format import Files, Format
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.quantized.plain_layers import LayerKind

__all__ = [
    "Files",
    "Format",
    "Geometry",
    "LayerKind",
    "LoRALinear",
    "ModelFacts",
    "Sampled",
    "SiteSpec",
    "Slices",
    "Variant",
    "WeightKind",
    "WeightUpdate",
    "register_format",
    "register_kind",
    "register_variant",
    "register_weight_kind",
]

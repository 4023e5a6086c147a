"""Kinds of layers and of weights, variants, formats of your own: `docs/extending.md` adds each."""

from lora_inject.core.layers.adapted import WeightUpdate
from lora_inject.core.layers.kinds import LoRALinear, register_kind
from lora_inject.core.layers.weight_kinds import WeightKind, register_weight_kind
from lora_inject.core.spec.sites import Geometry
from lora_inject.core.spec.variants import Variant, register_variant
from lora_inject.formats.exchange import register_format
from lora_inject.quantized.plain_layers import LayerKind

__all__ = [
    "Geometry",
    "LayerKind",
    "LoRALinear",
    "Variant",
    "WeightKind",
    "WeightUpdate",
    "register_format",
    "register_kind",
    "register_variant",
    "register_weight_kind",
]

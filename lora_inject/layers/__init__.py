"""How one layer carries adapters, and the table of layer kinds.

For a kind of layer of your own: derive from `LoRALinear` (adds to the output) or `WeightUpdate`
(its weight reads as W + delta), state `kind`, `matches` and `geometry`, and call `register_kind`.
"""

from lora_inject.layers.adapted import WeightUpdate
from lora_inject.layers.kinds import KINDS, register_kind
from lora_inject.layers.linear_kinds import LoRALinear
from lora_inject.spec.inventory import Geometry

__all__ = ["KINDS", "Geometry", "LoRALinear", "WeightUpdate", "register_kind"]

"""How one layer carries adapters, and the table of layer kinds.

For a kind of layer of your own: derive from `LoRALinear` (adds to the output) or `Reader` (mounts
the weight), state `kind`, `matches` and `geometry`, and call `register_kind`.
"""

from lora_inject.layers.base import Geometry, Reader
from lora_inject.layers.linear import LoRALinear
from lora_inject.layers.table import KINDS, register_kind

__all__ = ["KINDS", "Geometry", "LoRALinear", "Reader", "register_kind"]

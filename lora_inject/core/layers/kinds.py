"""The table of layer kinds: a kind of layer is a class in `KINDS`.

Raw parameters need no kind: the parameter itself is the site.
"""

from __future__ import annotations

from torch import nn

from lora_inject.core.layers.adapted import Adapted, WeightUpdate
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.conv_kinds import LoRABilinear, LoRAConv, LoRAConvTranspose
from lora_inject.core.layers.embedding_kind import LoRAEmbedding
from lora_inject.core.layers.linear_kinds import LoRAConv1D, LoRALinear

# The first class that matches a layer's class is its kind.
KINDS: list[type[Adapted]] = [
    LoRALinear,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAConv,
    LoRAConvTranspose,
    LoRABilinear,
]


def mixin_for(kind: str) -> type[Adapted]:
    """Return the class of a kind."""
    [row] = [row for row in KINDS if row.kind == kind]
    return row


def mixin_of(entry: Entry) -> type[Adapted]:
    """Return the mixin by which a module carries an entry: its kind's, or that of reads."""
    return mixin_for(entry.spec.kind) if entry.on_output else WeightUpdate  # type: ignore[union-attr]


def kind_of(layer: type[nn.Module]) -> type[Adapted] | None:
    """Return the class of the first row that matches a layer's class."""
    return next((row for row in KINDS if row.matches(layer)), None)

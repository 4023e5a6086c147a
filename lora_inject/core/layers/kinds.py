"""The table of layer kinds: a kind of layer is a class with a row in `KINDS`.

Raw parameters need no kind: the parameter itself is the site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from lora_inject.core.layers.adapted import Adapted, WeightUpdate
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.spec.rooms import library_rows, standing_at


class Row(NamedTuple):
    """A kind whose class is loaded with the first layer that it is meant for.

    Attributes:
        kind: Its name.
        matches: Whether it is meant for layers of a class.
        where: Its class, as `module:name`.
    """

    kind: str
    matches: Callable[[type[nn.Module]], bool]
    where: str


def _is_transposed_linear(layer: type[nn.Module]) -> bool:
    """Whether a class is, or derives from, one that is known by where it is defined."""
    known = library_rows("CONV1D")
    return any((c.__module__, c.__qualname__) in known for c in layer.__mro__)


def _row(kind: str, file: str, name: str, *classes: type[nn.Module]) -> Row:
    """Return the row of a kind of torch's own layers."""
    where = f"{__package__}.{file}:{name}"
    return Row(kind, lambda layer: issubclass(layer, classes), where)


# The first row that matches a layer's class is its kind.
KINDS: list[Row | type[Adapted]] = [
    LoRALinear,
    Row("conv1d", _is_transposed_linear, f"{__package__}.conv1d_kind:LoRAConv1D"),
    _row("embedding", "embedding_kind", "LoRAEmbedding", nn.Embedding),
    _row("conv", "conv_kinds", "LoRAConv", nn.Conv1d, nn.Conv2d, nn.Conv3d),
    _row(
        "conv_transpose",
        "conv_kinds",
        "LoRAConvTranspose",
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    _row("bilinear", "conv_kinds", "LoRABilinear", nn.Bilinear),
]


def class_of(row: Row | type[Adapted]) -> type[Adapted]:
    """Return the class of a row."""
    loaded: type[Adapted] = standing_at(row.where) if isinstance(row, Row) else row
    return loaded


def mixin_for(kind: str) -> type[Adapted]:
    """Return the class of a kind."""
    [row] = [row for row in KINDS if row.kind == kind]
    return class_of(row)


def mixin_of(entry: Entry) -> type[Adapted]:
    """Return the mixin by which a module carries an entry: its kind's, or that of reads."""
    return mixin_for(entry.spec.kind) if entry.on_output else WeightUpdate  # type: ignore[union-attr]


def kind_of(layer: type[nn.Module]) -> type[Adapted] | None:
    """Return the class of the first row that matches a layer's class."""
    return next((class_of(row) for row in KINDS if row.matches(layer)), None)

"""Packed weights that a merge writes: unpacked, or packed again in their own format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_inject.core.functional.rounded_fold import Tally
from lora_inject.core.layers.packed_values import claims, dense, weight_kind
from lora_inject.core.layers.packed_weights import packed_weight
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.layers.weight_kinds import UNKNOWN, Verb, WeightKind
from lora_inject.core.model.merged_rows import formed_values
from lora_inject.core.model.target import Target
from lora_inject.core.model.undo import Undone
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError, StateError

Into = torch.dtype | Literal["same"] | None
"""Target of a packed weight: a plain dtype, its own format, or None for an error."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(dequantize: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name."""
    name = str(dequantize).removeprefix("torch.")
    if name not in DTYPES:
        remedy = f"Use one of {list(DTYPES)}"
        raise LayerError(f"dequantize={name!r}", "the dtype is not known", remedy)
    return DTYPES[name]


def what_packed_become(dequantize: str | torch.dtype | None, *, requantize: bool) -> Into:
    """Return what packed weights become, by the options of a merge, of which one is given."""
    if dequantize is None:
        return "same"
    if requantize:
        raise StateError("merge", "both dequantize and requantize are given", "Choose one of them")
    return dtype_of(dequantize)


@dataclass
class PackedTarget(Target):
    """A packed weight to write."""

    is_packed = True

    into: Into = None  # what it becomes

    @property
    def kind(self) -> WeightKind:
        """How the layer holds it."""
        return weight_kind(self.holder.module, self.weight)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as one matrix."""
        return super().matrix_shape if self.terms else (1, -1)

    @property
    def becomes_plain(self) -> bool:
        """Whether it is written as plain floats."""
        return isinstance(self.into, torch.dtype)

    @property
    def replaces_layer(self) -> bool:
        """Whether the layer is written as a plain one."""
        return self.becomes_plain and self.kind.replaces_layer(self.holder.module, self.weight)

    @property
    def written(self) -> Holder:
        """Where the weight stands once it is written."""
        name, module, param = self.holder
        name = name.removesuffix(param) + "weight"
        return Holder(name, module, "weight") if self.replaces_layer else self.holder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the merged values."""
        return self.into if isinstance(self.into, torch.dtype) else torch.float32

    @property
    def narrow(self) -> bool:
        """Whether the result has 16 bits or less, which may lose a part of a delta."""
        return not self.becomes_plain or super().narrow

    @property
    def action(self) -> str:
        """What a report calls what is done."""
        return super().action if self.terms else "dequantized"

    def values(self) -> Tensor:
        """Return what the weight stands for, float32."""
        return dense(self.holder.module, self.weight)

    def replacement(self, tally: Tally | None) -> nn.Parameter:
        """Return what is written in the place of the weight."""
        values = formed_values(self, None if self.into == "same" else tally)
        if self.into != "same":
            return nn.Parameter(values, requires_grad=False)
        weight = self.kind.packed(self.holder.module, self.weight, values)
        if tally is not None:
            before, now = self.values(), dense(self.holder.module, weight)
            tally.count(before, values - before, values - now)
        return weight

    def replace(self) -> Undone:
        """Put the replacement into the layer, and return what takes it back."""
        self.tally = Tally() if self.terms else None
        holder, written, before = self.holder, self.written, self.weight
        weight = self.replacement(self.tally)
        layer = self.kind.write(holder.module, holder.param, weight)
        self.holder = written
        return Undone(written, weight, before, layer=layer)


def reasons_against_packed(target: Target) -> Iterator[tuple[str, str]]:
    """Yield why nothing can be added to the weight, or to what it stands for."""
    assert isinstance(target, PackedTarget)
    module, weight, kind = target.holder.module, target.weight, target.kind
    verb: Verb = "requantize" if target.into == "same" else "dequantize"
    problem = f"the weight is quantized ({type(weight).__name__}, {weight.dtype})"
    if (reason := kind.why_not(verb, module, weight)) is not None:
        yield f"{problem}: {reason.found}", reason.remedy
    if target.into is None:
        remedy = 'Write plain floats, merge(model, dequantize="bfloat16")'
        if kind.why_not("requantize", module, weight) is None:
            remedy += ", or its own format, merge(model, requantize=True)"
        yield problem, remedy
    if target.copies:
        yield "a trained copy stands for a quantized weight", "Leave it out"


def rehearse_packed(target: Target) -> None:
    """Form what is written in the place of a packed weight and count, without writing."""
    assert isinstance(target, PackedTarget)
    target.tally = Tally()
    target.replacement(target.tally)


def check_replaceable(targets: Iterable[Target]) -> None:
    """Raise if plain values cannot be the weight of a packed layer itself."""
    for target in targets:
        if isinstance(target, PackedTarget):
            reason = target.kind.why_not("replace", target.holder.module, target.weight)
            if reason is not None:
                raise LayerError(f"merge into {target.name!r}", *reason)


def say_unpacked(survey: Survey, targets: Iterable[Target]) -> list[tuple[Any, dict[str, Any]]]:
    """Remove from models what is not true of unpacked weights; return what each said."""
    if not any(target.is_packed for target in targets):
        return []
    said = claims(module for _, module in survey.modules)
    for owner, attributes in said:
        for name in attributes:
            delattr(owner, name)
    return said


def packed_in(survey: Survey) -> Iterator[Holder]:
    """Yield the packed weights of libraries in a model."""
    for path, module in survey.modules:
        name = packed_weight(type(module))
        if name is not None and name in module._buffers:
            yield Holder(joined(path, name), module, name)
    for holder in survey.holders:
        weight = holder.tensor
        if is_quantized(weight):
            kind = weight_kind(holder.module, weight)
            if type(weight) is not nn.Parameter or kind is not UNKNOWN:
                yield holder

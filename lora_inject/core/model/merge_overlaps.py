"""Tensors of which one holds a part of another's memory, where a merge would change both."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError


def check_overlaps(survey: Survey, written: Mapping[Hashable, str]) -> None:
    """Refuse to write a tensor of which another holds a part; who holds the whole is tied to it.

    In the order of their first bytes, a tensor can overlap one before it only if it overlaps that
    of these which ends last.
    """
    spans = sorted(_spans(survey), key=lambda span: span[:3])
    last = spans[:1]
    for two in spans:
        one, last = last[0], [max(*last, two, key=lambda span: span[1])]
        overlap = two.start < one.stop and one.memory != two.memory
        if overlap and not written.keys().isdisjoint((one.memory, two.memory)):
            asked, other = (one, two) if one.memory in written else (two, one)
            raise LayerError(
                f"merge into {written[asked.memory]!r}",
                f"a part of its memory is also a part of {other.name!r}, which would change",
                "Give one of them memory of its own: layer.weight = "
                "torch.nn.Parameter(layer.weight.detach().clone())",
            )


class _Span(NamedTuple):
    """The bytes of a tensor."""

    start: int
    stop: int
    name: str
    memory: Hashable


def _spans(survey: Survey) -> Iterator[_Span]:
    """Yield the bytes of each base parameter that has memory, and of each buffer.

    A buffer is tied to nothing: it would not be untied.
    """
    for holder in survey.holders:
        memory = memory_of(holder.tensor)
        if isinstance(memory, tuple):
            yield _span(holder.name, holder.tensor, memory)
    for path, module in survey.modules:
        for key, buffer in module._buffers.items():
            if type(buffer) is Tensor and not buffer.is_meta and buffer.data_ptr():
                name = joined(path, key)
                yield _span(name, buffer, (buffer.data_ptr(), name))


def _span(name: str, tensor: Tensor, memory: Hashable) -> _Span:
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    n_elements = 1 + sum((n - 1) * step for n, step in steps)
    return _Span(start, start + n_elements * tensor.element_size(), name, memory)

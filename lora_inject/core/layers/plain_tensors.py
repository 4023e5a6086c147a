"""Tensors whose elements are the values of a weight, and those whose elements are not."""

from __future__ import annotations

from torch import Tensor, nn

from lora_inject.private import look_up

_FAKES = (
    look_up("torch._subclasses.fake_tensor.FakeTensor"),
    look_up("torch._subclasses.functional_tensor.FunctionalTensor"),
)
# Tensors that W + delta can be formed from: neither packed nor sharded, or their fakes in a trace.
PLAIN: tuple[type, ...] = (nn.Parameter, Tensor, *filter(None, _FAKES))


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is packed, so that its elements are not its values."""
    plain = weight.is_floating_point() and weight.element_size() >= 2
    sharded = hasattr(weight, "full_tensor")  # a DTensor, with the elements that it has here
    return not plain or (type(weight) not in PLAIN and not sharded)

"""Ways in which a weight is held packed.

What is known of a library that packs weights is a subclass of `WeightKind` in a file named after
it, which its row in `lora_inject.libraries` names. Which kind a weight is of, and what its values
are, is asked by the functions of `library.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

Verb = Literal["inject", "train", "norms", "merge", "dequantize", "replace", "requantize"]
"""What somebody wants to do with a weight.

| verb | what it needs |
|---|---|
| `inject` | an adapter on the layer |
| `train` | a gradient from the layer's output to its input |
| `norms` | the norms of the values, in each forward |
| `merge` | a sum in a weight that is not packed, by a layer that may pack it again |
| `dequantize` | the values |
| `replace` | the values as the weight of the layer itself |
| `requantize` | the values, packed again in the same way |
"""

OF_VALUES = ("norms", "dequantize", "requantize")
"""The verbs that need the values."""
_MERGE_BEFORE = "Load the adapter onto the base in 16 bits and merge there"


class Reason(NamedTuple):
    """Why a verb cannot use a weight."""

    found: str
    remedy: str = _MERGE_BEFORE


class Undo(Protocol):
    """What a write to a packed weight keeps."""

    def put_back(self) -> None:
        """Restore the layer, with the very objects that it had."""


@dataclass
class ReplacedParameters:
    """The Parameters of a module before one of them was replaced."""

    module: nn.Module
    before: dict[str, nn.Parameter | None]

    def put_back(self) -> None:
        """Restore the Parameters, in their order."""
        self.module._parameters.clear()
        self.module._parameters.update(self.before)


class WeightKind:
    """One way in which weights are held: what is known of a library's tensors and layers.

    A subclass overrides what it knows. What it leaves is a refusal: of a kind that does not say
    `trains` nothing before it can train, a kind without `dense` cannot be merged, one without
    `packed` cannot be quantized again. There is one object of each class, without a state.

    Examples:
        >>> class Halves(WeightKind):
        ...     def matches(self, module, weight):
        ...         return hasattr(module, "step")
        ...
        ...     def dense(self, module, weight):
        ...         return weight * module.step
        >>> layer = nn.Linear(2, 1)
        >>> layer.step, codes = 0.5, torch.tensor([[2, 3]], dtype=torch.int8)
        >>> Halves().matches(layer, codes), Halves().dense(layer, codes).tolist()
        (True, [[1.0, 1.5]])
        >>> Halves().why_not("requantize", layer, codes).found
        'its format cannot be quantized again'
    """

    forwards: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Module and name of classes whose forward multiplies x by the values, and does nothing else.

    Then an update is added to its output. It may add a bias.
    """
    trains: ClassVar[bool] = False
    """Whether its layers hand on to their input the gradient that the values would."""
    against: ClassVar[Mapping[Verb, Reason]] = MappingProxyType({})
    """Why verbs cannot use any weight that matches."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether a weight is held in this way by its layer.

        Args:
            module: The layer, with or without adapters.
            weight: A parameter or buffer of it; None if the question is about the layer.
        """
        return False

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return the values of a weight in the shape that its layer states, in any float dtype."""
        raise NotImplementedError

    def packed(self, module: nn.Module, weight: Tensor, values: Tensor) -> nn.Parameter:
        """Return a weight in the format of `weight`, for float32 values of its layer."""
        raise NotImplementedError

    def replaces_layer(self, module: nn.Module, weight: Tensor) -> bool:
        """Return whether an unpacked layer becomes one of torch's, with a `weight` and a `bias`."""
        return False

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Put another weight, plain or packed in the same way, in the place of `key`.

        A bias that is added to products with a plain weight gets its dtype.
        """
        before = ReplacedParameters(module, dict(module._parameters))
        module._parameters[key] = weight
        bias = module._parameters.get("bias")
        if key == "weight" and bias is not None and type(weight) is nn.Parameter:
            module._parameters["bias"] = in_dtype(bias, weight.dtype)
        return before

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a verb cannot use a weight that matches, and what to do; None if it can."""
        kind = type(self)
        if verb in self.against:
            return self.against[verb]
        if verb == "train" and not kind.trains:
            return self.no_gradient(module)
        if verb in OF_VALUES and kind.dense is WeightKind.dense:
            return Reason(f"dequantizing a {_of(module)} is not supported")
        if verb == "replace" and kind.write is WeightKind.write and not _is_of_torch(module):
            problem = f"nothing says how a {_of(module)} multiplies by plain values"
            remedy = "Derive its WeightKind from extending.LayerKind, which makes the layer one of "
            return Reason(problem, remedy + "torch's, or override write()")
        if verb == "requantize" and kind.packed is WeightKind.packed:
            return Reason("its format cannot be quantized again")
        return None

    def no_gradient(self, module: nn.Module) -> Reason:
        """Return that nothing is known of the backward of a layer."""
        remedy = "Load the base in a format that trains; or, if you know that it does, write a "
        remedy += "WeightKind with trains = True and register it, extending.register_weight_kind"
        return Reason(f"{_of(module)} is packed, and its backward is not known", remedy)

    # Of classes of layers -----------------------------------------------------------------------

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return the name of the packed weight of a class that is used as an nn.Linear but is none.

        It is the name of a parameter or of a buffer. None for all other classes.
        """
        return None

    # Around verbs -------------------------------------------------------------------------------

    def begin_training(self, module: nn.Module) -> None:
        """Keep a layer from what would break the gradients of adapters; called for every module."""

    def end_training(self, module: nn.Module) -> None:
        """Undo `begin_training`, as the last adapter is gone."""

    def claims(self, module: nn.Module) -> Iterable[tuple[object, Iterable[str]]]:
        """Yield who says that a model is packed, and by which attributes: untrue once none is."""
        return ()

    def described(self, weight: Tensor) -> Iterable[str] | None:
        """Return the settings and a few codes of a tensor, to recognize a base; None if unknown."""
        return None


def _is_of_torch(module: nn.Module) -> bool:
    plain = getattr(type(module), "_lora_plain", type(module))
    return defines_forward(plain)[0].startswith("torch.")


def _of(module: nn.Module) -> str:
    plain = getattr(type(module), "_lora_plain", type(module))
    return f"{plain.__name__} of {plain.__module__}"


def defines_forward(cls: type) -> tuple[str, str]:
    """Return the module and the name of the class whose `forward` a class has."""
    owner = next(c for c in cls.__mro__ if "forward" in c.__dict__)
    return owner.__module__, owner.__qualname__


def derives_from(cls: type, module: str, name: str) -> bool:
    """Return whether a class is one of another library, or derives from it."""
    named = (c for c in cls.__mro__ if c.__qualname__ == name)  # by one string: asked of each layer
    return any(c.__module__ == module for c in named)


UNKNOWN = WeightKind()
"""What nobody knows how to unpack."""

REGISTERED: list[WeightKind] = []
"""Those from outside, asked before those of libraries, the newest first."""

OF_ANY_LIBRARY: list[WeightKind] = []
"""Those of whatever library, asked last; `lora_inject.libraries` fills it."""


def register_weight_kind(kind: type[WeightKind]) -> type[WeightKind]:
    """Add a kind of weight from outside the package; it is asked before those of libraries.

    Args:
        kind: The class; one object of it is made.

    Returns:
        The class, so that this can stand as a decorator.

    Examples:
        >>> _ = register_weight_kind(WeightKind)
        >>> del REGISTERED[0]
    """
    REGISTERED.insert(0, kind())
    return kind


def in_dtype(bias: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a bias as a Parameter of a dtype: itself if it is one."""
    if isinstance(bias, nn.Parameter) and bias.dtype == dtype:
        return bias
    return nn.Parameter(bias.detach().to(dtype), bias.requires_grad)


# Tensors that W + delta can be formed from: neither packed nor sharded, or their fakes in a trace.
PLAIN: tuple[type, ...] = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is packed, so that its elements are not its values."""
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return True
    # A DTensor has elements here.
    return type(weight) not in PLAIN and not hasattr(weight, "full_tensor")


def has_codes(tensor: Tensor) -> bool:
    """Whether a tensor holds a packed weight, of whatever library, and no floats or single numbers.

    A Parameter of a class of its own is one if it has a `dequantize` of its own.
    """
    dtype = tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return tensor.dim() > 1 and dtype != torch.bool
    return type(tensor).dequantize is not Tensor.dequantize


def sharded_by(tensor: Tensor) -> str | None:
    """Return what holds only a part of a tensor in this process, None for a whole tensor."""
    if type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor"):
        return "fully_shard or parallelize_module (it is a DTensor)"
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a collective operation where each process holds a part of it."""
    values = tensor.detach()
    gather = getattr(values, "full_tensor", None)
    if gather is None:
        return values
    gathered: Tensor = gather()
    return gathered


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")

"""The table of layer kinds, and what of a model can become a site.

One idea: a kind of layer is a class with a row in `KINDS`; everything else about a model is read by
one walk, `inventory`, which turns modules and parameters into the names that `matching` works on.
Here, and only here, it is decided how a module would carry an adapter: by its output where its
forward is known or found to be linear in W, else by its weight, or not at all and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.base import Carrier, Geometry, Reader, carrier_class, mounts_of, plain_class
from lora_inject.layers.embedding import LoRAEmbedding
from lora_inject.layers.linear import LoRAConv1D, LoRALinear
from lora_inject.layers.parameter import LoRABilinear, LoRAConv, LoRAConvTranspose
from lora_inject.layers.probe import linear_in_weight
from lora_inject.matching import Candidate, Inventory, canonical

__all__ = ["KINDS", "check_swappable", "inventory", "mixin_for", "walk"]

# The first row that matches a module is its kind.
KINDS: tuple[type[Carrier], ...] = (
    LoRAConv1D,
    LoRALinear,
    LoRAEmbedding,
    LoRAConv,
    LoRAConvTranspose,
    LoRABilinear,
)

# These parents read the weights of their children, or do so in a fast path.
READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def mixin_for(kind: str) -> type[Carrier]:
    """Return the class of a kind."""
    return next(row for row in KINDS if row.kind == kind)


def walk(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield `(canonical name, module)` in the order of the model, the model itself as `""`.

    Args:
        model: The model.
        aliases: Yield a shared module under each of its names, not only under the first.
    """
    for name, module in model.named_modules(remove_duplicate=not aliases):
        yield canonical(name), module


def inventory(model: nn.Module) -> Inventory:
    """Read off a model every name that a pattern can hit.

    Args:
        model: Any module, also on the meta device.

    Returns:
        Candidates with their kinds and shapes, the reasons against all other names, and the shapes
        of all base parameters.
    """
    return _Survey(model).inventory()


class _Survey:
    """One walk over a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, list[str]] = {}
        self.parents: dict[int, nn.Module] = {}
        for name, module in walk(model, aliases=True):
            self.names.setdefault(id(module), []).append(name)
            for child in module._modules.values():
                if child is not None:
                    self.parents.setdefault(id(child), module)
        self.probed: dict[type, bool] = {}
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[int, list[str]] = {}

    def inventory(self) -> Inventory:
        modules = dict(walk(self.model))
        for name, module in modules.items():
            for key, parameter in self._base_parameters(module):
                self.tensors.setdefault(id(parameter), []).append(_join(name, key))
        for name, module in modules.items():
            self._module(name, module)
        return Inventory(
            candidates=tuple(self.candidates),
            others=self.others,
            parameters=self.parameters,
            assumed=False,
        )

    def _base_parameters(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        mounts = mounts_of(module)
        ours = {n for e in mounts.entries() for n in e.names.values()} if mounts else ()
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in ours:
                yield key, parameter

    def _module(self, name: str, module: nn.Module) -> None:
        row = next((row for row in KINDS if row.matches(module)), None)
        if row is not None:
            self.candidates.append(self._candidate(name, module, row))
        else:
            container = bool(module._modules)
            self.others[name] = "container" if container else plain_class(type(module)).__name__
        for key, parameter in self._base_parameters(module):
            full = _join(name, key)
            if self.tensors[id(parameter)][0] == full:
                self.parameters[full] = tuple(parameter.shape)
            if row is None or key != "weight":
                self._parameter(full, module, key, parameter)

    def _candidate(self, name: str, module: nn.Module, row: type[Carrier]) -> Candidate:
        shapes = row.geometry(module)
        return Candidate(
            name=name,
            kind=row.kind,
            in_features=shapes.in_features,
            out_features=shapes.out_features,
            weight_shape=shapes.weight_shape,
            transposed=shapes.transposed,
            experts=shapes.experts,
            weight=_join(name, "weight"),
            aliases=tuple(self.names[id(module)][1:]),
            tied=self._tied(name, module, "weight"),
            refusal=(refusal := self._refusal(module)),
            mount="forward" if refusal or self._forward_mounts(module, row) else "weight",
            dtype=_dtype(module._parameters.get("weight")),
        )

    def _parameter(self, full: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        if parameter.dim() < 2 or _is_bias(key):
            self.others[full] = "bias" if _is_bias(key) else f"{parameter.dim()}-d parameter"
            return
        shapes = _raw_geometry(parameter)
        owner = full.rpartition(".")[0]
        self.candidates.append(
            Candidate(
                name=full,
                kind="parameter",
                in_features=shapes.in_features,
                out_features=shapes.out_features,
                weight_shape=shapes.weight_shape,
                weight=full,
                experts=shapes.experts,
                owner=owner,
                aliases=tuple(_join(alias, key) for alias in self.names[id(module)][1:]),
                tied=self._tied(owner, module, key),
                refusal=_fused_kernel(module) or self._refusal(module, key),
                needs_layout=parameter.dim() > 2,
                mount="weight",
                dtype=_dtype(parameter),
            )
        )

    def _tied(self, name: str, module: nn.Module, key: str) -> tuple[str, ...]:
        parameter = module._parameters.get(key)
        full = _join(name, key)
        return tuple(n for n in self.tensors.get(id(parameter), ()) if n != full)

    def _forward_mounts(self, module: nn.Module, row: type[Carrier]) -> bool:
        """Whether adding to the module's output is right; else its weight is mounted."""
        if issubclass(row, Reader) or isinstance(self.parents.get(id(module)), READING_PARENTS):
            return False
        plain = plain_class(type(module))
        if row.stock(plain):
            return True
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
            return True  # quantised: the class itself multiplies by what W stands for
        if plain not in self.probed:
            shapes = row.geometry(module)
            ids = issubclass(row, LoRAEmbedding)
            self.probed[plain] = linear_in_weight(module, shapes.transposed, ids)
        return self.probed[plain]

    def _refusal(self, module: nn.Module, key: str = "weight") -> tuple[str, str] | None:
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
        if "parametrizations" in module._modules:
            return (
                f"the weight of {cls} is parametrised, so that a merge would write to a temporary",
                "Call torch.nn.utils.parametrize.remove_parametrizations first",
            )
        parameter = module._parameters.get(key)
        if parameter is None:
            return (
                f"{cls} holds no parameter {key!r} of its own (weight_norm?)",
                "Remove what computes it first",
            )
        if nn.parameter.is_lazy(parameter):
            return f"{cls} is lazy and not initialised", "Run the model once first"
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            return (
                f"this {cls} has its own forward on the instance, which would hide the adapter",
                "Inject before patching the module, or remove the patch",
            )
        return None


def _fused_kernel(module: nn.Module) -> tuple[str, str] | None:
    if not isinstance(module, nn.RNNBase):
        return None
    found = (
        f"{type(module).__name__} hands its weights to a fused kernel in a list of its own, so "
        "that an adapted one would not be read"
    )
    return found, "Adapt the layers around it"


def _dtype(tensor: torch.Tensor | None) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _is_bias(key: str) -> bool:
    return key == "bias" or key.endswith("_bias")


def _raw_geometry(parameter: nn.Parameter) -> Geometry:
    shape = tuple(parameter.shape)
    if len(shape) == 2:
        return Geometry(shape[1], shape[0], shape)
    return Geometry(shape[-1], shape[-2], shape, experts=math.prod(shape[:-2]))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def check_swappable(module: nn.Module, asked: str) -> None:
    """Check that a module's class can change, by making the class and asking Python.

    Args:
        module: The module; left as it is.
        asked: What was asked, for the message.

    Raises:
        LayerError: It cannot.
    """
    cls = type(module)
    if issubclass(cls, Carrier):
        return
    if cls in _SWAPPABLE:
        return
    try:
        module.__class__ = carrier_class(cls, Reader, ())
        module.__class__ = cls
    except TypeError as error:
        raise LayerError(
            asked, f"the class of a {cls.__name__} cannot change ({error})", "Leave it out"
        ) from error
    _SWAPPABLE.add(cls)


_SWAPPABLE: set[type] = set()

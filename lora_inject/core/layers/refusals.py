"""Why a module or a parameter cannot carry an adapter, and what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.packed_weights import reason_against
from lora_inject.core.layers.plain_tensors import dtype_name, is_quantized
from lora_inject.core.spec.sites import Geometry


def why_not(
    module: nn.Module,
    key: str,
    parameter: Tensor | None,
    *,
    asks: bool,
    away: tuple[str, str] | None,
) -> tuple[str, str] | None:
    """Return the problem of a module or a parameter, and the remedy.

    `asks` says that a library that packs weights is loaded, `away` why weights on the meta device
    have no values.
    """
    cls = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
    if (computed := computed_weights(module)) and key in computed:
        problem = (
            f"the weight of {cls} is computed by a parametrization: W + delta has no tensor to "
            "be merged into, and no name in a state dict"
        )
        remedy = (
            f"Name what it is computed of ('parametrizations.{key}.{computed[key]}'), or call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
        return problem, remedy
    if asks and (reason := reason_against("inject", module, parameter)) is not None:
        return reason
    if parameter is None:
        problem = f"{cls} holds no parameter {key!r} of its own"
        remedy = "Name what it is computed of ('weight_v' of weight_norm), or remove that"
        return problem, remedy
    if parameter.dtype.is_complex:
        return (
            f"the weight of {cls} is complex, and an adapter's factors are real",
            "Leave it out",
        )
    if nn.parameter.is_lazy(parameter):
        return f"{cls} is lazy and not initialized", "Run the model once first"
    if parameter.is_meta:
        return away
    return None


def unfit(
    module: nn.Module, weight: Tensor | None, stated: Geometry, adds: bool
) -> tuple[str, str] | None:
    """Say where a weight is not what the layer states, or cannot be read where it has to be."""
    if weight is None:
        return None
    if is_quantized(weight):
        if adds:
            return None  # a packed weight has another shape by design
        if type(weight) is nn.Parameter and weight.is_floating_point():  # cast in each forward
            problem = f"its weight is kept in {dtype_name(weight.dtype)}"
            return problem, "Inject first, then cast (enable_layerwise_casting)"
        cls = plain_class(type(module)).__name__
        problem = (
            f"its weight is a packed {type(weight).__name__}, and the forward of {cls} is not known"
        )
        return problem, "State that its output is linear in the weight: register_kind"
    if weight.shape != stated.weight_shape:
        cls = plain_class(type(module)).__name__
        problem = (
            f"{cls} states sizes {stated.weight_shape}, and its weight has {tuple(weight.shape)}"
        )
        return problem, "Set the layer's sizes to those of its weight (was it resized or sharded?)"
    return None


def computed_weights(module: nn.Module) -> dict[str, str]:
    """Return the parameters that torch's parametrize computes, and the last name of what of."""
    lists = module._modules.get("parametrizations")
    inside = {} if lists is None else lists._modules
    return {key: list(each._parameters)[-1] for key, each in inside.items() if each is not None}

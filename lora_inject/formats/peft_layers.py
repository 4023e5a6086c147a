"""Which modules of a model PEFT cannot adapt right, by the model's objects and sources.

Asked for a live model and for one on the meta device, so before anything ran; what only a run shows
(who read a weight) is asked in `peft_reading`.

Source: peft 0.21.2, tuners/lora/layer.py (`LoraLayer`, `_ConvNd`), tuners/tuners_utils.py
(`BaseTunerLayer`, `_check_lora_target_modules_mamba`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.spec.names import leaf
from lora_inject.formats.parents import uses

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What PEFT's layer has of its own or passes on of the layer inside.
_ON_A_WRAPPER = {*dir(nn.Module()), "weight", "bias", "in_features", "out_features", "base_layer"}
# What is read of a weight without computing with it.
_ABOUT_A_WEIGHT = {"device", "dim", "dtype", "element_size", "is_floating_point", "is_meta"}
_ABOUT_A_WEIGHT |= {"ndim", "new_empty", "new_ones", "new_tensor", "new_zeros", "numel"}
_ABOUT_A_WEIGHT |= {"requires_grad", "shape", "size"}


def why_not_in_peft(model_type: Any, modules: Mapping[str, nn.Module], name: str) -> str:
    """Return why PEFT would refuse, fail or do nothing with an adapter of a module, or "".

    Args:
        model_type: What the model's config calls it.
        modules: Its modules, by all their names.
        name: That of the adapted module.
    """
    module: Any = modules.get(name)
    if module is None:
        return ""
    if model_type in _MAMBA and leaf(name) in _NOT_IN_MAMBA:
        return f"it refuses every '{leaf(name)}' in models of the type '{model_type}'"
    reason = _of_convolution(module) if isinstance(module, _CONVOLUTIONS) else ""
    return reason or _of_parents(modules, name, module)


def _of_convolution(module: Any) -> str:
    """Return why PEFT's pair of convolutions would compute something else than W + delta."""
    cls = plain_class(type(module))
    if module.groups > 1:
        problem = f"its A reads the inputs of all {module.groups} groups"
        return f"{problem}, and a rank that they do not divide is refused"
    if any(step != 1 for step in module.dilation):
        return "its A is not dilated"
    if module.padding_mode != "zeros":
        return f"its A pads with zeros, and the layer with padding_mode={module.padding_mode!r}"
    if "__init__" in vars(cls) and cls not in _CONVOLUTIONS:
        return f"it makes A and B as {cls.__name__}, whose arguments are not a convolution's"
    return ""


def _of_parents(modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> str:
    """Return why the modules around it could not work with PEFT's layer in its place."""
    called, read = uses(modules, name)
    computed = any(a == "weight" and further not in _ABOUT_A_WEIGHT for a, further in read)
    if computed and not called:
        return "another module reads the weight, and nothing would call the adapter"
    lost = sorted({a for a, _ in read if a not in _ON_A_WRAPPER and hasattr(module, a)})
    if lost:
        return f"the model reads {one_line(lost)} of the layer, which PEFT's layer does not have"
    return ""

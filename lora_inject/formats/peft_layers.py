"""Which modules of a model PEFT cannot adapt right, by the model's objects.

Asked for a live model and for one on the meta device, so before anything ran; what only a run shows
(who read a weight) is asked in `peft_reading`.

Source: peft 0.21.2, tuners/lora/layer.py (`LoraLayer`, `_ConvNd`), tuners/tuners_utils.py
(`BaseTunerLayer`, `_check_lora_target_modules_mamba`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.spec.names import leaf

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    return _of_convolution(module) if isinstance(module, _CONVOLUTIONS) else ""


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

"""What the core asks of the rooms around it: by name, and imported only when it is asked for.

The core imports no room. What it can do without one, it does; where a verb needs what lies in a
room (a file of another program, the config of another library), this is the only way there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

ROOMS = {
    "algebra": "lora_inject.algebra.values",
    "formats": "lora_inject.formats",
    "from_peft": "lora_inject.formats.from_peft",
    "graphs": "lora_inject.compiled.graphs",
    "guards": "lora_inject.integrations.libraries",
    "hub": "lora_inject.formats.hub",
    "mixtures": "lora_inject.experts.mixtures",
    "reached": "lora_inject.checks.reached",
    "sharding": "lora_inject.distributed.sharding",
    "stacks": "lora_inject.experts.stacks",
}
"""What is asked for, to the module that answers."""


_QUANTIZED = "lora_inject.quantized"
_TRANSFORMERS = "transformers.integrations"

WEIGHT_KINDS = (
    ("bitsandbytes.nn.modules", f"{_QUANTIZED}.bitsandbytes:BitsAndBytes4"),
    ("bitsandbytes.nn.modules", f"{_QUANTIZED}.bitsandbytes:BitsAndBytes8"),
    ("compressed_tensors.quantization", f"{_QUANTIZED}.compressed_tensors:CompressedTensors"),
    ("gptqmodel.nn_modules.qlinear", f"{_QUANTIZED}.gptqmodel:Kernel"),
    ("hqq.core.quantize", f"{_QUANTIZED}.hqq:HQQ"),
    ("optimum.quanto.nn.qlinear", f"{_QUANTIZED}.quanto:Quanto"),
    ("torchao", f"{_QUANTIZED}.torchao:TorchAO"),
    (f"{_TRANSFORMERS}.fbgemm_fp8", f"{_QUANTIZED}.transformers_linears:Multiplies"),
    (f"{_TRANSFORMERS}.finegrained_fp8", f"{_QUANTIZED}.transformers_linears:FineGrained"),
    (f"{_TRANSFORMERS}.metal_quantization", f"{_QUANTIZED}.transformers_linears:Multiplies"),
    (f"{_TRANSFORMERS}.mxfp4", f"{_QUANTIZED}.transformers_mxfp4:KernelExperts"),
    ("transformers.models.falcon.modeling_falcon", f"{_QUANTIZED}.transformers_linears:Multiplies"),
    ("transformers.quantizers.base", f"{_QUANTIZED}.transformers_quantizers:Quantized"),
)
"""Ways in which a weight is held packed, asked in this order: the module of the library that has to
be loaded, and the class that knows it (`core/layers/weight_kinds.py`)."""

WEIGHT_KINDS_OF_ANY = (
    f"{_QUANTIZED}.own_values:OfTensor",
    f"{_QUANTIZED}.own_values:OfLayer",
)
"""Those of whatever library, asked last."""


FORWARD_OWNERS = (
    ("accelerate.hooks", "lora_inject.integrations.accelerate:Hooks"),
    ("compressed_tensors.quantization", f"{_QUANTIZED}.compressed_tensors:Forwards"),
)
"""Who puts forwards onto instances: a module of the library that has to be loaded, and the class
that knows it (`core/layers/forwards.py`)."""

_MADE: dict[str, Any] = {}  # the objects that `the_one` has made


def room(name: str) -> Any:
    """Return the module that answers.

    Examples:
        >>> room("from_peft").__name__
        'lora_inject.formats.from_peft'
    """
    return import_module(ROOMS[name])


def standing_at(path: str) -> Any:
    """Return what a row names as `module:name`.

    Examples:
        >>> standing_at("lora_inject.quantized.hqq:HQQ").__name__
        'HQQ'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def the_one(path: str) -> Any:
    """Return the one object of a class, which a compiled forward finds made: it cannot import."""
    if path not in _MADE:
        _MADE[path] = standing_at(path)()
    return _MADE[path]

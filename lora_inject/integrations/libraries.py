"""What is known of other libraries, row by row: all that the core learns of them.

| table | a row is about |
|---|---|
| `GUARDS` | what must hold around a verb because a library is there (`core/model/guards.py`) |
| `AGAINST_PLANS` | what a plan must not have because of a library |
| `WEIGHT_KINDS` | a way in which a weight is held packed (`core/layers/weight_kinds.py`) |
| `WEIGHT_KINDS_OF_ANY` | one that no library alone has |
| `FORWARD_OWNERS` | who puts forwards onto instances (`core/layers/forward_owners.py`) |
| `MOVERS` | who reads a parameter to move it, and must find it as it is |
| `CONV1D` | a class of linear layers with the transposed weight |
| `WRAPPERS` | segments of names that stand for no module of the user's |
| `GATHERED` | a mark of modules whose parameters are views of gathered shards |

What a row names is imported only where the process has loaded a module that it is about.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

GROUP = "a group of processes"
"""Of torch.distributed. Whether FSDP is loaded tells nothing: an optimizer of torch loads it."""

GUARDS: dict[str, tuple[str, ...]] = {
    "lora_inject.integrations.transformers": ("transformers",),
    "lora_inject.integrations.transformers_parallel": ("transformers.distributed.tensor_parallel",),
    # Names that older versions of transformers gave to a model's tensors.
    "lora_inject.formats.older_names": ("transformers",),
    # Methods of a model that stand for something else while it has adapters.
    "lora_inject.integrations.stand_ins": ("transformers", "diffusers", "huggingface_hub"),
    "lora_inject.distributed.sharding": (GROUP, "deepspeed"),
}
"""Guard, and what has to be there, any of it: modules of a library, or a group of processes."""

AGAINST_PLANS = (
    ("peft.tuners.tuners_utils", "lora_inject.integrations.peft_wrapped:sites_in_peft"),
    ("transformers", "lora_inject.integrations.transformers:left_new"),
)
"""The module that has to be loaded, and the function that yields reasons."""

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
    (f"{_TRANSFORMERS}.finegrained_fp8", f"{_QUANTIZED}.transformers_linears:FineGrainedExperts"),
    (f"{_TRANSFORMERS}.metal_quantization", f"{_QUANTIZED}.transformers_linears:Multiplies"),
    (f"{_TRANSFORMERS}.mxfp4", f"{_QUANTIZED}.transformers_mxfp4:KernelExperts"),
    ("transformers.models.falcon.modeling_falcon", f"{_QUANTIZED}.transformers_linears:Multiplies"),
    ("transformers.quantizers.base", f"{_QUANTIZED}.transformers_quantizers:Quantized"),
)
"""Asked in this order: the module that has to be loaded, and the class that knows the way."""

WEIGHT_KINDS_OF_ANY = (
    f"{_QUANTIZED}.own_values:OfTensor",
    f"{_QUANTIZED}.own_values:OfLayer",
)
"""Those of whatever library, asked last."""

FORWARD_OWNERS = (
    ("accelerate.hooks", "lora_inject.integrations.accelerate:Hooks"),
    ("compressed_tensors.quantization", f"{_QUANTIZED}.compressed_tensors:Forwards"),
    (
        "transformers.distributed.tensor_parallel",
        "lora_inject.integrations.transformers_parallel:Styles",
    ),
)
"""The module that has to be loaded, and the class that knows it."""

MOVERS = (
    ("compressed_tensors.quantization", f"{_QUANTIZED}.compressed_tensors:rounds_in_place"),
    (GROUP, "lora_inject.distributed.movers:is_moved"),
)
"""What has to be there, and the function that says so of a read."""

CONV1D = (("transformers.pytorch_utils", "Conv1D"),)
"""The module and the name of the class."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Those of torch's compiler, of FSDP1 and of activation checkpointing."""

GATHERED = ("_is_fsdp_managed_module",)
"""The attribute that FSDP1 sets."""


def guards() -> Iterator[Any]:
    """Yield the guards of what this process has loaded."""
    for guard, about in GUARDS.items():
        if any(map(_is_there, about)):
            yield import_module(guard)


def against_plans() -> list[str]:
    """Return the functions that yield reasons against a plan."""
    return [function for about, function in AGAINST_PLANS if _is_there(about)]


def movers() -> list[str]:
    """Return the functions that say whether a library reads a parameter to move or to round it."""
    return [function for about, function in MOVERS if _is_there(about)]


def _is_there(about: str) -> bool:
    return about in sys.modules if about != GROUP else _group_was_made()


_groups: list[bool] = []  # a group that is gone may have left its shards


def _group_was_made() -> bool:
    distributed = sys.modules.get("torch.distributed")
    if not _groups and distributed is not None and distributed.is_available():
        _groups[:] = [True] if distributed.is_initialized() else []
    return bool(_groups)

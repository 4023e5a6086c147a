"""What transformers asks of a quantized model before it trains: that adapters are attached.

Trainer refuses a quantized model whose `_hf_peft_config_loaded` is false: the attribute that
transformers' own adapter mixin sets, for whatever adapters it puts on
(`transformers/trainer_utils.py: validate_quantization_for_training`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_inject.model.carried import reach

ATTRIBUTE = "_hf_peft_config_loaded"
# As true as True, and says whose it is: what transformers' own mixin has set is left alone.
OURS = "lora_inject"


def state_adapters(modules: Iterable[nn.Module]) -> None:
    """Let every quantized transformers model among the modules say that it has adapters."""
    for module in modules:
        if getattr(module, "is_quantized", False) and getattr(module, ATTRIBUTE, None) is False:
            module.__dict__[ATTRIBUTE] = OURS


def state_no_adapters(modules: Iterable[nn.Module]) -> None:
    """Take that back from models that carry none."""
    for module in modules:
        if module.__dict__.get(ATTRIBUTE) == OURS and not reach(module).names:
            del module.__dict__[ATTRIBUTE]

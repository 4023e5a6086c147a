"""PEFT's folder: `adapter_model.safetensors` and `adapter_config.json`."""

from lora_inject.formats.peft.files import detects
from lora_inject.formats.peft.folder import read, write
from lora_inject.formats.peft.live_model import (
    expert_names,
    options_for_reading,
    options_for_writing,
    plain_config,
)
from lora_inject.formats.peft.tensor_layout import PREFIX

__all__ = [
    "PREFIX",
    "detects",
    "expert_names",
    "options_for_reading",
    "options_for_writing",
    "plain_config",
    "read",
    "write",
]

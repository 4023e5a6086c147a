"""PEFT's folder: `adapter_model.safetensors` and `adapter_config.json`."""

from lora_inject.formats.format import Format
from lora_inject.formats.peft.folder import detects, read, write
from lora_inject.formats.peft.tensor_layout import PREFIX

__all__ = ["FORMATS", "PREFIX", "read", "write"]

FORMATS = {"peft": Format(write, read, detects, by_peft=True)}

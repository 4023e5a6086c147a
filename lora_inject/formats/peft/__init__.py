"""PEFT's folder: `adapter_model.safetensors` and `adapter_config.json`."""

from lora_inject.formats.peft.folder import detects, read, write

__all__ = ["detects", "read", "write"]

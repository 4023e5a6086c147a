"""PEFT's folder: `adapter_model.safetensors` and `adapter_config.json`."""

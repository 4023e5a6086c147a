"""diffusers: the loader of its pipelines, on the model alone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from programs import Outputs, base_model, outputs
from programs.cases import IMAGE_CASES

CHECK = "diffusers"
FILES = ("diffusers", "kohya", "peft")
CASES = IMAGE_CASES


def version() -> str:
    return "diffusers " + importlib.metadata.version("diffusers")


def start(base: Path) -> Outputs:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

    loaders = {"unet": StableDiffusionLoraLoaderMixin, "flux": FluxLoraLoaderMixin}
    loader, component = loaders[base.name], {"unet": "unet", "flux": "transformer"}[base.name]

    def run(path: Path | None) -> torch.Tensor:
        model = base_model(base)
        if path is not None and (path / "adapter_config.json").exists():
            file = "adapter_model.safetensors"
            model.load_lora_adapter(path, prefix="base_model.model", weight_name=file)
        elif path is not None:
            options = {"return_alphas": True, "return_lora_metadata": True}
            if base.name == "unet":
                options = {"unet_config": model.config, "return_lora_metadata": True}
            tensors, alphas, metadata = loader.lora_state_dict(path, **options)
            model.load_lora_adapter(
                tensors, prefix=component, network_alphas=alphas, metadata=metadata
            )
        return outputs(model)

    return run

"""diffusers: the loader of its pipelines, on the model alone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from programs import Outputs, base_model, outputs
from programs.cases import IMAGE_CASES

CHECK = "diffusers"
FILES = ("diffusers", "peft")
CASES = IMAGE_CASES


def version() -> str:
    return "diffusers " + importlib.metadata.version("diffusers")


def start(base: Path) -> Outputs:
    from diffusers.loaders import lora_pipeline

    name, component = {
        "unet": ("StableDiffusion", "unet"),
        "clip": ("StableDiffusion", "text_encoder"),
        "flux": ("Flux", "transformer"),
        "sd3": ("SD3", "transformer"),
    }[base.name]
    loader = getattr(lora_pipeline, f"{name}LoraLoaderMixin")

    def run(path: Path | None) -> torch.Tensor:
        model = base_model(base)
        if path is not None and (path / "adapter_config.json").exists():
            file = "adapter_model.safetensors"
            if base.name == "clip":
                model.load_adapter(str(path))
                return outputs(model)
            model.load_lora_adapter(path, prefix="base_model.model", weight_name=file)
        elif path is not None:
            options: dict[str, Any] = {"return_lora_metadata": True}
            options |= {"unet_config": model.config} if base.name == "unet" else {}
            options |= {"return_alphas": True} if base.name == "flux" else {}
            tensors, *alphas, metadata = loader.lora_state_dict(path, **options)
            given = {"network_alphas": alphas[0] if alphas else None, "metadata": metadata}
            if base.name == "clip":
                given["text_encoder"] = model
                loader.load_lora_into_text_encoder(tensors, prefix=component, **given)
            else:
                model.load_lora_adapter(tensors, prefix=component, **given)
        return outputs(model)

    return run

"""ComfyUI, from its sources: its own model is patched by its own loader.

The patched weights go back into diffusers' model under the names of ComfyUI's own table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import programs
from programs import Outputs, base_model, outputs
from programs.cases import CLIP, IMAGE_CASES

CHECK = "comfyui"
FILES = ("kohya", "peft")
CASES = {name: case for name, case in IMAGE_CASES.items() if case.base != "sd3"}
UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 16,
    "num_heads": 2, "num_head_channels": -1, "adm_in_channels": None, "legacy": False,
    "use_spatial_transformer": True, "use_linear_in_transformer": False,
    "use_temporal_attention": False, "dtype": torch.float32,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "image_model": "flux", "in_channels": 16, "patch_size": 2, "out_channels": 16,
    "vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000,
    "qkv_bias": True, "guidance_embed": False, "dtype": torch.float32,
}  # fmt: skip


def version() -> str:
    sys.path.insert(0, str(programs.SOURCES))
    import comfyui_version

    return f"ComfyUI {comfyui_version.__version__}"


def start(base: Path) -> Outputs:
    from comfy.cli_args import args

    args.cpu = True
    if base.name == "clip":
        return of_text_encoder(base)
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    from comfy.model_patcher import ModelPatcher

    config, kind, table = {
        "unet": (UNET, comfy.supported_models.SD15, comfy.utils.unet_to_diffusers),
        "flux": (FLUX, comfy.supported_models.Flux, comfy.utils.flux_to_diffusers),
    }[base.name]
    described = kind(config)
    described.set_inference_dtype(torch.float32, None)
    theirs = described.get_model({}, "", device="cpu")
    model = base_model(base)
    names = table(config)

    def places(tensors: dict[str, torch.Tensor]) -> Any:
        """Yield ComfyUI's part of its tensor and diffusers' name for it."""
        for name in model.state_dict():
            there = names[name]
            key, part, *swapped = (there, None) if isinstance(there, str) else there
            if not swapped:  # halves that the two programs hold in another order are left alone
                yield name, tensors[key] if part is None else tensors[key].narrow(*part)

    own = dict(theirs.diffusion_model.state_dict())
    for name, part in places(own):
        part.copy_(model.state_dict()[name])

    def run(path: Path | None) -> torch.Tensor:
        patched = ModelPatcher(theirs, torch.device("cpu"), torch.device("cpu"))
        if path is not None:
            folders = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
            file = next((path / name for name in folders if (path / name).exists()), path)
            tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
            patched, _ = comfy.sd.load_lora_for_models(patched, None, tensors, 1.0, 0.0)
        patched.patch_model()
        result = base_model(base)
        weights = dict(places(dict(theirs.diffusion_model.state_dict())))
        kept = result.state_dict()
        result.load_state_dict({**kept, **{name: w.clone() for name, w in weights.items()}})
        patched.unpatch_model()
        return outputs(result)

    return run


def of_text_encoder(base: Path) -> Outputs:
    """CLIP alone; its weights have transformers' older names in ComfyUI."""
    import comfy.clip_model
    import comfy.lora
    import comfy.ops
    import comfy.utils
    from comfy.model_patcher import ModelPatcher

    cpu, place = torch.device("cpu"), "clip_l.transformer.text_model."
    clip = comfy.clip_model.CLIPTextModel(CLIP, torch.float32, cpu, comfy.ops.disable_weight_init)
    theirs = torch.nn.ModuleDict({"clip_l": torch.nn.ModuleDict({"transformer": clip})})
    own = {f"{place}{name}": weight for name, weight in base_model(base).state_dict().items()}
    own = {name: weight for name, weight in own.items() if ".embeddings." not in name}
    theirs.load_state_dict(own, strict=False)

    def run(path: Path | None) -> torch.Tensor:
        patched = ModelPatcher(theirs, cpu, cpu)
        if path is not None:
            folders = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
            file = next((path / name for name in folders if (path / name).exists()), path)
            tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
            patched.add_patches(
                comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_clip(theirs, {}))
            )
        patched.patch_model()
        result = base_model(base)
        weights = {n.removeprefix(place): w.clone() for n, w in theirs.state_dict().items()}
        mine = {n: w for n, w in weights.items() if place + n in own}
        result.load_state_dict({**result.state_dict(), **mine})
        patched.unpatch_model()
        return outputs(result)

    return run

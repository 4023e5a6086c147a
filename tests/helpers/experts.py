"""Tiny models of stacked experts, one for each way that transformers stores them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 13}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
LATENT = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4
)
FOUR = {"num_experts_per_tok": 2, "num_experts": 4}
FOUR_LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
FOUR_ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
FOUR_ROUTED |= {"moe_intermediate_size": 8, "first_k_dense_replace": 0, "topk_group": 1}
THREE = {"num_experts": 3, "num_experts_per_tok": 2}
THREE_LOCAL = {"num_local_experts": 3, "head_dim": 4, "layer_types": ["full_attention"]}
GPT_OSS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA4 = {"intermediate_size_mlp": 8, "moe_layers": [0], "no_rope_layers": [1], "pad_token_id": 0}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
ERNIE |= {"moe_intermediate_size": 8, "moe_layer_start_index": 0, "moe_layer_end_index": 0}
JAMBA = {"attn_layer_period": 1, "expert_layer_period": 1, "use_mamba_kernels": False}
JAMBA |= {"attn_layer_offset": 0, "expert_layer_offset": 0}
TURNED = ("gpt_oss", "llama4")  # whose stacks lie as (E, in, out)
# The sizes that are a family's own.
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {**THREE, "moe_intermediate_size": 8, "head_dim": 4},
    "deepseek_v3": {**FOUR_ROUTED, "num_key_value_heads": 2, "n_group": 2, **LATENT},
    "gpt_oss": {**THREE_LOCAL, "num_experts_per_tok": 2, **GPT_OSS},
    "llama4": {**THREE_LOCAL, "num_experts_per_tok": 1, **LLAMA4},
}
# Further architectures, that store experts in one of these ways.
MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**FOUR, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "glm4_moe": {**FOUR_ROUTED, "n_group": 1, "head_dim": 4},
    "olmoe": FOUR,
    "granitemoe": FOUR_LOCAL,
    "phimoe": FOUR_LOCAL,
    "ernie4_5_moe": ERNIE,
    "jamba": {**JAMBA, **FOUR},
    "jetmoe": {"kv_channels": 4, **FOUR_LOCAL},
}


def experts(family: str, how: str = "eager", **changed: int) -> tuple[Any, str]:
    """A tiny model of stacked experts, and the layout of its weights."""
    torch.manual_seed(0)
    model_type = "llama4_text" if family == "llama4" else family
    sizes = SIZES | (MOE | MORE)[family] | changed
    settings = AutoConfig.for_model(model_type, **sizes, initializer_range=0.3)
    if how != "default":
        settings._experts_implementation = how
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # some families leave them uninitialized
                parameter.normal_(0.0, 0.3)
    return model.eval(), "in_out" if family in TURNED else "out_in"


def expert_rule(layout: str) -> dict[str, Any]:
    return {"match": r"experts\.(gate_up_proj|down_proj)", "layout": layout}


def moe() -> Any:
    """A tiny Qwen3-MoE, whose files have experts singly."""
    return experts("qwen3_moe", "default")[0]

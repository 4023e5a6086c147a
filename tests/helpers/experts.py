"""Tiny models of stacked experts, one for each way that transformers stores them."""

from typing import Any

import torch

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 13}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
LATENT = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4
)
# The names of its classes, the layout of its weights, and the sizes that are its own.
MOE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", "out_in", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", "out_in", {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4,
    }),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", "out_in", {
        "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 0, **LATENT,
    }),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", "in_out", {
        "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4,
        "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", "in_out", {
        "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 4, "intermediate_size_mlp": 8,
        "moe_layers": [0], "layer_types": ["full_attention"], "no_rope_layers": [1],
        "pad_token_id": 0,
    }),
}  # fmt: skip


def experts(family: str, how: str = "eager") -> tuple[Any, str]:
    """A tiny model of stacked experts, and the layout of its weights."""
    import transformers

    torch.manual_seed(0)
    made, cls, layout, options = MOE[family]
    settings = getattr(transformers, made)(**SIZES | options, initializer_range=0.3)
    if how != "default":
        settings._experts_implementation = how
    model = getattr(transformers, cls)(settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key:  # some families leave them uninitialized
                parameter.normal_(0.0, 0.3)
    return model.eval(), layout


def expert_rule(layout: str) -> dict[str, Any]:
    return {"match": r"experts\.(gate_up_proj|down_proj)", "layout": layout}

"""Tiny models of stacked experts, one for each way that transformers stores them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from conftest import error, fill, same_bits
from helpers.reference import EXACT, SCALE, base_state, config, logits
from torch import nn

import lora_inject as li

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
FOUR = {"num_experts_per_tok": 2, "num_experts": 4}
FOUR_LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Further architectures, that store experts in one of these ways.
MORE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", "out_in", {
        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, **FOUR,
    }),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", "out_in", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "head_dim": 4, "n_group": 1,
        "topk_group": 1,
    }),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", "out_in", FOUR),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", "out_in", FOUR_LOCAL),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", "out_in", FOUR_LOCAL),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", "out_in", {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0, "moe_layer_end_index": 0,
    }),
    "jamba": ("JambaConfig", "JambaForCausalLM", "out_in", {
        "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
        "expert_layer_offset": 0, "use_mamba_kernels": False, **FOUR,
    }),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", "out_in", {"kv_channels": 4, **FOUR_LOCAL}),
}  # fmt: skip


def experts(family: str, how: str = "eager") -> tuple[Any, str]:
    """A tiny model of stacked experts, and the layout of its weights."""
    import transformers

    torch.manual_seed(0)
    made, cls, layout, options = (MOE | MORE)[family]
    settings = getattr(transformers, made)(**SIZES | options, initializer_range=0.3)
    if how != "default":
        settings._experts_implementation = how
    model = getattr(transformers, cls)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # some families leave them uninitialized
                parameter.normal_(0.0, 0.3)
    return model.eval(), layout


def expert_rule(layout: str) -> dict[str, Any]:
    return {"match": r"experts\.(gate_up_proj|down_proj)", "layout": layout}


def with_expert_deltas(plain: nn.Module, model: nn.Module, layout: str) -> nn.Module:
    """The plain model with the dense deltas in its experts, expert by expert."""
    wide = copy.deepcopy(plain)
    for site in li.adapter_state(model).sites.values():
        W = wide.get_parameter(site.spec.weight)
        with torch.no_grad():
            for e in range(len(W)):
                delta = (SCALE * site.B[e].double() @ site.A[e].double()).to(W.dtype)
                W[e] += delta if layout == "out_in" else delta.t()
    return wide


def gradients_of_experts(model: nn.Module, wide: nn.Module, layout: str) -> None:
    """dL/dA and dL/dB follow from the dense dL/dW by hand: scale B^T G and scale G A^T."""
    weights = torch.randn(2, 4, 13, dtype=torch.float64)
    (logits(wide) * weights).sum().backward()
    (logits(model) * weights).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        G = wide.get_parameter(site.spec.weight).grad
        G = G if layout == "out_in" else G.transpose(1, 2)
        A, B = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
        assert error(A.grad, SCALE * B.transpose(1, 2) @ G) < 1e-10
        assert error(B.grad, SCALE * G @ A.transpose(1, 2)) < 1e-10


def check_like_dense(family: str, rule_for: Callable[[str], Any]) -> Any:
    """Check outputs, gradients, merge and unmerge against the dense model, in float64.

    `rule_for` gives the rule for a layout. Returns the injected model.
    """
    plain, layout = experts(family)
    plain = plain.double()
    model = copy.deepcopy(plain)
    li.inject(model, config(rule_for(layout)))
    assert same_bits(logits(model), logits(plain))
    fill(model)
    wide = with_expert_deltas(plain, model, layout)
    assert error(logits(plain), logits(wide)) > 1e-3
    assert error(logits(model), logits(wide)) < EXACT
    gradients_of_experts(model, wide, layout)
    li.merge(model)
    assert error(logits(model), logits(wide)) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())
    return model


def moe() -> Any:
    """A tiny Qwen3-MoE, whose files have experts singly."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 4, "vocab_size": 13, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, initializer_range=0.3)).eval()

"""A Llama with a byte-level BPE tokenizer as one GGUF file of llama.cpp, in float32.

llama.cpp's own converter knows a tokenizer by a hash of what it makes of a text, and refuses the
one that transformers reads out of a GGUF file. Source: llama.cpp, conversion/llama.py (`permute`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(model: Any, tokenizer: Any, target: Path) -> Path:
    """Write a LlamaForCausalLM and its fast tokenizer."""
    writer = gguf.GGUFWriter(target, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(gguf_name(name), in_pairs(name, tensor, config).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add_tokenizer(writer: Any, tokenizer: Any) -> None:
    """Write vocabulary and merges; nothing is put before or after a text."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([kinds.CONTROL if w in special else kinds.NORMAL for w, _ in words])
    writer.add_token_merges([" ".join(pair) for pair in plain["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"


def in_pairs(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Return the rows of q and k in the order of Meta's code."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n_heads = heads.get(name.split(".")[-2])
    if n_heads is None:
        return tensor
    rows = tensor.view(n_heads, 2, -1, tensor.shape[1])
    return torch.transpose(rows, 1, 2).reshape(tensor.shape)

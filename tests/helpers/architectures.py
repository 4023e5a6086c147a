"""Tiny models of transformers with random weights, each with inputs: a table for tests of files.

No biases or norms are at their start, as a lost zero would not be missed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = torch.tensor([[3, 60, 7, 5, 9, 11, 12, 13], [1, 2, 3, 4, 5, 6, 7, 8]])
TEXT_INPUTS = {"input_ids": IDS}
PAIR_INPUTS = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
IMAGE_INPUTS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


@dataclass(frozen=True)
class Architecture:
    """A model and what it is called with."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...] = ()  # by name or in order

    def build(self) -> Any:
        """Return a model that has the same weights each time."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    def outputs(self, model: Any) -> Tensor:
        """Return the outputs of such a model, also inside PEFT's."""
        named = isinstance(self.inputs, Mapping)
        with torch.no_grad():
            output = model.eval()(**self.inputs) if named else model.eval()(*self.inputs)
        return output.logits if named else output


def of(family: str, head: str, inputs: Mapping[str, Tensor], **config: Any) -> Architecture:
    """Return a model of transformers, such as `"Llama", "ForCausalLM"`."""
    cls = getattr(transformers, f"{family}{head}")
    return Architecture(lambda: cls(cls.config_class(**config)), inputs)


def causal(family: str, **config: Any) -> Architecture:
    return of(family, "ForCausalLM", TEXT_INPUTS, **config)


def masked(family: str, **config: Any) -> Architecture:
    return of(family, "ForMaskedLM", TEXT_INPUTS, **config)


def pairs(family: str, **config: Any) -> Architecture:
    return of(family, "ForConditionalGeneration", PAIR_INPUTS, **config)


ENCODER = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 64}  # as many as the vocabulary
TEXT = {**ENCODER, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64}
SEQ2SEQ |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
SEQ2SEQ |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
SEQ2SEQ |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
SEQ2SEQ |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
SEQ2SEQ |= {"forced_eos_token_id": None}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
DISTILBERT = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
DISTILBERT |= {"max_position_embeddings": 64}
TOKENS = dict.fromkeys((f"{kind}_token_id" for kind in ("pad", "eos", "bos", "cls", "sep")), 0)
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GROUPED = {**ROUTED, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LOCAL = {"num_local_experts": 4, "head_dim": 8}
DEEPSEEK = {"num_key_value_heads": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1}
LLAMA4 = {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
# Experts as wide as the model, so that no shape tells which way round a stack lies.
SQUARE = {**TEXT, "intermediate_size": 32}
DENSE = {"num_experts": 4, "head_dim": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
ARIA = {"moe_num_experts": 4, "moe_num_shared_experts": 1}
LLAVA = {"image_token_index": 63}
GEMMA3 = {"boi_token_index": 62, "eoi_token_index": 61, "mm_tokens_per_image": 4, **LLAVA}


def llava() -> Architecture:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    towers = {"text_config": text, "vision_config": vision}
    return of("Llava", "ForConditionalGeneration", TEXT_INPUTS, **towers, **LLAVA)


def gemma3() -> Architecture:
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16)
    towers = {"text_config": text, "vision_config": transformers.SiglipVisionConfig(**VISION)}
    return of("Gemma3", "ForConditionalGeneration", TEXT_INPUTS, **towers, **GEMMA3)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": causal("Llama", **TEXT),
    "llama with biases": causal("Llama", **TEXT, attention_bias=True),
    "tied llama": causal("Llama", **TEXT, tie_word_embeddings=True),
    "gpt2": of("GPT2", "LMHeadModel", TEXT_INPUTS, **GPT2),
    "vit": of("ViT", "ForImageClassification", IMAGE_INPUTS, **VISION),
    "llava": llava(),
    "gemma3": gemma3(),
    "t5": pairs("T5", **T5),
    "t5 that says it is untied": pairs("T5", **T5, tie_word_embeddings=False),
    **{name.lower(): pairs(name, **SEQ2SEQ) for name in ("Bart", "MBart", "Pegasus")},
    "classifier": of("Bert", "ForSequenceClassification", TEXT_INPUTS, **ENCODER),
    "bert": masked("Bert", **ENCODER),
    "roberta": masked("Roberta", **ENCODER, pad_token_id=1),
    "distilbert": masked("DistilBert", **DISTILBERT),
    "electra": masked("Electra", **ENCODER, embedding_size=32),
    "albert": masked("Albert", **ENCODER, embedding_size=16),
    "deberta": masked("DebertaV2", **ENCODER),
    "modernbert": masked("ModernBert", **ENCODER, **TOKENS),
    "mixtral": causal("Mixtral", **SQUARE, num_local_experts=4),
    "qwen moe": causal("Qwen3Moe", **TEXT, **ROUTED, num_experts=4, head_dim=8),
    "gpt-oss": causal("GptOss", **SQUARE, **LOCAL, num_experts_per_tok=2),
    "llama4": causal("Llama4", **SQUARE, **LOCAL, **LLAMA4),
    "aria": causal("AriaText", **SQUARE, **ARIA),
    # The first layer is dense.
    "qwen moe, dense first": causal("Qwen3Moe", **TEXT, **DENSE, moe_intermediate_size=32),
    "deepseek": causal("DeepseekV3", **{**TEXT, **LATENT, **GROUPED, **DEEPSEEK}),
}  # fmt: skip

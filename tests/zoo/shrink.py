"""Tiny configs of transformers' model types: one walk that shrinks any of them.

Widths, depths, heads, vocabularies and picture sizes each have one small value, wherever their name
occurs, so that the towers of a model agree by themselves. What no name tells is in `overrides`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, INNER, HEADS, HEAD_DIM, LAYERS, EXPERTS = 32, 48, 4, 8, 2, 4
VOCAB, IMAGE, PATCH, POSITIONS, RANK = 128, 32, 8, 64, 8

# The first pattern that matches a whole name gives its value. All values must divide each other
# where models divide: widths by heads, heads by key-value heads.
NUMBERS = {
    re.compile(pattern): value
    for pattern, value in {
        r"(?:xpath_unit|router|loop_gate|mamba|frequency_embedding|loss_weighting).*": 16,
        r"(?:\w*_)?(?:vocab_size|codebook_size)": VOCAB,
        r"(?:\w*_)?num_(?:key_value|kv)_heads|linear_num_key_heads": 2,
        r"(?:\w*_)?(?:num_attention_heads|attention_heads|num_heads|n_heads?)": HEADS,
        r"(?:\w*_)?(?:num_query_heads|num_value_heads)": HEADS,
        r"(?:\w*_)?(?:head_dim|d_kv|dim_head|d_head|kv_channels)": HEAD_DIM,
        r"(?:q|kv|o|qk)_lora_rank": RANK,
        r"(?:encoder|decoder)_layers|(?:\w*_)?num_(?:hidden_|encoder_|decoder_)?layers": LAYERS,
        r"n_layers?|(?:resampler_)?depth|layers|num_blocks": LAYERS,
        r"num_(?:local_|routed_)?experts|n_routed_experts|moe_num_experts": EXPERTS,
        r"num_experts_per_tok|moe_k": 2,
        r"(?:\w*_)?(?:n|num)_shared_experts|n_group|topk_group": 1,
        r"(?:\w*_)?(?:intermediate|ffn)(?:_\w*)?(?:size|dim|mlp)": INNER,
        r"dff|dim_ff|d_ff|d_inner|mlp_dim|(?:en|de)coder_linear_units": INNER,
        r"num_mel_bins": 16,
        r"n_positions|(?:\w*_)?max_\w*position\w*|max_seq_len": POSITIONS,
        r"(?:\w*_)?(?:hidden_size|hidden_dim|d_model|n_embd|emb_dim|embed_dim)": WIDTH,
        r"(?:\w*_)?(?:embedding_size|condition_dim|projector_input_dim)|dim|reduce_dim": WIDTH,
        r"(?:\w*_)?(?:projection|project|proj|output|out_hidden)_(?:dim|size)": WIDTH,
        r"mm_tokens_per_image": 4,
        r"(?:pretrain_)?image_size|crop_size": IMAGE,
        r"patch_size": PATCH,
        r"sliding_window(?:_size)?|attention_window|local_attention|attention_chunk_size": 8,
        r"num_queries|num_detection_tokens": 5,
    }.items()
}

# One entry for each layer.
PER_LAYER = re.compile(
    r"layer_types|mlp_layer_types|layers_block_type|no_rope_layers|attention_layers"
    r"|layer_rope_theta|num_attention_heads_per_layer"
)
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
WIDTHS_OF_STAGES = {"hidden_sizes", "embed_dims", "conv_dim", "neck_hidden_sizes", "tdnn_dim"}
DEPTHS_OF_STAGES = {"depths", "stage_num_blocks"}
HEADS_OF_STAGES = {"num_attention_heads", "num_heads"}
# Which layers do something special, of two.
FIXED: dict[str, Any] = {
    "global_attn_indexes": [1],
    "fullatt_block_indexes": [1],
    "cross_attention_layers": [1],
    "deepstack_visual_indexes": [0, 1],
    "intermediate_layers_indices": [0, 1],
    # Behind an earlier layer the last ones would have no effect.
    "vision_feature_layer": -1,
    "feature_layer": -1,
}
# What a config computes from its other entries, unless it is told.
COMPUTED = {"stage_names", "out_features", "out_indices", "transformers_version", "architectures"}
TOKEN = re.compile(r"(?:\w*_)?token_(?:id|index)|image_patch_id|\w*_stream_[be]os_id")


def shrink(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config (as `to_dict` gives them) that make it tiny."""
    small: dict[str, Any] = {}
    for key, value in data.items():
        if key in COMPUTED:
            continue
        if isinstance(value, Mapping) and (key.endswith("_config") or "model_type" in value):
            small[key] = shrink(value)
            if value.get("vision_use_head"):
                small[key]["vision_use_head"] = False  # whose output the models around do not read
        else:
            small[key] = _value(key, value)
    _fit_layers(small, data)
    _fit_heads(small, data)
    _fit_tokens(small)
    return small


def _value(key: str, value: Any) -> Any:
    if key in FIXED and value is not None and not isinstance(value, bool):
        return FIXED[key]
    if key == "vocab_size" and value is None:
        return VOCAB
    if type(value) is int and value > 0:
        sizes = (size for pattern, size in NUMBERS.items() if pattern.fullmatch(key))
        return min(next(sizes, value), value)
    if isinstance(value, Mapping) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}  # half a head
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return _numbers(key, value)
    return value


def _numbers(key: str, value: Sequence[int]) -> Sequence[int]:
    if key in WIDTHS_OF_STAGES:
        return [WIDTH // 2, *[WIDTH] * (len(value) - 1)]
    if key in DEPTHS_OF_STAGES:
        return [1] * len(value)
    if key in HEADS_OF_STAGES:
        return [min(n, 2) for n in value]
    if key in ("image_size", "patch_size"):
        return [IMAGE if key == "image_size" else PATCH] * len(value)
    return value


def _fit_layers(small: dict[str, Any], data: Mapping[str, Any]) -> None:
    """One layer of each kind that the model has, and two at least."""
    count = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in small), None)
    if count is None or not isinstance(data[count], int):
        return
    kinds = [data[k] for k in KINDS_OF_LAYERS if isinstance(data.get(k), (list, tuple))]
    firsts: dict[tuple[Any, ...], int] = {}
    if kinds and all(len(k) >= data[count] for k in kinds):
        for i, kind in enumerate(zip(*kinds, strict=False)):
            firsts.setdefault(kind, i)
    others = [i for i in range(data[count]) if i not in firsts.values()]
    wanted = sorted([*firsts.values(), *others[: max(LAYERS - len(firsts), 0)]])
    small[count] = len(wanted)
    for key, value in data.items():
        per_layer = isinstance(value, (list, tuple)) and PER_LAYER.fullmatch(key)
        if per_layer and len(value) >= data[count]:
            small[key] = [value[i] for i in wanted]


def _fit_heads(small: dict[str, Any], data: Mapping[str, Any]) -> None:
    """As many key-value heads as heads, or one, where the model's default is so."""
    for kv in (key for key in data if key.endswith("num_key_value_heads")):
        heads = kv.replace("key_value", "attention")
        if isinstance(data.get(heads), int) and data[kv] in (data[heads], 1):
            small[kv] = small[heads] if data[kv] == data[heads] else 1


def _fit_tokens(small: dict[str, Any]) -> None:
    """Special tokens get distinct small ids: what lies above the vocabulary cannot be looked up."""
    # Those of the outer config below those of the text model's own.
    free = VOCAB - 1 if "vocab_size" in small else VOCAB - 20
    for key, value in small.items():
        if TOKEN.fullmatch(key) and type(value) is int and value >= 10:
            small[key] = free
            free -= 1

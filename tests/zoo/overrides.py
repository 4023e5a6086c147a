"""What a name in a config does not tell: entries, classes and extra inputs of single model types.

Keys are dotted paths into the config. Each line is about what the model demands of its config, or
about a tower that would otherwise not run.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

_MINICPM = {"image_token_id": 100, "insert_layer_id": 0}
_ONE_TILE = {"image_grid_pinpoints": [[32, 32]]}
CONFIGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "bit": {"num_groups": 4},
    "cvt": {"embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 2]},
    "deepseek_v4": {"index_topk": 1},
    "deepseek_vl_hybrid": {"high_res_vision_config.output_channels": 16},
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}
        | {f"<|visual token {i:06d}|>": i for i in range(64)},
        "vq_config.codebook_size": 64,
        "vq_config.base_channels": 32,
        "vq_config.hidden_size": 128,
    },
    "fastspeech2_conformer": {
        "speech_decoder_postnet_units": 16,
        **{f"{kind}_predictor_channels": 16 for kind in ("pitch", "energy", "duration")},
        "vocab_size": 128,
    },
    **{name: {"image_size": 64} for name in ("glpn", "pvt", "pvt_v2", "segformer")},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "glmasr": {"audio_config.intermediate_size": 128},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        **{f"stage_{side}_channels": [16] * 4 for side in ("in", "out")},
    },
    "kosmos-2.5": {"latent_query_num": 4},
    "llama4": {"vision_config.intermediate_size": 128},
    **dict.fromkeys(["llava_next", "llava_next_video", "llava_onevision"], _ONE_TILE),
    **dict.fromkeys(["minicpm_ocr", "minicpmv4_6", "minicpmv4_7"], _MINICPM),
    "mllama": {"vision_config.vision_output_dim": 96},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32},
    "mobilevit": {"image_size": 128},
    **{name: {"depth_multiplier": 0.05} for name in ("mobilenet_v1", "mobilenet_v2")},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0],
        "vision_config.num_position_embeddings": 16,
    },
    "phi4_multimodal": {
        "audio_config.audio_token_id": 95,
        "audio_config.nemo_conv_channels": 16,
        "audio_config.ext_pw_out_channel": 32,
        "audio_config.depthwise_separable_out_channel": 32,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 98},
    "textnet": {"stem_out_channels": 16},
    "vits": {
        "vocab_size": 128,
        "upsample_initial_channel": 32,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "use_stochastic_duration_prediction": False,
    },
    "voxtral": {"audio_token_id": 100, "audio_config.intermediate_size": 128},
}

# A class in which every layer takes part: masked language models leave the pooler out, and so on.
CLASSES: dict[str, str] = {
    "big_bird": "BigBirdForPreTraining",
    "flava": "FlavaForPreTraining",
    "fnet": "FNetForPreTraining",
    "layoutlm": "LayoutLMModel",
    "squeezebert": "SqueezeBertModel",
}


def _short_speech(model: nn.Module) -> None:
    """Durations are exponentials of this layer's output: random ones would be hours long."""
    for parameter in model.duration_predictor.proj.parameters():
        parameter.zero_()


def _no_pictures_of_the_text_model(model: nn.Module) -> None:
    """This version reads `image_outputs` off the output of its text model, which has none."""
    model.language_model.register_forward_hook(
        lambda _module, _args, output: setattr(output, "image_outputs", None)
    )


AFTER: dict[str, Callable[[Any], None]] = {
    "llama4": _no_pictures_of_the_text_model,
    "vits": _short_speech,
}

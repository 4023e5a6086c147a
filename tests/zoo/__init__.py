"""The zoo: tiny instances of transformers' model types, and what each is held to.

`model_types.txt` is the list. `shrink` and `overrides` make small configs, `build` the models,
`inputs` their dummy inputs; `steps` holds a model to the invariants; `exceptions` says which models
cannot meet them, and why that is about the model.
"""

from pathlib import Path

MODEL_TYPES = tuple((Path(__file__).parent / "model_types.txt").read_text().split())

# Text, vision, audio, multimodal, mixture of experts (both layouts), state space, tied heads,
# Conv1D, encoder-decoder, weights that are read and not called: twenty for the ordinary tests.
# fmt: off
SAMPLE = (
    "bert", "clip", "convbert", "deepseek_v4", "gpt2", "gpt_oss", "jetmoe", "llama", "llama4_text",
    "mixtral", "nemotron_h", "qwen3_vl_moe", "resnet", "roc_bert", "siglip_vision_model", "t5",
    "vit", "wav2vec2", "wavlm", "whisper",
)
# fmt: on

"""Dummy inputs of a model, from the signature of its forward and its config.

A model says what it takes. Every main input that the signature names is made in the
shape that the config gives; the special tokens that stand for pictures or sounds are put into the
text as often as the model itself makes features of them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, TARGET_LENGTH, SAMPLES, FRAMES, GRID = 2, 12, 7, 1600, 128, 4
LOW, HIGH = 10, 90  # ids that are not special tokens: those are at both ends of the vocabulary


class Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.config: Any = model.config
        self.vision = getattr(self.config, "vision_config", None) or self.config
        self.takes = inspect.signature(model.forward).parameters
        self.tokens: dict[str, int] = {}  # that stand for features, where the config is silent
        self.counts: dict[str, int] = {}  # of features, where the model cannot be asked
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length: int, n: int | None = None) -> Tensor:
        shape = (BATCH, length) if n is None else (BATCH, length, n)
        return torch.randint(LOW, HIGH, shape, generator=self.generator)

    def main(self) -> dict[str, Any]:
        """The inputs that most models take, of those that this one takes."""
        inputs = {name: getattr(self, name)() for name in MAIN if name in self.takes}
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in self.takes and "input_features" in inputs:
                inputs[name] = torch.ones(BATCH, FRAMES, dtype=torch.long)
        if "image_grid_thw" in self.takes:
            inputs["pixel_values"] = self.patches()
            inputs["image_grid_thw"] = torch.tensor([[1, GRID, GRID]] * BATCH)
        return inputs

    # Each of these makes the argument of its name.

    def input_ids(self) -> Tensor:
        ids = self.ids(LENGTH)
        eos = find(self.config, "eos_token_id")
        if isinstance(eos, int):
            ids[:, -1] = eos
        return ids

    def decoder_input_ids(self) -> Tensor:
        return self.ids(TARGET_LENGTH)

    def pixel_values(self) -> Tensor:
        channels = find(self.vision, "num_channels", "in_channels", "in_chans", default=3)
        return self.randn(BATCH, channels, *self.picture())

    def picture(self) -> tuple[int, int]:
        size = find(self.vision, "image_size", default=32)
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def patches(self) -> Tensor:
        """Rows of flattened patches of a GRID x GRID picture each."""
        channels = find(self.vision, "num_channels", "in_channels", default=3)
        frames = getattr(self.vision, "temporal_patch_size", 1)
        width = channels * frames * self.vision.patch_size**2
        return self.randn(BATCH * GRID * GRID, width)

    def input_features(self) -> Tensor:
        mels = find(self.config, "num_mel_bins", "input_dim", "feature_size", default=80)
        return self.randn(BATCH, mels, FRAMES)

    def input_values(self) -> Tensor:
        return self.randn(BATCH, SAMPLES)


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the names that a config, or one inside it, has."""
    for name in names:
        for part in configs(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def configs(config: Any) -> Iterator[Any]:
    """Yield a config and all that lie in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from configs(value)


MAIN = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")


def dummy_inputs(model: nn.Module, model_type: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return keyword arguments for one call of `model`, or for several.

    Several where no single call runs every tower.
    """
    maker = Maker(model, seed)
    calls = []
    for special in SPECIAL.get(model_type, (_nothing,)):
        maker.tokens.clear()
        maker.counts.clear()
        inputs = maker.main()
        special(maker, inputs)
        if "input_ids" in inputs:
            _insert_features(maker, inputs)
        calls.append(inputs)
    return calls


FEATURES = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values"),
}


def _insert_features(maker: Maker, inputs: dict[str, Any]) -> None:
    """Put the tokens of pictures and sounds into the text, as many as there are features."""
    ids = inputs["input_ids"]
    for kind, sources in FEATURES.items():
        token = maker.tokens.get(kind) or find(
            maker.config, f"{kind}_token_id", f"{kind}_token_index"
        )
        if token is None or not (kind in maker.counts or any(name in inputs for name in sources)):
            continue
        count = maker.counts.get(kind) or _count_features(maker.model, kind, inputs)
        if count == 0:
            continue
        tokens = torch.full((BATCH, count), token)
        place = "audio" if kind == "audio" else "vision"
        start = find(maker.config, f"{place}_start_token_id")
        if start is not None:
            edges = (torch.full((BATCH, 1), edge) for edge in (start, LOW))
            tokens = torch.cat([next(edges), tokens, next(edges)], dim=1)
        inputs["input_ids"] = ids = torch.cat([ids[:, :2], tokens, ids[:, 2:]], dim=1)
        if kind == "image" and "mm_token_type_ids" in maker.takes:
            inputs["mm_token_type_ids"] = (ids == token).long()
    if "attention_mask" in maker.takes and len(inputs) > 1:
        inputs["attention_mask"] = torch.ones_like(ids)


def _count_features(model: nn.Module, kind: str, inputs: Mapping[str, Any]) -> int:
    """Return the number of features per row of the batch; 0 where they do not go into the text."""
    inner = model.model if hasattr(getattr(model, "model", None), f"get_{kind}_features") else model
    get = getattr(inner, f"get_{kind}_features", None)
    if get is None:
        return 0
    names = inspect.signature(inspect.unwrap(get)).parameters
    with torch.no_grad():
        found = get(**{name: value for name, value in inputs.items() if name in names})
    features = getattr(found, "pooler_output", None)
    if features is None:
        features = getattr(found, "last_hidden_state", found)
    parts = [features] if isinstance(features, Tensor) else features
    return sum(part.numel() // part.shape[-1] for part in parts) // BATCH


# ------------------------------------------------------------------ model types with their own ways

Special = Callable[[Maker, dict[str, Any]], None]


def _nothing(maker: Maker, inputs: dict[str, Any]) -> None:
    pass


def _one_tile(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:, None]


def _two_tiles(maker: Maker, inputs: dict[str, Any]) -> None:
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.stack([pixels, pixels.flip(0)], dim=1)
    inputs["image_sizes"] = torch.tensor([maker.picture()] * BATCH)


def _sizes(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["image_sizes"] = torch.tensor([maker.picture()] * BATCH)


def _granite_docling(maker: Maker, inputs: dict[str, Any]) -> None:
    _one_tile(maker, inputs)
    inputs["pixel_attention_mask"] = torch.ones(BATCH, 1, dtype=torch.bool)


def _granite_docling_fine(maker: Maker, inputs: dict[str, Any]) -> None:
    _granite_docling(maker, inputs)
    inputs["tile_fine_mask"] = torch.ones(BATCH, dtype=torch.bool)


def _deepseek_vl_hybrid(maker: Maker, inputs: dict[str, Any]) -> None:
    size = maker.config.high_res_vision_config.image_size
    inputs["high_res_pixel_values"] = maker.randn(BATCH, 3, size, size)


def _mllama(maker: Maker, inputs: dict[str, Any]) -> None:
    tiles = maker.config.vision_config.max_num_tiles
    inputs["pixel_values"] = maker.randn(BATCH, 1, tiles, 3, *maker.picture())
    inputs["aspect_ratio_ids"] = torch.ones(BATCH, 1, dtype=torch.long)
    inputs["aspect_ratio_mask"] = torch.ones(BATCH, 1, tiles, dtype=torch.long)
    inputs["cross_attention_mask"] = torch.ones(BATCH, LENGTH, 1, tiles, dtype=torch.long)


def _lfm2_vl(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = maker.patches().view(BATCH, GRID * GRID, -1)
    inputs["spatial_shapes"] = torch.tensor([[GRID, GRID]] * BATCH)
    inputs["pixel_attention_mask"] = torch.ones(BATCH, GRID * GRID, dtype=torch.long)


def _inkling2(maker: Maker, inputs: dict[str, Any]) -> None:
    side = maker.vision.patch_size * maker.vision.spatial_merge_size
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * BATCH)
    inputs["pixel_values"] = maker.randn(BATCH * 4, side, side, 3)


def _granite_speech(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["input_features"] = maker.randn(BATCH, 30, maker.config.encoder_config.input_dim)
    inputs.pop("input_features_mask")


def _video_llava(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["pixel_values_images"] = inputs["pixel_values"]


def _fuyu(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = maker.patches().view(BATCH, GRID * GRID, -1)


def _global(maker: Maker, inputs: dict[str, Any]) -> None:
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    inputs["global_attention_mask"] = mask


def _longer(maker: Maker, inputs: dict[str, Any]) -> None:
    """Enough tokens for every expert to get some."""
    inputs["input_ids"] = maker.ids(4 * LENGTH)
    inputs["decoder_input_ids"] = maker.ids(4 * LENGTH)


def _encoder_states(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"] = maker.randn(BATCH, 5, maker.config.hidden_size)


def _fun_asr_nano(maker: Maker, inputs: dict[str, Any]) -> None:
    audio = maker.config.audio_config
    inputs["input_features"] = maker.randn(BATCH, 16, audio.num_mel_bins * audio.num_stacked_frames)
    inputs["input_features_mask"] = torch.ones(BATCH, 16, dtype=torch.long)


def _moss(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["padding_mask"] = torch.ones(BATCH, SAMPLES, dtype=torch.long)


def _quarter_of_frames(maker: Maker, inputs: dict[str, Any]) -> None:
    maker.counts["audio"] = FRAMES // 4


def _omniasr(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["input_values"] = inputs["input_values"][:, None]


def _qwen3_audio(maker: Maker, inputs: dict[str, Any]) -> None:
    frames = 4 * maker.config.audio_config.n_window
    inputs["input_features"] = maker.randn(BATCH, maker.config.audio_config.num_mel_bins, frames)
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in inputs:
            inputs[name] = torch.ones(BATCH, frames, dtype=torch.long)


def _emu3(maker: Maker, inputs: dict[str, Any]) -> None:
    _sizes(maker, inputs)
    maker.tokens["image"] = 100


def _molmo2(maker: Maker, inputs: dict[str, Any]) -> None:
    vision = maker.config.vision_config
    inputs["pixel_values"] = maker.randn(
        BATCH, GRID * GRID, vision.num_channels * vision.patch_size**2
    )
    inputs["image_token_pooling"] = torch.arange(BATCH * GRID * GRID).view(-1, 4)
    inputs["image_grids"] = torch.tensor([[2, 2, 0, 0]] * BATCH)
    maker.tokens["image"] = maker.config.image_patch_id
    maker.counts["image"] = 4


def _video_llama_3(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["image_merge_sizes"] = torch.tensor([2] * BATCH)


def _video_llava_video(maker: Maker, inputs: dict[str, Any]) -> None:
    del inputs["pixel_values"]
    inputs["pixel_values_videos"] = maker.randn(BATCH, 2, 3, *maker.picture())


def _speech(maker: Maker, inputs: dict[str, Any]) -> None:
    """Text, a voice prompt, the start of the audio and what was spoken so far."""
    config = maker.config
    prompt, spoken = [config.audio_prompt_token_id] * 3, [config.audio_latent_token_id] * 4
    tail = torch.tensor([[*prompt, config.audio_bos_token_id, *spoken]] * BATCH)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
    inputs["audio_prompt_latents"] = maker.randn(
        BATCH, len(prompt), getattr(config, "audio_prompt_dim", config.latent_dim)
    )
    inputs["audio_latents"] = maker.randn(BATCH, len(spoken), config.latent_dim)


def _higgs(maker: Maker, inputs: dict[str, Any]) -> None:
    config = maker.config
    shape = (BATCH, 5, config.num_codebooks)
    inputs["audio_input_ids"] = torch.randint(1, 90, shape, generator=maker.generator)
    maker.counts["audio"] = 5


def _kosmos(maker: Maker, inputs: dict[str, Any]) -> None:
    width = maker.config.vision_config.patch_embed_hidden_size
    places = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1))
    pixels = maker.randn(BATCH, GRID * GRID, width)
    inputs["flattened_patches"] = torch.cat([places.expand(BATCH, -1, -1), pixels], dim=-1)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 2 : 2 + maker.config.latent_query_num] = 1
    inputs["image_embeds_position_mask"] = mask


def _minicpm(maker: Maker, inputs: dict[str, Any]) -> None:
    """All patches of all pictures in one row."""
    side = maker.vision.patch_size
    inputs["pixel_values"] = maker.randn(1, 3, side, side * GRID * GRID * BATCH)
    inputs["target_sizes"] = torch.tensor([[GRID, GRID]] * BATCH)


def _minicpm_merged(maker: Maker, inputs: dict[str, Any]) -> None:
    _minicpm(maker, inputs)
    inputs["downsample_mode"] = "16x"


def _phi4_sound(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["audio_input_features"] = maker.randn(
        BATCH, FRAMES, maker.config.audio_config.input_size
    )
    inputs["audio_embed_sizes"] = torch.tensor([FRAMES // 8] * BATCH)
    maker.tokens["audio"] = maker.config.audio_config.audio_token_id
    maker.counts["audio"] = FRAMES // 8


def _phi4_both(maker: Maker, inputs: dict[str, Any]) -> None:
    _phi4_sound(maker, inputs)
    inputs["image_pixel_values"] = maker.randn(BATCH, 2, 3, *maker.picture())
    inputs["image_sizes"] = torch.tensor([maker.picture()] * BATCH)
    inputs["image_attention_mask"] = torch.ones(BATCH, 2, GRID, GRID, dtype=torch.long)
    maker.tokens["image"] = maker.config.vision_config.image_token_id
    maker.counts["image"] = 13  # two crops of 2 x 2 with line ends, and a separator


def _flava(maker: Maker, inputs: dict[str, Any]) -> None:
    masked = torch.zeros(BATCH, GRID, GRID, dtype=torch.long)
    masked[:, 0] = 1
    inputs["input_ids_masked"] = inputs["input_ids"]
    inputs["bool_masked_pos"] = masked
    inputs["return_loss"] = False


def _flava_picture(maker: Maker, inputs: dict[str, Any]) -> None:
    _flava(maker, inputs)
    del inputs["input_ids"], inputs["input_ids_masked"]


def _flava_text(maker: Maker, inputs: dict[str, Any]) -> None:
    _flava(maker, inputs)
    del inputs["pixel_values"], inputs["bool_masked_pos"]


def _visual_bert(maker: Maker, inputs: dict[str, Any]) -> None:
    inputs["visual_embeds"] = maker.randn(BATCH, 5, maker.config.visual_embedding_dim)


SPECIAL: dict[str, tuple[Special, ...]] = {
    "deepseek_vl_hybrid": (_deepseek_vl_hybrid,),
    "emu3": (_emu3,),
    "flava": (_flava, _flava_picture, _flava_text),
    "fun_asr_nano": (_fun_asr_nano,),
    "fuyu": (_fuyu,),
    "gradium_phonon_tts": (_speech,),
    "granite_docling": (_granite_docling, _granite_docling_fine),
    "granite_speech": (_granite_speech,),
    "granite_speech_plus": (_granite_speech,),
    "higgs_audio_v2": (_higgs,),
    "idefics2": (_one_tile,),
    "idefics3": (_one_tile,),
    "inkling2": (_inkling2,),
    "inkling2_loop": (_inkling2,),
    "kosmos-2.5": (_kosmos,),
    "led": (_global,),
    "lfm2_vl": (_lfm2_vl,),
    "lighton_ocr": (_sizes,),
    "llava_next": (_two_tiles,),
    "llava_next_video": (_two_tiles,),
    "llava_onevision": (_two_tiles,),
    "longformer": (_global,),
    "minicpm_ocr": (_minicpm, _minicpm_merged),
    "minicpmv4_6": (_minicpm, _minicpm_merged),
    "minicpmv4_7": (_minicpm, _minicpm_merged),
    "mistral3": (_sizes,),
    "mllama": (_mllama,),
    "modernvbert": (_one_tile,),
    "molmo2": (_molmo2,),
    "moss_transcribe_diarize": (_moss,),
    "musicflamingo": (_quarter_of_frames,),
    "omniasr": (_omniasr,),
    "phi4_multimodal": (_phi4_both, _phi4_sound),
    "pocket_tts": (_speech,),
    "qwen2_audio": (_quarter_of_frames,),
    "qwen3_asr": (_qwen3_audio,),
    "qwen3_omni_moe_thinker": (_qwen3_audio,),
    "smolvlm": (_one_tile,),
    "switch_transformers": (_longer,),
    "trocr": (_encoder_states,),
    "ultravbert": (_one_tile,),
    "video_llama_3": (_video_llama_3,),
    "video_llava": (_video_llava, _video_llava_video),
    "visual_bert": (_visual_bert,),
}

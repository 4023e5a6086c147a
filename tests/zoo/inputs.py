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


Inputs = dict[str, Any]


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def each(*values: int) -> Tensor:
    """The same row for each of the batch."""
    return torch.tensor([values] * BATCH)


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
                inputs[name] = ones(BATCH, FRAMES)
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

    # Each of these gives what some model types take besides, and None for what they do not take.

    def one_tile(self, i: Inputs) -> Inputs:
        return {"pixel_values": i["pixel_values"][:, None]}

    def two_tiles(self, i: Inputs) -> Inputs:
        tiles = torch.stack([i["pixel_values"], i["pixel_values"].flip(0)], dim=1)
        return {"pixel_values": tiles, "image_sizes": each(*self.picture())}

    def sizes(self, i: Inputs) -> Inputs:
        return {"image_sizes": each(*self.picture())}

    def granite_docling(self, i: Inputs) -> Inputs:
        return self.one_tile(i) | {"pixel_attention_mask": ones(BATCH, 1).bool()}

    def mllama(self, i: Inputs) -> Inputs:
        tiles = self.config.vision_config.max_num_tiles
        return {
            "pixel_values": self.randn(BATCH, 1, tiles, 3, *self.picture()),
            "aspect_ratio_ids": ones(BATCH, 1),
            "aspect_ratio_mask": ones(BATCH, 1, tiles),
            "cross_attention_mask": ones(BATCH, LENGTH, 1, tiles),
        }

    def rows_of_patches(self, i: Inputs) -> Inputs:
        return {"pixel_values": self.patches().view(BATCH, GRID * GRID, -1)}

    def lfm2_vl(self, i: Inputs) -> Inputs:
        mask = ones(BATCH, GRID * GRID)
        further = {"spatial_shapes": each(GRID, GRID), "pixel_attention_mask": mask}
        return self.rows_of_patches(i) | further

    def inkling2(self, i: Inputs) -> Inputs:
        side = self.vision.patch_size * self.vision.spatial_merge_size
        grids = torch.tensor([[1, 2, 2]] * BATCH)
        return {"image_grid_thw": grids, "pixel_values": self.randn(BATCH * 4, side, side, 3)}

    def granite_speech(self, i: Inputs) -> Inputs:
        features = self.randn(BATCH, 30, self.config.encoder_config.input_dim)
        return {"input_features": features, "input_features_mask": None}

    def first_is_global(self, i: Inputs) -> Inputs:
        mask = torch.zeros_like(i["input_ids"])
        mask[:, 0] = 1
        return {"global_attention_mask": mask}

    def fun_asr_nano(self, i: Inputs) -> Inputs:
        audio = self.config.audio_config
        features = self.randn(BATCH, 16, audio.num_mel_bins * audio.num_stacked_frames)
        return {"input_features": features, "input_features_mask": ones(BATCH, 16)}

    def quarter_of_frames(self, i: Inputs) -> Inputs:
        self.counts["audio"] = FRAMES // 4
        return {}

    def qwen3_audio(self, i: Inputs) -> Inputs:
        audio = self.config.audio_config
        features = self.randn(BATCH, audio.num_mel_bins, 4 * audio.n_window)
        masks = {name for name in ("input_features_mask", "feature_attention_mask") if name in i}
        return {"input_features": features, **dict.fromkeys(masks, ones(BATCH, 4 * audio.n_window))}

    def emu3(self, i: Inputs) -> Inputs:
        self.tokens["image"] = 100
        return self.sizes(i)

    def molmo2(self, i: Inputs) -> Inputs:
        vision = self.config.vision_config
        self.tokens["image"], self.counts["image"] = self.config.image_patch_id, 4
        width = vision.num_channels * vision.patch_size**2
        return {
            "pixel_values": self.randn(BATCH, GRID * GRID, width),
            "image_token_pooling": torch.arange(BATCH * GRID * GRID).view(-1, 4),
            "image_grids": each(2, 2, 0, 0),
        }

    def video(self, i: Inputs) -> Inputs:
        return {
            "pixel_values": None,
            "pixel_values_videos": self.randn(BATCH, 2, 3, *self.picture()),
        }

    def speech(self, i: Inputs) -> Inputs:
        """Text, a voice prompt, the start of the audio and what was spoken so far."""
        config = self.config
        prompt, spoken = [config.audio_prompt_token_id] * 3, [config.audio_latent_token_id] * 4
        tail = each(*prompt, config.audio_bos_token_id, *spoken)
        width = getattr(config, "audio_prompt_dim", config.latent_dim)
        return {
            "input_ids": torch.cat([i["input_ids"], tail], dim=1),
            "audio_prompt_latents": self.randn(BATCH, len(prompt), width),
            "audio_latents": self.randn(BATCH, len(spoken), config.latent_dim),
        }

    def higgs(self, i: Inputs) -> Inputs:
        self.counts["audio"] = 5
        shape = (BATCH, 5, self.config.num_codebooks)
        return {"audio_input_ids": torch.randint(1, 90, shape, generator=self.generator)}

    def kosmos(self, i: Inputs) -> Inputs:
        width = self.config.vision_config.patch_embed_hidden_size
        places = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1))
        pixels = self.randn(BATCH, GRID * GRID, width)
        mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        mask[:, 2 : 2 + self.config.latent_query_num] = 1
        patches = torch.cat([places.expand(BATCH, -1, -1), pixels], dim=-1)
        return {"flattened_patches": patches, "image_embeds_position_mask": mask}

    def minicpm(self, i: Inputs) -> Inputs:
        """All patches of all pictures in one row."""
        side = self.vision.patch_size
        pixels = self.randn(1, 3, side, side * GRID * GRID * BATCH)
        sizes = each(GRID, GRID)
        return {"pixel_values": pixels, "target_sizes": sizes, "downsample_mode": "16x"}

    def phi4_sound(self, i: Inputs) -> Inputs:
        audio, frames = self.config.audio_config, FRAMES // 8
        self.tokens["audio"], self.counts["audio"] = audio.audio_token_id, frames
        features = self.randn(BATCH, FRAMES, audio.input_size)
        return {
            "audio_input_features": features,
            "audio_embed_sizes": torch.tensor([frames] * BATCH),
        }

    def phi4_both(self, i: Inputs) -> Inputs:
        self.tokens["image"] = self.config.vision_config.image_token_id
        self.counts["image"] = 13  # two crops of 2 x 2 with line ends, and a separator
        return self.phi4_sound(i) | {
            "image_pixel_values": self.randn(BATCH, 2, 3, *self.picture()),
            "image_sizes": each(*self.picture()),
            "image_attention_mask": ones(BATCH, 2, GRID, GRID),
        }

    def flava(self, i: Inputs) -> Inputs:
        masked = torch.zeros(BATCH, GRID, GRID, dtype=torch.long)
        masked[:, 0] = 1
        ids = i["input_ids"]
        return {"input_ids_masked": ids, "bool_masked_pos": masked, "return_loss": False}

    def flava_picture(self, i: Inputs) -> Inputs:
        return self.flava(i) | {"input_ids": None, "input_ids_masked": None}

    def flava_text(self, i: Inputs) -> Inputs:
        return self.flava(i) | {"pixel_values": None, "bool_masked_pos": None}

    def high_resolution(self, i: Inputs) -> Inputs:
        size = self.config.high_res_vision_config.image_size
        return {"high_res_pixel_values": self.randn(BATCH, 3, size, size)}

    def longer(self, i: Inputs) -> Inputs:
        """Enough tokens for every expert to get some."""
        return {"input_ids": self.ids(4 * LENGTH), "decoder_input_ids": self.ids(4 * LENGTH)}


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
    for further in FURTHER.get(model_type, (lambda *_: {},)):
        maker.tokens.clear()
        maker.counts.clear()
        inputs = maker.main()
        inputs |= further(maker, inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
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


# By model type: one call for each of these.
FURTHER: dict[str, tuple[Callable[[Maker, Inputs], Inputs], ...]] = {
    **dict.fromkeys(
        ["idefics2", "idefics3", "modernvbert", "smolvlm", "ultravbert"], (Maker.one_tile,)
    ),
    **dict.fromkeys(["llava_next", "llava_next_video", "llava_onevision"], (Maker.two_tiles,)),
    **dict.fromkeys(["minicpm_ocr", "minicpmv4_6", "minicpmv4_7"], (Maker.minicpm,)),
    **dict.fromkeys(["granite_speech", "granite_speech_plus"], (Maker.granite_speech,)),
    **dict.fromkeys(["gradium_phonon_tts", "pocket_tts"], (Maker.speech,)),
    **dict.fromkeys(["inkling2", "inkling2_loop"], (Maker.inkling2,)),
    **dict.fromkeys(["led", "longformer"], (Maker.first_is_global,)),
    **dict.fromkeys(["lighton_ocr", "mistral3"], (Maker.sizes,)),
    **dict.fromkeys(["musicflamingo", "qwen2_audio"], (Maker.quarter_of_frames,)),
    "deepseek_vl_hybrid": (Maker.high_resolution,),
    "emu3": (Maker.emu3,),
    "flava": (Maker.flava, Maker.flava_picture, Maker.flava_text),
    "fun_asr_nano": (Maker.fun_asr_nano,),
    "fuyu": (Maker.rows_of_patches,),
    "granite_docling": (
        Maker.granite_docling,
        lambda m, i: m.granite_docling(i) | {"tile_fine_mask": ones(BATCH).bool()},
    ),
    "higgs_audio_v2": (Maker.higgs,),
    "kosmos-2.5": (Maker.kosmos,),
    "lfm2_vl": (Maker.lfm2_vl,),
    "mllama": (Maker.mllama,),
    "molmo2": (Maker.molmo2,),
    "moss_transcribe_diarize": (lambda m, i: {"padding_mask": ones(BATCH, SAMPLES)},),
    "omniasr": (lambda m, i: {"input_values": i["input_values"][:, None]},),
    "phi4_multimodal": (Maker.phi4_both, Maker.phi4_sound),
    "qwen3_asr": (Maker.qwen3_audio,),
    "switch_transformers": (Maker.longer,),
    "trocr": (lambda m, i: {"encoder_hidden_states": m.randn(BATCH, 5, m.config.hidden_size)},),
    "video_llama_3": (lambda m, i: {"image_merge_sizes": torch.tensor([2] * BATCH)},),
    "video_llava": (lambda m, i: {"pixel_values_images": i["pixel_values"]}, Maker.video),
    "visual_bert": (
        lambda m, i: {"visual_embeds": m.randn(BATCH, 5, m.config.visual_embedding_dim)},
    ),
}

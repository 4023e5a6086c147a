"""Dummy inputs of a model, from the signature of its forward and its config.

Every main input that the signature names is made in the shape that the config gives; the special
tokens of pictures or sounds are put into the text as often as the model makes features of them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, TARGET_LENGTH, SAMPLES, FRAMES, GRID = 2, 12, 7, 1600, 128, 4
LOW, HIGH = 10, 90  # ids that are not special tokens: those are at both ends of the vocabulary

Inputs = dict[str, Any]


def dummy_inputs(model: nn.Module, model_type: str, seed: int = 0) -> list[Inputs]:
    """Return keyword arguments for one call of `model`, or for all that run every tower."""
    maker = Maker(model, seed)
    first = FURTHER.get(LIKE.get(model_type, model_type), lambda _: {})
    return [maker.call(further) for further in (first, *AGAIN.get(model_type, ()))]


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def each(*values: int) -> Tensor:
    """The same row for each of the batch."""
    return torch.tensor([values] * BATCH)


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the names that a config, or one inside it, has."""
    values = (getattr(part, name, None) for name in names for part in configs(config))
    return next((value for value in values if value is not None), default)


def configs(config: Any) -> Iterator[Any]:
    """Yield a config and all that lie in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from configs(value)


class Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.config: Any = model.config
        self.vision = getattr(self.config, "vision_config", None) or self.config
        self.audio = getattr(self.config, "audio_config", None)
        size = find(self.vision, "image_size", default=32)
        self.picture = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        self.channels = find(self.vision, "num_channels", "in_channels", "in_chans", default=3)
        self.takes = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(seed)
        self.main: Inputs = {}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, *shape: int, low: int = LOW) -> Tensor:
        return torch.randint(low, HIGH, (BATCH, *shape), generator=self.generator)

    def text(self) -> Tensor:
        ids = self.ids(LENGTH)
        eos = find(self.config, "eos_token_id")
        if isinstance(eos, int):
            ids[:, -1] = eos
        return ids

    def features(self) -> Tensor:
        mels = find(self.config, "num_mel_bins", "input_dim", "feature_size", default=80)
        return self.randn(BATCH, mels, FRAMES)

    def patches(self) -> Tensor:
        """Rows of flattened patches of a GRID x GRID picture each."""
        frames = getattr(self.vision, "temporal_patch_size", 1)
        width = self.channels * frames * self.vision.patch_size**2
        return self.randn(BATCH * GRID * GRID, width)

    def rows_of_patches(self) -> Tensor:
        return self.patches().view(BATCH, GRID * GRID, -1)

    def call(self, further: "Call") -> Inputs:
        """The inputs that most models take, of those that this one takes, and further ones."""
        self.main = {name: make(self) for name, make in MAIN.items() if name in self.takes}
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in self.takes and "input_features" in self.main:
                self.main[name] = ones(BATCH, FRAMES)
        if "image_grid_thw" in self.takes:
            self.main |= {"pixel_values": self.patches(), "image_grid_thw": each(1, GRID, GRID)}
        inputs = self.main | further(self)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "input_ids" in inputs:
            self.insert_features(inputs)
        return inputs

    def insert_features(self, inputs: Inputs) -> None:
        """Put the tokens of pictures and sounds into the text, as many as there are features."""
        for kind, sources in FEATURES.items():
            told, count = inputs.pop(kind, (None, None))
            token = told or find(self.config, f"{kind}_token_id", f"{kind}_token_index")
            if token is None or not any(name in inputs for name in sources):
                continue
            count = count or count_features(self.model, kind, inputs)
            if count == 0:
                continue
            tokens = [token] * count
            place = "audio" if kind == "audio" else "vision"
            start = find(self.config, f"{place}_start_token_id")
            if start is not None:
                tokens = [start, *tokens, LOW]
            ids = inputs["input_ids"]
            ids = torch.cat([ids[:, :2], each(*tokens), ids[:, 2:]], dim=1)
            inputs["input_ids"] = ids
            if kind == "image" and "mm_token_type_ids" in self.takes:
                inputs["mm_token_type_ids"] = (ids == token).long()
        if "attention_mask" in self.takes and len(inputs) > 1:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def count_features(model: nn.Module, kind: str, inputs: Mapping[str, Any]) -> int:
    """Return the number of features per row of the batch; 0 where they do not go into the text."""
    name = f"get_{kind}_features"
    inner = getattr(model, "model", None)
    get = getattr(inner, name, None) or getattr(model, name, None)
    if get is None:
        return 0
    names = inspect.signature(inspect.unwrap(get)).parameters
    with torch.no_grad():
        made = get(**{name: value for name, value in inputs.items() if name in names})
    features = getattr(made, "pooler_output", None)
    if features is None:
        features = getattr(made, "last_hidden_state", made)
    parts = [features] if isinstance(features, Tensor) else features
    return sum(part.numel() // part.shape[-1] for part in parts) // BATCH


Call = Callable[[Maker], Inputs]
MAIN: dict[str, Callable[[Maker], Tensor]] = {
    "input_ids": Maker.text,
    "pixel_values": lambda m: m.randn(BATCH, m.channels, *m.picture),
    "input_features": Maker.features,
    "input_values": lambda m: m.randn(BATCH, SAMPLES),
    "decoder_input_ids": lambda m: m.ids(TARGET_LENGTH),
}
# What puts tokens of a kind into the text.
FEATURES = {
    "image": ("pixel_values", "image_pixel_values"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values", "audio_input_features", "audio_input_ids"),
}

# ------------------------------------------------------------- what some model types take besides
# None for what they do not take; under "image" and "audio" the token that stands for features where
# the config is silent, and the number of features where the model cannot be asked.


def one_tile(m: Maker) -> Inputs:
    return {"pixel_values": m.main["pixel_values"][:, None]}


def granite_docling(m: Maker) -> Inputs:
    return one_tile(m) | {"pixel_attention_mask": ones(BATCH, 1).bool()}


def speech(m: Maker) -> Inputs:
    """Text, a voice prompt, the start of the audio and what was spoken so far."""
    config = m.config
    prompt, spoken = [config.audio_prompt_token_id] * 3, [config.audio_latent_token_id] * 4
    tail = each(*prompt, config.audio_bos_token_id, *spoken)
    width = getattr(config, "audio_prompt_dim", config.latent_dim)
    return {
        "input_ids": torch.cat([m.main["input_ids"], tail], dim=1),
        "audio_prompt_latents": m.randn(BATCH, len(prompt), width),
        "audio_latents": m.randn(BATCH, len(spoken), config.latent_dim),
    }


def kosmos(m: Maker) -> Inputs:
    places = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1))
    pixels = m.randn(BATCH, GRID * GRID, m.vision.patch_embed_hidden_size)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 2 : 2 + m.config.latent_query_num] = 1
    patches = torch.cat([places.expand(BATCH, -1, -1), pixels], dim=-1)
    return {"flattened_patches": patches, "image_embeds_position_mask": mask}


def phi4_sound(m: Maker) -> Inputs:
    frames = FRAMES // 8
    return {
        "audio_input_features": m.randn(BATCH, FRAMES, m.audio.input_size),
        "audio_embed_sizes": torch.tensor([frames] * BATCH),
        "audio": (m.audio.audio_token_id, frames),
    }


def flava(m: Maker) -> Inputs:
    masked = torch.zeros(BATCH, GRID, GRID, dtype=torch.long)
    masked[:, 0] = 1
    ids = m.main["input_ids"]
    return {"input_ids_masked": ids, "bool_masked_pos": masked, "return_loss": False}


FURTHER: dict[str, Call] = {
    **dict.fromkeys(["gradium_phonon_tts", "pocket_tts"], speech),
    **dict.fromkeys(["idefics2", "idefics3", "modernvbert", "smolvlm", "ultravbert"], one_tile),
    "deepseek_vl_hybrid": lambda m: {
        "high_res_pixel_values": m.randn(
            BATCH, 3, *[m.config.high_res_vision_config.image_size] * 2
        )
    },
    "emu3": lambda m: {"image_sizes": each(*m.picture), "image": (100, None)},
    "flava": flava,
    "fun_asr_nano": lambda m: {
        "input_features": m.randn(BATCH, 16, m.audio.num_mel_bins * m.audio.num_stacked_frames),
        "input_features_mask": ones(BATCH, 16),
    },
    "fuyu": lambda m: {"pixel_values": m.rows_of_patches()},
    "granite_docling": granite_docling,
    "granite_speech": lambda m: {
        "input_features": m.randn(BATCH, 30, m.config.encoder_config.input_dim),
        "input_features_mask": None,
    },
    "higgs_audio_v2": lambda m: {
        "audio_input_ids": m.ids(5, m.config.num_codebooks, low=1),
        "audio": (None, 5),
    },
    "inkling2": lambda m: {
        "pixel_values": m.randn(
            BATCH * 4, *[m.vision.patch_size * m.vision.spatial_merge_size] * 2, 3
        ),
        "image_grid_thw": each(1, 2, 2),
    },
    "kosmos-2.5": kosmos,
    "led": lambda _: {"global_attention_mask": each(1, *[0] * (LENGTH - 1))},
    "lfm2_vl": lambda m: {
        "pixel_values": m.rows_of_patches(),
        "pixel_attention_mask": ones(BATCH, GRID * GRID),
        "spatial_shapes": each(GRID, GRID),
    },
    "llava_next": lambda m: {
        "pixel_values": torch.stack(
            [m.main["pixel_values"], m.main["pixel_values"].flip(0)], dim=1
        ),
        "image_sizes": each(*m.picture),
    },
    # All patches of all pictures in one row.
    "minicpm_ocr": lambda m: {
        "pixel_values": m.randn(
            1, 3, m.vision.patch_size, m.vision.patch_size * GRID * GRID * BATCH
        ),
        "target_sizes": each(GRID, GRID),
        "downsample_mode": "16x",
    },
    "mistral3": lambda m: {"image_sizes": each(*m.picture)},
    "mllama": lambda m: {
        "pixel_values": m.randn(BATCH, 1, m.vision.max_num_tiles, 3, *m.picture),
        "aspect_ratio_ids": ones(BATCH, 1),
        "aspect_ratio_mask": ones(BATCH, 1, m.vision.max_num_tiles),
        "cross_attention_mask": ones(BATCH, LENGTH, 1, m.vision.max_num_tiles),
    },
    "molmo2": lambda m: {
        "pixel_values": m.randn(BATCH, GRID * GRID, m.vision.num_channels * m.vision.patch_size**2),
        "image_token_pooling": torch.arange(BATCH * GRID * GRID).view(-1, 4),
        "image_grids": each(2, 2, 0, 0),
        "image": (m.config.image_patch_id, 4),
    },
    "moss_transcribe_diarize": lambda _: {"padding_mask": ones(BATCH, SAMPLES)},
    "omniasr": lambda m: {"input_values": m.main["input_values"][:, None]},
    "phi4_multimodal": lambda m: {
        **phi4_sound(m),
        "image_pixel_values": m.randn(BATCH, 2, 3, *m.picture),
        "image_sizes": each(*m.picture),
        "image_attention_mask": ones(BATCH, 2, GRID, GRID),
        # two crops of 2 x 2 with line ends, and a separator
        "image": (m.vision.image_token_id, 13),
    },
    "qwen2_audio": lambda _: {"audio": (None, FRAMES // 4)},
    "qwen3_asr": lambda m: {
        "input_features": m.randn(BATCH, m.audio.num_mel_bins, 4 * m.audio.n_window),
        **{name: ones(BATCH, 4 * m.audio.n_window) for name in m.main if name.endswith("mask")},
    },
    # Enough tokens for every expert to get some.
    "switch_transformers": lambda m: {
        name: m.ids(4 * LENGTH) for name in ("input_ids", "decoder_input_ids")
    },
    "trocr": lambda m: {"encoder_hidden_states": m.randn(BATCH, 5, m.config.hidden_size)},
    "video_llama_3": lambda _: {"image_merge_sizes": torch.tensor([2] * BATCH)},
    "video_llava": lambda m: {"pixel_values_images": m.main["pixel_values"]},
    "visual_bert": lambda m: {"visual_embeds": m.randn(BATCH, 5, m.config.visual_embedding_dim)},
}
LIKE = {
    "granite_speech_plus": "granite_speech",
    "inkling2_loop": "inkling2",
    "lighton_ocr": "mistral3",
    "llava_next_video": "llava_next",
    "llava_onevision": "llava_next",
    "longformer": "led",
    "minicpmv4_6": "minicpm_ocr",
    "minicpmv4_7": "minicpm_ocr",
    "musicflamingo": "qwen2_audio",
}
# Further calls, for towers that the first one leaves out.
AGAIN: dict[str, tuple[Call, ...]] = {
    "flava": (
        lambda m: flava(m) | {"input_ids": None, "input_ids_masked": None},
        lambda m: flava(m) | {"pixel_values": None, "bool_masked_pos": None},
    ),
    "granite_docling": (lambda m: granite_docling(m) | {"tile_fine_mask": ones(BATCH).bool()},),
    "phi4_multimodal": (phi4_sound,),
    "video_llava": (
        lambda m: {"pixel_values": None, "pixel_values_videos": m.randn(BATCH, 2, 3, *m.picture)},
    ),
}

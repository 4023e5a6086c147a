"""Modules of transformers with a method that reads a parameter of their own, built by themselves.

No forward of a tiny model calls these methods, or the parameter is there with one setting only.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.build import randomise, tiny_config

BATCH, ENCODING = 2, "interpolate_pos_encoding"


class Part(NamedTuple):
    """A class of the file beside its config's, one of its methods, and how both are called."""

    cls: str
    method: str
    config: str  # model type, and the part of its config
    arguments: Callable[[Any], dict[str, Any]]  # of the method, for the module
    true: str = ""  # an entry of the config that is True
    further: tuple[Any, ...] = ()  # arguments of the class

    def build(self) -> nn.Module:
        """Return the module with random values."""
        model_type, _, part = self.config.partition("/")
        config = getattr(tiny_config(model_type), part) if part else tiny_config(model_type)
        if self.true:
            setattr(config, self.true, True)
        path = type(config).__module__.replace("configuration", "modeling")
        torch.manual_seed(0)
        module: nn.Module = getattr(import_module(path), self.cls)(config, *self.further)
        with torch.no_grad():
            for parameter in module.parameters():  # some are empty until a whole model fills them
                parameter.zero_()
        randomise(module, 0)
        return module.eval().requires_grad_(False)


def read_by(module: nn.Module, method: str) -> list[str]:
    """Return the parameters of a module that one of its methods names."""
    names = inspect.unwrap(getattr(type(module), method)).__code__.co_names
    return [name for name in module._parameters if name in names]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def larger(module: Any) -> dict[str, Any]:
    """Embeddings of a picture that is higher and wider than those of training."""
    (name,) = read_by(module, ENCODING)
    return {"embeddings": randn(1, *module._parameters[name].shape[-2:]), "height": 64, "width": 64}


def sides(n: int) -> Callable[[Any], dict[str, Any]]:
    return lambda _: {"height": n, "width": n}


def resampled(side: int) -> Callable[[Any], dict[str, Any]]:
    return lambda m: {
        "hidden_states": randn(1, m.config.perceiver_resampler_hidden_size, *[side] * 2)
    }


POSITIONS, ABSOLUTE = "use_absolute_position_embeddings", "use_absolute_embeddings"
TAM = "EdgeTamVideoPerceiverResampler"
PARTS = (
    Part("BeitEmbeddings", ENCODING, "beit", larger, POSITIONS),
    Part("Data2VecVisionEmbeddings", ENCODING, "data2vec-vision", larger, POSITIONS),
    Part("DeepseekOcr2SamVisionEncoder", ENCODING, "deepseek_ocr2_sam_vision_model", sides(64)),
    Part("DonutSwinEmbeddings", ENCODING, "donut-swin", larger, ABSOLUTE),
    Part(TAM, "_forward_1d", "edgetam_video", resampled(4)),
    Part(TAM, "_forward_2d", "edgetam_video", resampled(64)),
    Part("FlavaImageEmbeddings", ENCODING, "flava/image_config", larger),
    Part(
        "Gemma4VisionPatchEmbedder",
        "_position_embeddings",
        "gemma4_vision",
        lambda _: {
            "pixel_position_ids": torch.tensor([[[0, 1], [1, 0], [-1, -1]]]),
            "padding_positions": torch.tensor([[False, False, True]]),
        },
    ),
    Part("GroupViTVisionEmbeddings", ENCODING, "groupvit/vision_config", larger),
    Part("InstructBlipVisionEmbeddings", ENCODING, "instructblip/vision_config", larger),
    Part("InstructBlipVideoVisionEmbeddings", ENCODING, "instructblipvideo/vision_config", larger),
    Part(
        "LayoutLMv2SelfAttention",
        "compute_qkv",
        "layoutlmv2",
        lambda m: {"hidden_states": randn(BATCH, 3, m.qkv_linear.in_features)},
        "fast_qkv",
    ),
    Part(
        "LayoutLMv3Model",
        "forward_image",
        "layoutlmv3",
        lambda m: {"pixel_values": randn(1, 3, m.config.input_size, m.config.input_size)},
    ),
    Part("MaskFormerSwinEmbeddings", ENCODING, "maskformer-swin", larger, ABSOLUTE),
    Part("Sam2HieraDetModel", "_get_pos_embed", "sam2_hiera_det_model", lambda _: {"hw": (16, 16)}),
    Part("SegGptEmbeddings", ENCODING, "seggpt", sides(6)),
    Part("SwinEmbeddings", ENCODING, "swin", larger, ABSOLUTE),
    Part("Swinv2Embeddings", ENCODING, "swinv2", larger, ABSOLUTE),
    Part(
        "TimesFmAttention",
        "_scale_query",
        "timesfm",
        lambda m: {"query": randn(BATCH, 3, len(m.scaling))},
        further=(0,),
    ),
    Part("UnlimitedOcrSamVisionEncoder", ENCODING, "unlimited_ocr_sam_vision_model", sides(64)),
    Part("VideoPrismSpatialEmbeddings", ENCODING, "videoprism_vision_model", larger),
    Part(
        "VideoPrismTemporalEmbeddings",
        ENCODING,
        "videoprism_vision_model",
        lambda m: {"embeddings": randn(1, 2 * len(m.position_embeddings[0]), 1)},
    ),
    Part("VivitEmbeddings", ENCODING, "vivit", larger),
    Part(
        "Wav2Vec2BertModel",
        "_mask_hidden_states",
        "wav2vec2-bert",
        lambda m: {
            "hidden_states": randn(BATCH, 4, m.config.hidden_size),
            "mask_time_indices": torch.ones(BATCH, 4).bool(),
        },
    ),
)

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
    """A class of the file beside its config's, and one of its methods."""

    cls: str
    method: str
    config: str  # model type, and the part of its config
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

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """Return what the method is called with."""
        return (ARGUMENTS.get(self.cls) or ARGUMENTS[self.method])(module)


def read_by(module: nn.Module, method: str) -> list[str]:
    """Return the parameters of a module that one of its methods names."""
    names = inspect.unwrap(getattr(type(module), method)).__code__.co_names
    return [name for name in module._parameters if name in names]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def larger(module: Any) -> dict[str, Any]:
    """Embeddings of a picture that is higher and wider than those of training."""
    (name,) = read_by(module, ENCODING)
    return {"embeddings": randn(1, *module._parameters[name].shape[-2:]), **sides(64)}


def sides(n: int) -> dict[str, Any]:
    return {"height": n, "width": n}


def resampled(module: Any, side: int) -> dict[str, Any]:
    return {"hidden_states": randn(1, module.config.perceiver_resampler_hidden_size, *[side] * 2)}


# By method, or by class where several have it.
ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    ENCODING: larger,
    "DeepseekOcr2SamVisionEncoder": lambda _: sides(64),
    "SegGptEmbeddings": lambda _: sides(6),
    "UnlimitedOcrSamVisionEncoder": lambda _: sides(64),
    "VideoPrismTemporalEmbeddings": lambda m: {
        "embeddings": randn(1, 2 * len(m.position_embeddings[0]), 1)
    },
    "_forward_1d": lambda m: resampled(m, 4),
    "_forward_2d": lambda m: resampled(m, 64),
    "_get_pos_embed": lambda _: {"hw": (16, 16)},
    "_mask_hidden_states": lambda m: {
        "hidden_states": randn(BATCH, 4, m.config.hidden_size),
        "mask_time_indices": torch.ones(BATCH, 4).bool(),
    },
    "_position_embeddings": lambda _: {
        "pixel_position_ids": torch.tensor([[[0, 1], [1, 0], [-1, -1]]]),
        "padding_positions": torch.tensor([[False, False, True]]),
    },
    "_scale_query": lambda m: {"query": randn(BATCH, 3, len(m.scaling))},
    "compute_qkv": lambda m: {"hidden_states": randn(BATCH, 3, m.qkv_linear.in_features)},
    "forward_image": lambda m: {"pixel_values": randn(1, 3, *[m.config.input_size] * 2)},
}
POSITIONS, ABSOLUTE = "use_absolute_position_embeddings", "use_absolute_embeddings"
PARTS = (
    Part("BeitEmbeddings", ENCODING, "beit", POSITIONS),
    Part("Data2VecVisionEmbeddings", ENCODING, "data2vec-vision", POSITIONS),
    Part("DeepseekOcr2SamVisionEncoder", ENCODING, "deepseek_ocr2_sam_vision_model"),
    Part("DonutSwinEmbeddings", ENCODING, "donut-swin", ABSOLUTE),
    Part("EdgeTamVideoPerceiverResampler", "_forward_1d", "edgetam_video"),
    Part("EdgeTamVideoPerceiverResampler", "_forward_2d", "edgetam_video"),
    Part("FlavaImageEmbeddings", ENCODING, "flava/image_config"),
    Part("Gemma4VisionPatchEmbedder", "_position_embeddings", "gemma4_vision"),
    Part("GroupViTVisionEmbeddings", ENCODING, "groupvit/vision_config"),
    Part("InstructBlipVisionEmbeddings", ENCODING, "instructblip/vision_config"),
    Part("InstructBlipVideoVisionEmbeddings", ENCODING, "instructblipvideo/vision_config"),
    Part("LayoutLMv2SelfAttention", "compute_qkv", "layoutlmv2", "fast_qkv"),
    Part("LayoutLMv3Model", "forward_image", "layoutlmv3"),
    Part("MaskFormerSwinEmbeddings", ENCODING, "maskformer-swin", ABSOLUTE),
    Part("Sam2HieraDetModel", "_get_pos_embed", "sam2_hiera_det_model"),
    Part("SegGptEmbeddings", ENCODING, "seggpt"),
    Part("SwinEmbeddings", ENCODING, "swin", ABSOLUTE),
    Part("Swinv2Embeddings", ENCODING, "swinv2", ABSOLUTE),
    Part("TimesFmAttention", "_scale_query", "timesfm", further=(0,)),
    Part("UnlimitedOcrSamVisionEncoder", ENCODING, "unlimited_ocr_sam_vision_model"),
    Part("VideoPrismSpatialEmbeddings", ENCODING, "videoprism_vision_model"),
    Part("VideoPrismTemporalEmbeddings", ENCODING, "videoprism_vision_model"),
    Part("VivitEmbeddings", ENCODING, "vivit"),
    Part("Wav2Vec2BertModel", "_mask_hidden_states", "wav2vec2-bert"),
)

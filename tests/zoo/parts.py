"""Modules of transformers with a method that reads a parameter of their own, built by themselves.

No forward of a tiny model calls these methods, or the parameter is there with one setting only.
What cannot be called stands in `REASONS`; `families` finds all that there are in the sources.
"""

import ast
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.build import randomise, tiny_config

BATCH, ENCODING = 2, "interpolate_pos_encoding"


class Part(NamedTuple):
    """A module, one of its methods, and how it is called.

    Attributes:
        module: `FAMILY/FILE:CLASS` below transformers' models.
        method: The method.
        config: Returns the config that the class takes.
        arguments: Returns the method's arguments, for the module.
    """

    module: str
    method: str
    config: Callable[[], Any]
    arguments: Callable[[Any], dict[str, Any]]

    def build(self) -> nn.Module:
        """Return the module with random values."""
        path, _, name = self.module.partition(":")
        cls = getattr(import_module(f"transformers.models.{path.replace('/', '.')}"), name)
        config = self.config()
        torch.manual_seed(0)
        module: nn.Module = cls(*config) if isinstance(config, tuple) else cls(config)
        with torch.no_grad():
            for parameter in module.parameters():  # some are empty until a whole model fills them
                parameter.zero_()
        randomise(module, 0)
        return module.eval().requires_grad_(False)


def read_by(module: nn.Module, method: str) -> list[str]:
    """Return the parameters of a module that one of its methods names."""
    names = inspect.unwrap(getattr(type(module), method)).__code__.co_names
    return [name for name in module._parameters if name in names]


def setting(model_type: str, part: str = "", **values: Any) -> Callable[[], Any]:
    """Return what makes a tiny config, or one inside it, with some settings."""

    def make() -> Any:
        config = tiny_config(model_type)
        config = getattr(config, part) if part else config
        for name, value in values.items():
            setattr(config, name, value)
        return config

    return make


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def larger(module: Any) -> dict[str, Any]:
    """Embeddings of a picture that is higher and wider than those of training."""
    (name,) = read_by(module, ENCODING)
    return {"embeddings": randn(1, *module._parameters[name].shape[-2:]), "height": 64, "width": 64}


def sides(n: int) -> Callable[[Any], dict[str, Any]]:
    return lambda _: {"height": n, "width": n}


ABSOLUTE = {"use_absolute_embeddings": True}
PARTS = (
    Part(
        "beit/modeling_beit:BeitEmbeddings",
        ENCODING,
        setting("beit", use_absolute_position_embeddings=True),
        larger,
    ),
    Part(
        "data2vec/modeling_data2vec_vision:Data2VecVisionEmbeddings",
        ENCODING,
        setting("data2vec-vision", use_absolute_position_embeddings=True),
        larger,
    ),
    Part(
        "deepseek_ocr2/modeling_deepseek_ocr2:DeepseekOcr2SamVisionEncoder",
        ENCODING,
        setting("deepseek_ocr2_sam_vision_model"),
        sides(64),
    ),
    Part(
        "donut/modeling_donut_swin:DonutSwinEmbeddings",
        ENCODING,
        setting("donut-swin", **ABSOLUTE),
        larger,
    ),
    Part(
        "edgetam_video/modeling_edgetam_video:EdgeTamVideoPerceiverResampler",
        "_forward_1d",
        setting("edgetam_video"),
        lambda m: {"hidden_states": randn(1, m.config.perceiver_resampler_hidden_size, 4, 4)},
    ),
    Part(
        "edgetam_video/modeling_edgetam_video:EdgeTamVideoPerceiverResampler",
        "_forward_2d",
        setting("edgetam_video"),
        lambda m: {"hidden_states": randn(1, m.config.perceiver_resampler_hidden_size, 64, 64)},
    ),
    Part(
        "flava/modeling_flava:FlavaImageEmbeddings",
        ENCODING,
        setting("flava", "image_config"),
        larger,
    ),
    Part(
        "gemma4/modeling_gemma4:Gemma4VisionPatchEmbedder",
        "_position_embeddings",
        setting("gemma4_vision"),
        lambda _: {
            "pixel_position_ids": torch.tensor([[[0, 1], [1, 0], [-1, -1]]]),
            "padding_positions": torch.tensor([[False, False, True]]),
        },
    ),
    Part(
        "groupvit/modeling_groupvit:GroupViTVisionEmbeddings",
        ENCODING,
        setting("groupvit", "vision_config"),
        larger,
    ),
    Part(
        "instructblip/modeling_instructblip:InstructBlipVisionEmbeddings",
        ENCODING,
        setting("instructblip", "vision_config"),
        larger,
    ),
    Part(
        "instructblipvideo/modeling_instructblipvideo:InstructBlipVideoVisionEmbeddings",
        ENCODING,
        setting("instructblipvideo", "vision_config"),
        larger,
    ),
    Part(
        "layoutlmv2/modeling_layoutlmv2:LayoutLMv2SelfAttention",
        "compute_qkv",
        setting("layoutlmv2", fast_qkv=True),
        lambda m: {"hidden_states": randn(BATCH, 3, m.qkv_linear.in_features)},
    ),
    Part(
        "layoutlmv3/modeling_layoutlmv3:LayoutLMv3Model",
        "forward_image",
        setting("layoutlmv3"),
        lambda m: {"pixel_values": randn(1, 3, m.config.input_size, m.config.input_size)},
    ),
    Part(
        "maskformer/modeling_maskformer_swin:MaskFormerSwinEmbeddings",
        ENCODING,
        setting("maskformer-swin", **ABSOLUTE),
        larger,
    ),
    Part(
        "sam2/modeling_sam2:Sam2HieraDetModel",
        "_get_pos_embed",
        setting("sam2_hiera_det_model"),
        lambda _: {"hw": (16, 16)},
    ),
    Part("seggpt/modeling_seggpt:SegGptEmbeddings", ENCODING, setting("seggpt"), sides(6)),
    Part("swin/modeling_swin:SwinEmbeddings", ENCODING, setting("swin", **ABSOLUTE), larger),
    Part(
        "swinv2/modeling_swinv2:Swinv2Embeddings",
        ENCODING,
        setting("swinv2", **ABSOLUTE),
        larger,
    ),
    Part(
        "timesfm/modeling_timesfm:TimesFmAttention",
        "_scale_query",
        lambda: (tiny_config("timesfm"), 0),
        lambda m: {"query": randn(BATCH, 3, len(m.scaling))},
    ),
    Part(
        "unlimited_ocr/modeling_unlimited_ocr:UnlimitedOcrSamVisionEncoder",
        ENCODING,
        setting("unlimited_ocr_sam_vision_model"),
        sides(64),
    ),
    Part(
        "videoprism/modeling_videoprism:VideoPrismSpatialEmbeddings",
        ENCODING,
        setting("videoprism_vision_model"),
        larger,
    ),
    Part(
        "videoprism/modeling_videoprism:VideoPrismTemporalEmbeddings",
        ENCODING,
        setting("videoprism_vision_model"),
        lambda m: {"embeddings": randn(1, 2 * len(m.position_embeddings[0]), 1)},
    ),
    Part("vivit/modeling_vivit:VivitEmbeddings", ENCODING, setting("vivit"), larger),
    Part(
        "wav2vec2_bert/modeling_wav2vec2_bert:Wav2Vec2BertModel",
        "_mask_hidden_states",
        setting("wav2vec2-bert"),
        lambda m: {
            "hidden_states": randn(BATCH, 4, m.config.hidden_size),
            "mask_time_indices": torch.ones(BATCH, 4).bool(),
        },
    ),
)

# Families with such a method that no tiny model can call, and why.
REASONS = {
    "clvp": "generate of a model with random weights finds no start of speech (UnboundLocalError)",
    "edgetam": "its backbone is one of timm, which is not installed",
    "esm": "the folding model's trunk has sizes that no config makes small",
    "esmfold2": "its config refuses heads as small as these",
    "fsmt": "make_weight makes the weight anew, of nothing that was trained",
    "granite4_vision": "its config holds tables of layers that do not fit fewer layers",
    "oneformer": "a loss, which needs scipy",
    "pvt": "its method is given the embeddings, and asks the parameter for its shape",
    "sam2_video": "methods of a session over the frames of a video",
    "sam3_tracker": "its prompt encoder takes features of one fixed size",
    "sam3_tracker_video": "methods of a session over the frames of a video",
    "vibevoice": "its audio towers have sizes that no config makes small",
}


def families() -> set[str]:
    """Return the folders of transformers' models with such a method, as their sources tell."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return {path.parent.name for path in root.glob("*/modeling_*.py") if _has_reader(path)}


def _has_reader(path: Path) -> bool:
    text = path.read_text("utf-8")
    if "Parameter(" not in text:
        return False
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return any(_reads_its_own(cls) for cls in classes)


def _reads_its_own(cls: ast.ClassDef) -> bool:
    """Whether a class has a method that reads one of the parameters that the class makes."""
    assigned = (node for node in ast.walk(cls) if isinstance(node, ast.Assign))
    made = (node for node in assigned if re.match(r"(\w+\.)*Parameter\(", ast.unparse(node.value)))
    targets = (ast.unparse(target) for node in made for target in node.targets)
    parameters = {target for target in targets if re.fullmatch(r"self\.\w+", target)}
    methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    asked = [m for m in methods if not re.search("^forward$|extra_repr|init|reset", m.name)]
    read = {
        ast.unparse(node)
        for method in asked
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    return not parameters.isdisjoint(read)

"""Build a tiny, randomly initialized instance of a model type."""

from typing import Any

import torch
from torch import nn

from zoo.overrides import AFTER, CLASSES, CONFIGS
from zoo.shrink import shrink

# Which of a model type's classes to build: one with a head where there is one.
MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

MAX_PARAMETERS = 8_000_000


def model_class(model_type: str) -> type[nn.Module]:
    """Return the class that stands for a model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    mappings = (getattr(modeling_auto, mapping) for mapping in MAPPINGS)
    names = next(mapping[model_type] for mapping in mappings if model_type in mapping)
    return getattr(transformers, names if isinstance(names, str) else names[0])


def tiny_config(model_type: str) -> Any:
    """Return the config of a model type, shrunk."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    small = shrink(cls().to_dict())
    for path, value in CONFIGS.get(model_type, {}).items():
        *parts, key = path.split(".")
        inner = small
        for part in parts:
            inner = inner[part]
        inner[key] = value
    return cls(**small)


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Return a tiny model in eval mode; the same one for the same seed."""
    cls, config = model_class(model_type), tiny_config(model_type)
    torch.manual_seed(seed)
    model = cls(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters <= MAX_PARAMETERS, f"{model_type} was not shrunk: {n_parameters:,}"
    randomise(model, seed)
    if model_type in AFTER:
        with torch.no_grad():
            AFTER[model_type](model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter random values.

    Gates and layer scales of zero, as models start with, would hide what is behind them.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_((0.1 * noise).to(parameter.dtype))
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)

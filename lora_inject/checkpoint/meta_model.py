"""The class of transformers that a config.json names, built on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_inject.errors import CheckpointError

MAX_SAID = 300  # characters of another library's message

# Whatever a wrong or unknown config can make a constructor of transformers raise, beside its own.
_BUILD_ERRORS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError),
)


def meta_model(config: Mapping[str, Any], asked: str, remedy: str) -> nn.Module:
    """Build a model of transformers without its weights, of a `config.json` as parsed.

    The class that the config names, else the one that belongs to its `model_type`. The error where
    it cannot be built says what it was needed for (`asked`) and what to do (`remedy`).
    """
    try:
        import transformers as library
        from huggingface_hub import errors
    except ImportError:
        found = "transformers is not installed"
        raise CheckpointError(asked, found, f"Run pip install transformers, or {remedy}") from None
    transformers: Any = library
    refused: Any = errors.StrictDataclassError
    transformers.logging.set_verbosity_error()
    # Private keys of a downloaded config have made older versions fetch and run code.
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    plain.pop("quantization_config", None)
    try:
        kind = str(plain.get("model_type"))
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(f"it does not know the model type {kind!r}")
        made = transformers.CONFIG_MAPPING[kind].from_dict(plain)
        known = _architecture(transformers, made)
        with torch.device("meta"):
            if known is None:
                model = transformers.AutoModel.from_config(made, trust_remote_code=False)
            else:
                model = known._from_config(made, attn_implementation="eager")
    except (*_BUILD_ERRORS, refused) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= MAX_SAID else f"{said[:MAX_SAID]}..."
        found = f"transformers {transformers.__version__} cannot build it: {said.rstrip('.')}"
        raise CheckpointError(asked, found, f"Upgrade transformers, or {remedy}") from error
    assert isinstance(model, nn.Module)
    return model


def _architecture(transformers: Any, config: Any) -> Any:
    """Return the first class of transformers that the config names, None where it names none."""
    for name in config.architectures or ():
        known = getattr(transformers, str(name), None)
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            return known
    return None

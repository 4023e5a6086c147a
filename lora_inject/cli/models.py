"""What `lora-inject plan` plans on: the names and shapes of a model that is never loaded.

A `config.json` is enough to build the model on the meta device, where weights have shapes
but no memory, and then every kind of layer is known exactly. Where there is only a checkpoint, its
key list has to do, and kinds are assumed from names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_inject.checkpoint import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.layers.candidates import inventory
from lora_inject.layers.survey import Survey
from lora_inject.spec.inventory import Inventory

INDEX_SUFFIX = ".safetensors.index.json"
MAX_SAID = 300  # characters of another library's message
KEYS_HELP = "pass --keys to plan on the names in the checkpoint"

# Whatever a wrong or unknown config can make a constructor of transformers raise, beside its own.
BUILD_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Source:
    """What a plan is made on.

    Attributes:
        inventory: Its names and shapes.
        about: Where they come from, in words.
    """

    inventory: Inventory
    about: str


def source_of(path: Path, *, keys: bool = False) -> Source:
    """Read the names and shapes of a model.

    Args:
        path: A folder with `config.json` or with safetensors files, or one of those files.
        keys: Take the checkpoint's key list, even where there is a `config.json`.

    Returns:
        The inventory and where it comes from.

    Raises:
        CheckpointError: There is nothing to plan on, or it cannot be read.
    """
    if not path.exists():
        asked = f"plan on '{path}'"
        raise CheckpointError(asked, "there is no such file or folder", "Check the path")
    is_keys = path.name.endswith(INDEX_SUFFIX) or path.suffix == ".safetensors"
    if path.is_dir():
        is_keys = not (path / "config.json").is_file()
    if keys or is_keys:
        return _from_checkpoint(path)
    return _from_config(path)


def _from_checkpoint(path: Path) -> Source:
    """Read the key list; of an index or a config, that of the folder it lies in."""
    whole = path.is_dir() or path.suffix == ".safetensors"
    checkpoint = Checkpoint.open(path if whole else path.parent)
    shapes = {entry.name: entry.shape for entry in checkpoint}
    about = f"{len(shapes):,} keys of {len(checkpoint.shards):,} safetensors file(s)"
    return Source(Inventory.from_keys(shapes), about)


def _from_config(path: Path) -> Source:
    model = meta_model(path)
    return Source(inventory(Survey(model)), f"{type(model).__name__}, built from its config.json")


def meta_model(path: Path) -> nn.Module:
    """Build the model of a `config.json` on the meta device.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        The class that the config names, else the one that belongs to its `model_type`.

    Raises:
        CheckpointError: transformers is missing, or does not know the model.
    """
    asked = f"build the model of '{path}'"
    transformers, own_errors = _transformers(asked)
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
        cls = _architecture(transformers, config)
        with torch.device("meta"):
            if cls is None:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
            else:
                model = cls._from_config(config)
    except (*BUILD_ERRORS, *own_errors) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= MAX_SAID else f"{said[:MAX_SAID]}..."
        found = f"transformers {transformers.__version__} cannot: {said.rstrip('.')}"
        raise CheckpointError(asked, found, f"Upgrade transformers, or {KEYS_HELP}") from error
    assert isinstance(model, nn.Module)
    return model


def _transformers(asked: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return transformers, and the errors with which its configs refuse a value."""
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        remedy = f"Run pip install transformers, or {KEYS_HELP}"
        raise CheckpointError(asked, "transformers is not installed", remedy) from None
    return transformers, (StrictDataclassError,)


def _architecture(transformers: Any, config: Any) -> Any:
    """The first class of transformers that the config names, None where it names none."""
    for name in config.architectures or ():
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return None

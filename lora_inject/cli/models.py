"""What `lora-inject plan` plans on: the names and shapes of a model that is never loaded.

A `config.json` is enough to build the model on the meta device, where every kind of layer is known.
If there is only a checkpoint, its key list is used, and kinds are assumed from names and shapes.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.base_class import meta_model
from lora_inject.checkpoint.index import read_config
from lora_inject.errors import CheckpointError
from lora_inject.layers.candidates import inventory
from lora_inject.layers.survey import Survey
from lora_inject.spec.inventory import Inventory

INDEX_SUFFIX = ".safetensors.index.json"
KEYS_HELP = "pass --keys to plan on the names in the checkpoint"


def source_of(path: Path, *, keys: bool = False) -> tuple[Inventory, str]:
    """Return the names and shapes of a model, and a description of their source.

    `path` is a folder with `config.json` or with safetensors files, or one of those files. `keys`
    takes the checkpoint's key list, even where there is a `config.json`.
    """
    if not path.exists():
        asked = f"plan on '{path}'"
        raise CheckpointError(asked, "there is no such file or folder", "Check the path")
    folder = path if path.is_dir() else path.parent
    is_keys = path.name.endswith(INDEX_SUFFIX) or path.suffix == ".safetensors"
    if path.is_dir():
        is_keys = not os.path.lexists(path / "config.json")
    if keys or is_keys:  # of an index or a config, those of the folder that it lies in
        checkpoint = Checkpoint.open(path if path.suffix == ".safetensors" else folder)
        shapes = {entry.name: entry.shape for entry in checkpoint}
        about = f"{len(shapes):,} keys of {len(checkpoint.shards):,} safetensors file(s)"
        return Inventory.from_keys(shapes), about
    config = read_config(folder, path.name if path.is_file() else "config.json")
    model = meta_model(config, f"build the model of '{path}'", KEYS_HELP)
    return inventory(Survey(model)), f"{type(model).__name__}, built from its config.json"

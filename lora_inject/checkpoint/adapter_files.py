"""Adapter files as adapters to merge.

A PEFT file of stacked experts says neither which of a module's parameters a pair belongs to, which
their order in the model does, nor which way round the model holds them, which its class does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.variants import is_variant, read_variant
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError
from lora_inject.formats import read_adapter
from lora_inject.formats.peft import PREFIX
from lora_inject.storage.strict_json import parse_json
from lora_inject.storage.tensors import read_names

_STACKS = ("gate_up_proj", "down_proj")


def read_weighted(
    path: str | os.PathLike[str], base: Checkpoint, weight: float = 1.0, **options: Any
) -> WeightedAdapter:
    """Read an adapter from files, for merging into a base.

    Args:
        path: The adapter, in any format of `formats`.
        base: What it will be merged into.
        weight: Mixing weight.
        options: Of the format's `read`.

    Returns:
        The adapter, labeled with its path.

    Raises:
        FormatError: The adapter cannot be read right.
    """
    path = Path(path)
    options["on_disk"] = True  # an adapter may be large, and each of its tensors is needed seldom
    if (path / "adapter_config.json").is_file():
        if _has_stacks(path):
            with contextlib.suppress(CheckpointError):  # a class that cannot be built
                options = BaseClass(base).reading_options() | options
        options.setdefault("tensor_names", _tensor_names(path, base.tensors))
        if is_variant(path):
            options.pop("prefer", None)  # there is no metadata of this package to prefer
            return replace(read_variant(path, weight, **options), on_disk=True)
    return WeightedAdapter(read_adapter(path, **options), weight, str(path), on_disk=True)


def _has_stacks(path: Path) -> bool:
    """Return whether PEFT wrote a folder with adapted parameters; the class is slow to build."""
    config = path / "adapter_config.json"
    said = parse_json(config.read_bytes(), f"read adapter '{path}', {config.name}")
    return isinstance(said, dict) and bool(said.get("target_parameters"))


def _tensor_names(path: Path, there: Iterable[str]) -> Sequence[str]:
    """Return the base's names, and those that transformers 5 gives to stacked experts."""
    file = path / "adapter_model.safetensors"
    keys = read_names(file)[0] if file.is_file() else ()
    modules = {
        key.removeprefix(PREFIX).split(".lora_")[0].replace(".base_layer", "") for key in keys
    }
    experts = [
        f"{m}.{stack}" for m in sorted(modules) if m.endswith("experts") for stack in _STACKS
    ]
    return [*experts, *(name for name in there if name not in set(experts))]

"""Adapter files as adapters to merge.

A PEFT file of stacked experts says neither which of a module's parameters a pair belongs to, which
their order in the model does, nor which way round the model holds them, which its class does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_inject.adapter.state import AdapterState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError
from lora_inject.formats import FORMATS, detected, read_adapter, taken_by
from lora_inject.formats.peft import PREFIX
from lora_inject.storage.strict_json import parse_json
from lora_inject.storage.tensors import read_names

_STACKS = ("gate_up_proj", "down_proj")


Given = WeightedAdapter | AdapterState | str | os.PathLike[str]
"""An adapter as a caller may name it: with a weight, as a value, or by its path."""


def weighted_adapter(given: Given, base: Checkpoint) -> WeightedAdapter:
    """Return an adapter with its weight, 1 by default."""
    if isinstance(given, WeightedAdapter):
        return given
    return WeightedAdapter(given) if isinstance(given, AdapterState) else read_weighted(given, base)


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
    config_file = path / "adapter_config.json"
    row = FORMATS.get(options.get("format") or detected(path))
    if row is not None and row.read is FORMATS["peft"].read and config_file.is_file():
        said = parse_json(config_file.read_bytes(), f"read adapter '{path}', {config_file.name}")
        config = said if isinstance(said, dict) else {}
        if config.get("target_parameters"):  # only then is the class built, which is slow
            with contextlib.suppress(CheckpointError):  # a class that cannot be built
                options = taken_by(row.read, BaseClass(base).reading_options()) | options
        options.setdefault("tensor_names", _tensor_names(path, base.tensors))
    elif row is not None:
        modules = tuple({name.rpartition(".")[0]: None for name in base.tensors})
        known = {"module_names": modules, "config": base.config or None}
        options = taken_by(row.read, known) | options
    return WeightedAdapter(read_adapter(path, **options), weight, str(path))


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

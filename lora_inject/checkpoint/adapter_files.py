"""Adapter files as adapters to merge, PEFT's variants that hold more than A and B included.

A PEFT file of stacked experts says neither which of a module's parameters a pair belongs to, which
their order in the model does, nor which way round the model holds them, which its class does. What
a bias on lora_B or trained rows add is taken out of the file's tensors and its config first;
what is left is a plain LoRA file, which `formats` reads under all its checks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError, FormatError
from lora_inject.formats import FORMATS, detected, read_adapter, taken_by
from lora_inject.formats.peft import PREFIX
from lora_inject.formats.peft.adapter_config import read_claims
from lora_inject.formats.peft.foreign import read_foreign
from lora_inject.storage.strict_json import parse_json
from lora_inject.storage.tensors import read_names, read_tensors

_STACKS = ("gate_up_proj", "down_proj")
_VARIANTS = ("lora_bias", "trainable_token_indices")
_BIAS = ".lora_B.bias"
_ROWS = ".token_adapter.trainable_tokens_delta"


Given = WeightedAdapter | AdapterState | str | os.PathLike[str]
"""An adapter as a caller may name it: with a weight, as a value, or by its path."""


def weighted_adapter(given: Given, base: Checkpoint) -> WeightedAdapter:
    """Return an adapter with its weight, 1 where none is said."""
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
    if config_file.is_file():
        said = parse_json(config_file.read_bytes(), f"read adapter '{path}', {config_file.name}")
        config = said if isinstance(said, dict) else {}
        if config.get("target_parameters"):  # only then is the class built, which is slow
            with contextlib.suppress(CheckpointError):  # a class that cannot be built
                told = BaseClass(base).reading_options()
                options = taken_by(FORMATS["peft"].read, told) | options
        options.setdefault("tensor_names", _tensor_names(path, base.tensors))
        if any(config.get(field) for field in _VARIANTS):
            options.pop("prefer", None)  # there is no metadata of this package to prefer
            return _read_variant(path, config, weight, **options)
    else:
        modules = tuple({name.rpartition(".")[0]: None for name in base.tensors})
        known = {"module_names": modules, "config": base.config or None}
        options = taken_by(FORMATS[detected(path)].read, known) | options
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


def _read_variant(
    path: Path,
    config: Mapping[str, Any],
    weight: float,
    *,
    allow: Sequence[str] = (),
    on_disk: bool = False,
    **options: Any,
) -> WeightedAdapter:
    """Read a PEFT folder of a variant; options as for `formats.peft.read`."""
    asked = f"read adapter '{path}'"
    tensors, _ = read_tensors(path / "adapter_model.safetensors", on_disk=on_disk)
    plain: dict[str, Tensor] = {}
    extras: dict[str, dict[str, Tensor]] = {_BIAS: {}, _ROWS: {}}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".default")
        end = next((end for end in extras if name.endswith(end)), None)
        if end is None:
            plain[key] = tensor
        else:
            extras[end][name.removesuffix(end)] = tensor
    biases = extras[_BIAS]
    claims = read_claims({k: v for k, v in config.items() if k not in _VARIANTS}, asked, allow)
    state = read_foreign(plain, claims, asked, **options)
    _check(asked, config, "lora_bias", state.sites, biases)
    return WeightedAdapter(
        state,
        weight,
        str(path),
        {f"{site}.bias": state.sites[site].scale * bias for site, bias in biases.items()},
        {f"{m}.weight": (_indices(asked, config, m), rows) for m, rows in extras[_ROWS].items()},
    )


def _check(
    asked: str,
    config: Mapping[str, Any],
    field: str,
    sites: Mapping[str, Any],
    found: Mapping[str, Tensor],
) -> None:
    """Refuse a file that lacks part of what its config says, or has what it does not say."""
    strangers, missing = sorted(found.keys() - sites.keys()), sorted(sites.keys() - found.keys())
    if not config.get(field) or (field == "lora_bias" and found):  # not every layer has a bias
        missing = []
    if strangers or missing or (found and not config.get(field)):
        raise FormatError(
            f"{asked}, site '{(strangers or missing or sorted(found))[0]}'",
            f"its tensors and '{field}' in the config do not agree",
            "The file is incomplete or was edited; fetch it again",
        )


def _indices(asked: str, config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """Return which rows of an embedding an adapter replaces."""
    said = config.get("trainable_token_indices")
    if isinstance(said, dict):
        found = [v for k, v in said.items() if module == k or module.endswith(f".{k}")]
        said = found[0] if len(found) == 1 else None
    if not isinstance(said, list) or not all(type(index) is int for index in said):
        raise FormatError(
            f"{asked}, '{module}'",
            "the config does not say which rows it replaces",
            "Restore 'trainable_token_indices' in adapter_config.json",
        )
    return tuple(said)

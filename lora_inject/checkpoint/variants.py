"""Adapters of PEFT that carry more than A and B: DoRA, a bias on lora_B, single rows.

What these variants add is taken out of the file's tensors and its config first; what is
left is a plain LoRA file, which `formats` reads under all its checks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import FormatError
from lora_inject.formats.peft import PREFIX
from lora_inject.formats.peft.adapter_config import read_claims
from lora_inject.formats.peft.foreign import read_foreign
from lora_inject.storage.strict_json import parse_json
from lora_inject.storage.tensors import read_tensors

_FIELDS = ("use_dora", "lora_bias", "trainable_token_indices")
_MAGNITUDE = ".lora_magnitude_vector"
_BIAS = ".lora_B.bias"
_ROWS = ".token_adapter.trainable_tokens_delta"


def is_variant(path: Path) -> bool:
    """Return whether a PEFT folder's config asks for one of the variants."""
    config = _config(path)
    return any(config.get(field) for field in _FIELDS)


def _config(path: Path) -> Mapping[str, Any]:
    file = path / "adapter_config.json"
    config = parse_json(file.read_bytes(), f"read adapter '{path}', adapter_config.json")
    return config if isinstance(config, dict) else {}


def read_variant(
    path: Path,
    weight: float = 1.0,
    *,
    tensor_names: Sequence[str] | None = None,
    allow: Sequence[str] = (),
    transposed_modules: Collection[str] | None = None,
    expert_major: bool = False,
    on_disk: bool = False,
) -> WeightedAdapter:
    """Read a PEFT folder with variants as a part of a merge.

    Args:
        path: The folder.
        weight: Mixing weight.
        tensor_names: As for `formats.peft.read`.
        allow: As for `formats.peft.read`.
        transposed_modules: As for `formats.peft.read`.
        expert_major: As for `formats.peft.read`.
        on_disk: As for `formats.peft.read`.

    Raises:
        FormatError: The adapter cannot be read right.
    """
    asked = f"read adapter '{path}'"
    config = _config(path)
    tensors, _ = read_tensors(path / "adapter_model.safetensors", on_disk=on_disk)
    plain: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".default")
        for end, table in ((_MAGNITUDE, magnitudes), (_BIAS, biases), (_ROWS, rows)):
            stem = name.removesuffix(".weight") if end == _MAGNITUDE else name
            if stem.endswith(end):
                table[stem.removesuffix(end)] = tensor
                break
        else:
            plain[key] = tensor
    claims = read_claims({k: v for k, v in config.items() if k not in _FIELDS}, asked, allow)
    state = read_foreign(
        plain,
        claims,
        asked,
        tensor_names=tensor_names,
        transposed_modules=transposed_modules,
        expert_major=expert_major,
    )
    _check(asked, config, state.sites, magnitudes, biases)
    return WeightedAdapter(
        state,
        weight,
        str(path),
        magnitudes,
        {f"{site}.bias": state.sites[site].scale * bias for site, bias in biases.items()},
        {
            f"{module}.weight": (_indices(asked, config, module), value)
            for module, value in rows.items()
        },
    )


def _check(
    asked: str,
    config: Mapping[str, Any],
    sites: Mapping[str, Any],
    magnitudes: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> None:
    """Refuse a file that lacks part of what its config says, or has what it does not say."""
    for field, found in (("use_dora", magnitudes), ("lora_bias", biases)):
        strangers = sorted(found.keys() - sites.keys())
        missing = sorted(sites.keys() - found.keys()) if config.get(field) else []
        if field == "lora_bias":
            missing = missing if not found else []
        if strangers or missing or (found and not config.get(field)):
            name = (strangers or missing or sorted(found))[0]
            raise FormatError(
                f"{asked}, site '{name}'",
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

"""Pickled state dicts of loralib: read as tensors only, and only if the caller allows it."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.errors import FormatError

DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError),
    *(LookupError, AttributeError, OverflowError, struct.error),
)
"""What torch.load raises of damaged files."""


def read_pickle(path: Path, *, allow: bool) -> dict[str, Tensor]:
    """Return a pickled table of tensors by name, by torch.load(weights_only=True).

    `allow` says whether pickles may be read.
    """
    if not path.is_file():
        raise FormatError("", f"there is no file '{path.name}'", "Check the path")
    if not allow:
        remedy = "Where you trust it, save its tensors with safetensors.torch.save_file; one of "
        remedy += "loralib is read in Python with allow_pickle=True, as tensors only"
        raise FormatError("", f"'{path.name}' is a pickle", remedy)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        problem = f"it cannot be loaded ({error})"[:500]
        raise FormatError("", problem, "It is incomplete or was edited; fetch it again") from error
    if not _is_table(loaded):
        raise FormatError("", "it is not a table of tensors by name", "Save a state dict")
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _is_table(loaded: object) -> bool:
    """Whether a value is a dict of tensors by name."""
    if not isinstance(loaded, dict):
        return False
    return all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items())


def pickled(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a pickled state dict."""
    buffer = BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, buffer)
    return buffer.getvalue()

"""Why a tensor cannot be written to a safetensors file."""

from __future__ import annotations

from torch import Tensor

from lora_inject.core.files.safetensors_file import is_plain_name
from lora_inject.errors import FormatError


def why_unwritable(name: str, tensor: Tensor) -> FormatError:
    """Return the error of a tensor without values, or whose name or dtype a file cannot have."""
    asked = f"write tensor {name[:80]!r}"
    if tensor.is_meta:
        problem = "it is on the meta device and has no values"
        return FormatError(asked, problem, "Load its values first")
    if not is_plain_name(name):
        problem = "the name is too long or has control characters"
        return FormatError(asked, problem, "Rename the module")
    problem = f"its dtype is {tensor.dtype}"
    return FormatError(asked, problem, "Convert it to a plain dtype first")

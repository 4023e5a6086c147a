"""Whole files of JSON, read as untrusted input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_inject.core.files.strict_json import MAX_BYTES, parse_json
from lora_inject.errors import FormatError, LoraInjectError


def read_json(
    path: Path,
    asked: str,
    error: type[LoraInjectError] = FormatError,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Parse a file as `parse_json` does; reads at most `max_bytes + 1`."""
    with path.open("rb") as file:
        n_bytes = min(os.fstat(file.fileno()).st_size, max_bytes)  # `read` allocates all at once
        return parse_json(file.read(n_bytes + 1), asked, error, max_bytes)

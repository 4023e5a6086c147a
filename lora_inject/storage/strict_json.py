"""JSON of files that are not trusted: under a limit, without duplicate keys and without NaN."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lora_inject.errors import FormatError, LoraInjectError

MAX_BYTES = 32_000_000
"""Longest JSON of an adapter. The headers of large checkpoints are longer: see `max_bytes`."""


def parse_json(
    text: str | bytes,
    asked: str,
    error: type[LoraInjectError] = FormatError,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Parse JSON as untrusted input: not too long or deep, no key twice, no NaN or Infinity.

    `asked` says what it is, `error` whether an adapter or a checkpoint is being read.

    Examples:
        >>> parse_json('{"r": 8}', "adapter_config.json")
        {'r': 8}
    """
    if len(text) > max_bytes:
        raise error(
            asked, f"it has more than {max_bytes:,} bytes", "No real file of its kind is so long"
        )
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_table, parse_constant=_no_constant)
    except RecursionError:
        found = "its JSON is nested too deeply"
    except ValueError as cause:
        found = f"it is not valid JSON ({cause})"
    raise error(asked, found, "The file is damaged or was edited; fetch it again")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")

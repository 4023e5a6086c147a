"""JSON of untrusted files, without NaN, and the form that its values must have."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from lora_inject.errors import FormatError, LoraInjectError

Index = Annotated[int, Field(ge=0, lt=1 << 63)]
Count = Annotated[int, Field(ge=1, lt=1 << 63)]
"""What torch can count."""
Positive = Annotated[float, Field(gt=0, le=1e38)]
"""What float32 can hold."""


def parse_json(
    text: str | bytes,
    asked: str,
    error: type[LoraInjectError] = FormatError,
    *,
    keys_once: bool = False,
) -> Any:
    """Parse JSON as untrusted input: not too deep, no NaN or Infinity.

    `asked` is what messages call it, `error` the class of errors: of an adapter or a checkpoint.
    `keys_once` refuses a table that has a key twice, of which Python takes the last.
    """
    pairs = _once if keys_once else None
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=pairs)
    except RecursionError:
        problem = "its JSON is nested too deeply"
    except ValueError as cause:
        problem = f"it is not valid JSON ({cause})"
    raise error(asked, problem, "The file is damaged or was edited; fetch it again")


def parse_table(
    text: str | bytes, asked: str, error: type[LoraInjectError] = FormatError
) -> dict[str, Any]:
    """Parse a table of JSON as `parse_json` does."""
    table = parse_json(text, asked, error)
    if not isinstance(table, dict):
        raise error(asked, "it is not a table of fields", "Check the path, or fetch it again")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice[:80]!r} stands twice")
    return table


def is_positive(value: object) -> bool:
    """Whether a parsed value is a number above 0 that float32 can hold; true is not."""
    return isinstance(value, int | float) and value is not True and 0 < value <= 1e38


def misfit(value: object, form: TypeAdapter[Any]) -> str:
    """Return where a parsed value is not of a form, strictly; "" if it is.

    Examples:
        >>> misfit([1, -1], TypeAdapter(list[Count]))
        '1: -1 is impossible (Input should be greater than or equal to 1)'
    """
    try:
        form.validate_python(value, strict=True)
    except ValidationError as error:
        return fault_in(error)
    return ""


def fault_in(error: ValidationError) -> str:
    """Return the place, the value and pydantic's words of the first fault."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))[:200]
    return f"{place}: {reprlib.repr(fault['input'])[:40]} is impossible ({fault['msg']})"


def read_json(path: Path, asked: str, error: type[LoraInjectError] = FormatError) -> Any:
    """Parse a file as `parse_json` does."""
    return parse_json(path.read_bytes(), asked, error)

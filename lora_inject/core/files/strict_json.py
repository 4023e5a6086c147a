"""JSON of untrusted files, without NaN, and the form that its values must have."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lora_inject.errors import FormatError, LoraInjectError


def parse_json(text: str | bytes, asked: str, error: type[LoraInjectError] = FormatError) -> Any:
    """Parse JSON as untrusted input: not too deep, no NaN or Infinity.

    `asked` is what messages call it, `error` the class of errors: of an adapter or a checkpoint.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        problem = "its JSON is nested too deeply"
    except ValueError as cause:
        problem = f"it is not valid JSON ({cause})"
    raise error(asked, problem, "The file is damaged or was edited; fetch it again")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def is_positive(value: Any) -> bool:
    """Whether a parsed value is a number above 0 that float32 can hold; true is not."""
    return type(value) in (int, float) and 0 < value <= 1e38


class Maybe(NamedTuple):
    """A form, or null."""

    form: Any


def misfit(value: Any, form: Any) -> str:
    """Return where a parsed value is not of a form; "" if it is.

    A form is a type, a range, a check of one value, a list of values of one form, a tuple of
    forms, a table of fields, or a table of one form under any keys (`...`).

    Examples:
        >>> misfit([{"rank": -1}], [{"rank": range(1, 9)}])
        '.0.rank: -1 is impossible'
    """
    if isinstance(form, Maybe):
        return "" if value is None else misfit(value, form.form)
    if isinstance(form, dict) and isinstance(value, dict):
        return _misfit_of_table(value, form)
    if isinstance(form, list) and isinstance(value, list):
        return _first_misfit((place, each, form[0]) for place, each in enumerate(value))
    if isinstance(form, tuple) and isinstance(value, list) and len(value) == len(form):
        return _first_misfit(zip(count(), value, form))
    return "" if _is_plainly(value, form) else f": {reprlib.repr(value)[:40]} is impossible"


def _misfit_of_table(value: dict[str, Any], form: dict[Any, Any]) -> str:
    if ... in form:
        form = dict.fromkeys(value, form[...])
    for key in sorted(form.keys() ^ value.keys()):
        return f".{key[:200]}: {'it is missing' if key in form else 'there is no such field'}"
    return _first_misfit((key, value[key], form[key]) for key in value)


def _first_misfit(places: Iterable[tuple[Any, Any, Any]]) -> str:
    """Return the first misfit of parts of a value, each with its place and its form."""
    wrongs = ((key, misfit(each, form)) for key, each, form in places)
    return next((f".{key}{wrong}" for key, wrong in wrongs if wrong), "")


def _is_plainly(value: Any, form: Any) -> bool:
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, type):
        return type(value) is form
    return callable(form) and bool(form(value))


def read_json(path: Path, asked: str, error: type[LoraInjectError] = FormatError) -> Any:
    """Parse a file as `parse_json` does."""
    return parse_json(path.read_bytes(), asked, error)

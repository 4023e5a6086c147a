"""Examples from files: JSON lines, CSV, or `context||target` text.

Whatever the file, a row is a text, perhaps a second one, and what is to be learnt about
them, all as written. What is wrong with a file is said with the number of its line.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.packaged import refusal

__all__ = ["FIELDS", "Fields", "Row", "hold_out", "read"]

SEPARATOR = "||"


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        text: The context of a pair, or the text to judge.
        target: What follows the context, or a class, or a number.
        second: A second text to judge together with the first, as in MRPC or RTE.
    """

    text: str
    target: str
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the columns of a file, or of the keys of its objects."""

    text: str
    target: str
    second: str | None = None


FIELDS = {
    "pairs": Fields("context", "target"),
    "classify": Fields("text", "label"),
    "regress": Fields("text", "label"),
}


def read(path: Path, fields: Fields) -> list[Row]:
    """Read all rows of a file; its ending says what it is.

    Args:
        path: `.jsonl`, `.csv` with a line of names, or any other text with one
            `context||target` on each line.
        fields: The names to look for in the first two.

    Returns:
        The rows in their order; empty lines are none.

    Raises:
        SystemExit: There is no such file, it holds no row, or a line cannot be read.
    """
    if not path.is_file():
        raise refusal(f"read rows from {path}", "there is no such file", "Check the path")
    readers = {".jsonl": _json_lines, ".csv": _csv}
    text = path.read_text(encoding="utf-8")
    rows = [
        _row(values, f"{path}, line {number}")
        for number, values in readers.get(path.suffix, _pairs)(text, path, fields)
    ]
    if not rows:
        raise refusal(f"read rows from {path}", "it holds none", "Give a file with examples")
    return rows


def _row(values: Sequence[Any], place: str) -> Row:
    for value in values:
        if not isinstance(value, str | int | float | None) or isinstance(value, bool):
            raise refusal(place, f"{value!r} is no text", "Write texts and numbers only")
    text, target, second = ("" if value is None else str(value).strip() for value in values)
    for name, value in (("text", text), ("target", target)):
        if not value:
            raise refusal(place, f"its {name} is empty", "Complete the line or remove it")
    return Row(text, target, second or None)


def _json_lines(text: str, path: Path, fields: Fields) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise refusal(f"{path}, line {number}", f"no JSON: {error}", "Correct it") from None
        if not isinstance(found, dict):
            raise refusal(f"{path}, line {number}", "no object", "Write one object on each line")
        yield number, _pick(found, fields, f"{path}, line {number}")


def _csv(text: str, path: Path, fields: Fields) -> Iterator[tuple[int, Sequence[Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.reader.line_num}"
            if None in row or None in row.values():
                n = len(reader.fieldnames or ())
                raise refusal(place, f"it has not {n} columns", "Quote what holds a comma")
            yield reader.reader.line_num, _pick(row, fields, place)
    except csv.Error as error:
        place = f"{path}, line {reader.reader.line_num}"
        raise refusal(place, f"no CSV: {error}", "Correct the quotes") from None


def _pick(found: dict[str, Any], fields: Fields, place: str) -> Sequence[Any]:
    names = [fields.text, fields.target, *filter(None, [fields.second])]
    for name in names:
        if name not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise refusal(place, f"no {name!r}; there is: {there}", "Name the columns: --fields")
    return *(found[name] for name in names), *[None] * (3 - len(names))


def _pairs(text: str, path: Path, fields: Fields) -> Iterator[tuple[int, Sequence[Any]]]:
    del fields
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split(SEPARATOR)
        if len(parts) != 2:
            raise refusal(
                f"{path}, line {number}",
                f"{len(parts) - 1} separators {SEPARATOR!r}",
                f"Write context{SEPARATOR}target",
            )
        yield number, (*parts, None)


def hold_out(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Split rows so that no text is on both sides, alike wherever this runs.

    Args:
        rows: The rows.
        share: Share of the texts to hold out, in [0, 1].

    Returns:
        Those to train on and those held out, each in an order that only the texts decide: the first
        n of either are a fair sample.
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in sorted(rows, key=lambda row: _number(f"{row.text}\0{row.second}\0{row.target}")):
        parts[_number(row.text) < share].append(row)
    return parts


def _number(text: str) -> float:
    """A number in [0, 1) that only `text` decides, in every process alike (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

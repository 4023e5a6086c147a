"""Examples: from JSON lines, parquet, CSV or `context||target` text, or from installed data.

A row is a text and what is to be learned about it, or a conversation. Whatever is wrong with a file
is an error that names the line.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import pairs, snippets, wordnet
from data.packaged import refusal

SEPARATOR = "||"


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        text: The context of a pair, or the text to judge.
        target: What follows the context, a class, or a number.
        second: A second text to judge together with the first, as in MRPC or RTE.
        messages: A conversation, `(role, content)` in turn, of which the assistant's are learned.
    """

    text: str
    target: str
    second: str | None = None
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Data:
    """Rows to train on, to choose the best checkpoint by, and to report on; and the prompt."""

    train: list[Row]
    held_out: list[Row]
    test: list[Row]
    prompt: str = "{text}\n"


def read(path: Path, fields: Sequence[str]) -> list[Row]:
    """Read all rows of a file; its ending says what it is.

    Args:
        path: `.jsonl`, `.parquet`, `.csv` with a line of names, or text with one `context||target`
            on each line. An object with `messages` is a conversation.
        fields: Names of text and target, perhaps of a second text.
    """
    if not path.is_file():
        raise refusal(f"read rows from {path}", "there is no such file", "Check the path")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]]
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix in readers:
        found = [_row(row, fields, f"{path}, line {n}") for n, row in readers[path.suffix](path)]
    else:
        found = [_row(row, ("text", "target"), f"{path}, line {n}") for n, row in _text(path)]
    if not found:
        raise refusal(f"read rows from {path}", "it holds none", "Give a file with examples")
    return found


def _row(row: dict[str, Any], fields: Sequence[str], place: str) -> Row:
    if "messages" in row:
        return _conversation(row["messages"], place)
    if missing := [name for name in fields if name not in row]:
        there = ", ".join(map(repr, row)) or "none"
        raise refusal(place, f"no {missing[0]!r}; there is: {there}", "Name the columns: --fields")
    values = [row[name] for name in fields]
    for name, value in zip(fields, values, strict=True):
        if not isinstance(value, str | int | float | None) or isinstance(value, bool):
            raise refusal(place, f"{value!r} is not a text", "Write texts and numbers only")
        if name in fields[:2] and (value is None or not str(value).strip()):
            raise refusal(place, f"its {name} is empty", "Complete the line or remove it")
    return Row(*(None if value is None else str(value).strip() for value in values))


def _conversation(messages: Any, place: str) -> Row:
    try:
        turns = tuple((str(m["role"]), str(m["content"])) for m in messages)
    except (TypeError, KeyError):
        raise refusal(place, "messages are not objects of role and content", "Correct it") from None
    if not any(role == "assistant" for role, _ in turns):
        raise refusal(place, "no message of the assistant", "There is nothing to learn from it")
    return Row("\n".join(content for _, content in turns[:-1]), turns[-1][1], None, turns)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise refusal(
                    f"{path}, line {number}", f"not JSON: {error}", "Correct it"
                ) from None
            if not isinstance(row, dict):
                raise refusal(f"{path}, line {number}", "not an object", "Write one on each line")
            yield number, row


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                place, n = f"{path}, line {reader.line_num}", len(reader.fieldnames or ())
                raise refusal(place, f"it does not have {n} columns", "Quote what holds a comma")
            yield reader.line_num, row
    except csv.Error as error:
        raise refusal(
            f"{path}, line {reader.line_num}", f"not CSV: {error}", "Correct it"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise refusal(f"read {path}", "pyarrow is not installed", "pip install pyarrow") from None
    yield from enumerate(parquet.read_table(path).to_pylist(), 1)


def _text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split(SEPARATOR)
        if line.strip() and len(parts) != 2:
            found = f"{len(parts) - 1} separators {SEPARATOR!r}"
            raise refusal(f"{path}, line {number}", found, f"Write context{SEPARATOR}target")
        if line.strip():
            yield number, dict(zip(("text", "target"), parts, strict=True))


def hold_out(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Split rows so that no text is on both sides, in an order that only the texts decide."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in sorted(rows, key=lambda row: _number(f"{row.text}\0{row.second}\0{row.target}")):
        parts[_number(row.text) < share].append(row)
    return parts


def _number(text: str) -> float:
    """A number in [0, 1) that only `text` decides, in every process alike (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def docstrings(folder: Path) -> Data:
    """Functions of the Python that runs this, and the first line of their docstrings."""
    del folder
    split = pairs.collect()
    parts = ([Row(pairs.prompt_of(p.code), pairs.target_of(p.summary)) for p in part]
             for part in (split.train, split.held_out))  # fmt: skip
    return Data(*parts, [], prompt="{text}")


def movies(folder: Path, scores: bool = False) -> Data:
    """Snippets of movie reviews: good or bad, the clear ones; or what people felt, -4 to 4."""
    found = snippets.read(snippets.fetch(folder), "movies")
    split = snippets.split(found if scores else snippets.sentiment(found))
    return Data(*([Row(s.text, str(s.score if scores else s.label)) for s in part]
                  for part in (split.train, split.dev, split.test)))  # fmt: skip


def definitions(folder: Path) -> Data:
    """Words and their definitions."""
    del folder
    found = [Row(word, definition) for word, definition in wordnet.read()]
    return Data(*hold_out(found, 0.05), [], prompt="{text} is")


INSTALLED: dict[str, tuple[str, Callable[[Path], Data]]] = {
    "docstrings": ("pairs", docstrings),
    "wordnet": ("pairs", definitions),
    "movies": ("classify", movies),
    "movie-scores": ("regress", lambda folder: movies(folder, scores=True)),
}
"""Data that comes with a package: its task, and the function that reads it."""


def data(args: Any) -> Data:
    """Return the rows that the command line asks for."""
    if args.train in INSTALLED:
        task, source = INSTALLED[args.train]
        if task != args.task:
            raise refusal(
                f"{args.train} to {args.task}", f"it is for {task}", f"Pass --task {task}"
            )
        return source(args.cache)
    fields = (args.fields or {"pairs": "context,target"}.get(args.task, "text,label")).split(",")
    if len(fields) not in (2, 3):
        raise refusal(f"--fields {args.fields}", f"{len(fields)} names", "Give two or three")
    found = read(Path(args.train), fields)
    parts = (found, read(args.held_out, fields)) if args.held_out else hold_out(found, args.share)
    if not all(parts):
        counts = f"{len(parts[0])} and {len(parts[1])} rows"
        raise refusal("rows to train on and rows to hold out", counts, "Give --held-out")
    return Data(*parts, read(args.test, fields) if args.test else [])

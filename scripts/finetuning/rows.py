"""Examples: from JSON lines, parquet, CSV or `context||target` text, or from installed data.

A row is a text and what is to be learned about it, or a conversation. Whatever is wrong with a file
is an error that names the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import pairs, snippets
from data.packaged import number_of, refusal


@dataclass(frozen=True, slots=True)
class Row:
    """A text, perhaps a second, and what follows, a class or a number; or `(role, content)`s."""

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


class RowError(Exception):
    """What is wrong with one row of a file."""


def read(path: Path, fields: Sequence[str]) -> list[Row]:
    """Return all rows of a file; its ending says what it is. `fields` name its columns."""
    if not path.is_file():
        raise refusal(f"read rows from {path}", "there is no such file", "Check the path")
    records, parse = READERS.get(path.suffix, (_lines, _pair))
    found, number = [], 0
    try:
        for number, record in records(path):  # noqa: B007 - said where it fails
            found.append(_row(parse(record), ("text", "target") if parse is _pair else fields))
    except (RowError, csv.Error, json.JSONDecodeError) as error:
        why = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
        remedy = "Correct it, or name the columns with --fields"
        raise refusal(f"{path}, line {number}", why, remedy) from None
    if not found:
        raise refusal(f"read rows from {path}", "it holds none", "Give a file with examples")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(path.read_text("utf-8").splitlines(keepends=True), strict=True)
    return ((reader.line_num, row) for row in reader)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise refusal(f"read {path}", "pyarrow is not installed", "pip install pyarrow") from None
    return enumerate(parquet.read_table(path).to_pylist(), 1)


def _pair(line: str) -> dict[str, Any]:
    if (n := line.count("||")) != 1:
        raise RowError(f"{n} separators '||' instead of one")
    return dict(zip(("text", "target"), line.split("||"), strict=True))


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], dict[str, Any]]]] = {
    ".jsonl": (_lines, json.loads), ".csv": (_csv, dict), ".parquet": (_parquet, dict)
}  # fmt: skip


def _row(row: Any, fields: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise RowError("not an object")
    if None in row:
        raise RowError("more columns than names")
    if "messages" in row:
        return _conversation(row["messages"])
    if missing := [name for name in fields if name not in row]:
        there = ", ".join(map(repr, row)) or "none"
        raise RowError(f"no {missing[0]!r}; there is: {there}")
    for name in fields:
        value = row[name]
        if not isinstance(value, str | int | float | None) or isinstance(value, bool):
            raise RowError(f"{value!r} is not a text")
        if name in fields[:2] and (value is None or not str(value).strip()):
            raise RowError(f"its {name} is empty")
    return Row(*(None if row[name] is None else str(row[name]).strip() for name in fields))


def _conversation(messages: Any) -> Row:
    try:
        turns = tuple((str(m["role"]), str(m["content"])) for m in messages)
    except (TypeError, KeyError):
        raise RowError("messages are not objects of role and content") from None
    if not any(role == "assistant" for role, _ in turns):
        raise RowError("no message of the assistant, of which to learn")
    return Row("\n".join(content for _, content in turns[:-1]), turns[-1][1], None, turns)


def hold_out(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Split rows so that no text is on both sides, in an order that only the texts decide."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in sorted(rows, key=lambda row: number_of(f"{row.text}\0{row.second}\0{row.target}")):
        parts[number_of(row.text) < share].append(row)
    return parts


def docstrings(_: Path) -> Data:
    """Functions of the Python that runs this, and the first line of their docstrings."""
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


INSTALLED: dict[str, tuple[str, Callable[[Path], Data]]] = {
    "docstrings": ("pairs", docstrings),
    "movies": ("classify", movies),
    "movie-scores": ("regress", lambda folder: movies(folder, scores=True)),
}


def data(args: Any) -> Data:
    """Return the rows that the command line asks for."""
    if args.train in INSTALLED:
        task, source = INSTALLED[args.train]
        if task != args.task:
            asked = f"{args.train} to {args.task}"
            raise refusal(asked, f"it is for {task}", f"Pass --task {task}")
        return source(args.cache)
    fields = (args.fields or {"pairs": "context,target"}.get(args.task, "text,label")).split(",")
    if len(fields) not in (2, 3):
        raise refusal(f"--fields {args.fields}", f"{len(fields)} names", "Give two or three")
    found = read(Path(args.train), fields)
    parts = (found, read(args.held_out, fields)) if args.held_out else hold_out(found, args.share)
    if not all(parts):
        counts = f"{len(parts[0])} and {len(parts[1])}"
        raise refusal("rows to train on and to hold out", counts, "Give --held-out")
    return Data(*parts, read(args.test, fields) if args.test else [])

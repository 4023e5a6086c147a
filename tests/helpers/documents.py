"""Documents as their readers run them: fenced blocks, and what they print."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Lines at the top and the bottom that are shown of a long output.
MOST = 14
TOP, BOTTOM = 9, 3


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int  # the number of its first line, from 1
    before: str  # the line before its fence


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    listed: list[Block] = []
    language: str | None = None
    start = 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if language is None:
            language = line.strip().removeprefix("```")
            start = number + 1
        else:
            body = "\n".join(lines[start:number]) + "\n"
            listed.append(Block(language, body, start + 1, lines[max(start - 2, 0)]))
            language = None
    assert language is None, f"the block at line {start} does not end"
    return listed


def commands(block: Block) -> list[tuple[str, str]]:
    """Return each `$ command` of a console block with the output that is shown below it."""
    parts = re.split(r"^\$ ", block.text.replace("\\\n", ""), flags=re.MULTILINE)
    assert parts[0] == "", f"line {block.line}: output without a command"
    return [(command, output) for command, _, output in (p.partition("\n") for p in parts[1:])]


def output_of(block: Block, all_blocks: Sequence[Block]) -> Block | None:
    """Return the `output` block that follows a block, if one does."""
    following = dict(pairwise(all_blocks)).get(block)
    is_output = following is not None and following.language == "output"
    return following if is_output else None


# Outputs ------------------------------------------------------------------------------------------

# A word, a number or a sign; tables may be spaced otherwise where a number has another width.
_TOKEN = re.compile(r"\.\.\.|\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|[^\W\d]+|\S")
_UNITS = {"s", "ms", "GB", "MB", "kB"}


def same_output(shown: str, printed: str) -> bool:
    """Return whether a document shows what is printed.

    1. `...` stands for anything, also for nothing.
    2. Integers and words must agree. Numbers with a point agree within a tenth, since the last
       digits of a float depend on the processor.
    3. A time, or a size of memory or of a file, may be any, with any unit.
    4. Spaces do not matter.
    """
    segments = _split(_TOKEN.findall(shown))
    rest = _TOKEN.findall(printed)
    first, *others = segments
    if not _agree(first, rest[: len(first)]):
        return False
    rest = rest[len(first) :]
    if not others:
        return not rest
    *middle, last = others
    for segment in middle:
        at = _find(segment, rest)
        if at is None:
            return False
        rest = rest[at + len(segment) :]
    return len(last) <= len(rest) and _agree(last, rest[len(rest) - len(last) :])


def _split(tokens: Sequence[str]) -> list[list[str]]:
    segments: list[list[str]] = [[]]
    for token in tokens:
        if token == "...":
            segments.append([])
        else:
            segments[-1].append(token)
    return segments


def _find(segment: Sequence[str], tokens: Sequence[str]) -> int | None:
    starts = range(len(tokens) - len(segment) + 1)
    return next((i for i in starts if _agree(segment, tokens[i : i + len(segment)])), None)


def _agree(shown: Sequence[str], printed: Sequence[str]) -> bool:
    if len(shown) != len(printed):
        return False
    units = [*shown[1:], ""]
    return all(map(_same, shown, printed, units))


def _same(shown: str, printed: str, unit: str) -> bool:
    if shown == printed or {shown, printed} <= _UNITS:
        return True
    if not (shown[0].isdigit() and printed[0].isdigit()):
        return False
    if unit in _UNITS:
        return True
    is_float = bool({".", "e"} & {*shown, *printed})
    numbers = (float(text.replace(",", "")) for text in (shown, printed))
    return is_float and math.isclose(*numbers, rel_tol=0.1, abs_tol=2e-6)


def shortened(printed: str) -> str:
    """Return an output without its middle, if it is long."""
    lines = [line.rstrip() for line in printed.rstrip().splitlines()]
    if len(lines) > MOST:
        lines = [*lines[:TOP], "...", *lines[-BOTTOM:]]
    return "\n".join(lines) + "\n"


def worth_keeping(shown: str, printed: str) -> bool:
    """Return whether what a document shows is right, and says something."""
    return shown.strip() != "..." and same_output(shown, printed)


def with_outputs(text: str, printed: dict[int, str], results: dict[tuple[int, str], str]) -> str:
    """Return a document that shows what its blocks print.

    `printed` is what Python blocks print, by their line; `results` is what commands print, by the
    line of the block and the command. Commands below which nothing stands show nothing. What is
    right already stays as it is, with the parts that it leaves out.
    """
    lines = text.splitlines()
    all_blocks = blocks(text)
    for block in reversed(all_blocks):  # from the end, so that the lines of the others hold
        if block.language == "python":
            _show_printed(lines, block, output_of(block, all_blocks), printed.get(block.line, ""))
        elif block.language == "console":
            _show_results(lines, block, results)
    return "\n".join(lines) + "\n"


def _show_printed(lines: list[str], block: Block, shown: Block | None, output: str) -> None:
    if shown and worth_keeping(shown.text, output):
        return
    fence = block.line - 1 + len(block.text.splitlines())
    if shown is not None:
        del lines[fence + 1 : shown.line + len(shown.text.splitlines())]
    if output.strip():
        lines[fence + 1 : fence + 1] = ["", "```output", *shortened(output).splitlines(), "```"]


def _show_results(lines: list[str], block: Block, results: dict[tuple[int, str], str]) -> None:
    body = ""
    for (command, output), written in zip(commands(block), written_commands(block), strict=True):
        result = results.get((block.line, command))
        is_stale = output and result is not None and not worth_keeping(output, result)
        body += written + (shortened(result) if is_stale else output)
    first = block.line - 1
    lines[first : first + len(block.text.splitlines())] = body.splitlines()


def written_commands(block: Block) -> list[str]:
    """Return the commands of a console block as they are written, over several lines too."""
    return re.findall(r"^\$ (?:.*\\\n)*.*\n", block.text, re.MULTILINE)

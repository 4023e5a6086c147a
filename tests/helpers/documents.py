"""Documents as their readers run them: fenced blocks, and what they print."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Lines at the top and the bottom that are shown of a long output.
MOST, TOP, BOTTOM = 14, 9, 3


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int  # the number of its first line, from 1
    before: str  # the line before its fence


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    lines = text.splitlines()
    fences = [n for n, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, "the last block does not end"
    listed = []
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        language = lines[start].strip().removeprefix("```")
        body = "\n".join(lines[start + 1 : end]) + "\n"
        listed.append(Block(language, body, start + 2, lines[max(start - 1, 0)]))
    return listed


def commands(block: Block) -> list[tuple[str, str]]:
    """Return each `$ command` of a console block, as written, and the output shown below it."""
    assert block.text.startswith("$ "), f"line {block.line}: output without a command"
    return re.findall(r"^\$ ((?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)


def output_of(block: Block, all_blocks: Sequence[Block]) -> Block | None:
    """Return the `output` block that follows a block, if one does."""
    following = dict(pairwise(all_blocks)).get(block)
    is_output = following is not None and following.language == "output"
    return following if is_output else None


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
    wanted, given = _TOKEN.findall(shown), _TOKEN.findall(printed)
    at = 0
    place = 0
    gap: tuple[int, int] | None = None  # after the last `...`: where its text may end
    while place < len(given):
        if wanted[at : at + 1] == ["..."]:
            at += 1
            gap = (at, place)
        elif at < len(wanted) and _same(wanted[at], given[place], wanted[at + 1 : at + 2]):
            at += 1
            place += 1
        elif gap is not None:
            at = gap[0]
            place = gap[1] + 1
            gap = (at, place)
        else:
            return False
    return all(token == "..." for token in wanted[at:])


def _same(shown: str, printed: str, following: Sequence[str]) -> bool:
    if shown == printed or {shown, printed} <= _UNITS:
        return True
    if not (shown[0].isdigit() and printed[0].isdigit()):
        return False
    if _UNITS.intersection(following):
        return True
    is_float = bool({".", "e"} & {*shown, *printed})
    numbers = (float(text.replace(",", "")) for text in (shown, printed))
    return is_float and math.isclose(*numbers, rel_tol=0.1, abs_tol=2e-6)


def renewed(shown: str, printed: str) -> str:
    """Return what a document should show: as it is if it is right, or a long output's two ends."""
    if shown.strip() != "..." and same_output(shown, printed):
        return shown
    lines = [line.rstrip() for line in printed.rstrip().splitlines()]
    if len(lines) > MOST:
        lines = [*lines[:TOP], "...", *lines[-BOTTOM:]]
    return "\n".join(lines) + "\n"


def with_texts(text: str, texts: Mapping[Block, str]) -> str:
    """Return a document in which some blocks have other texts; these are in its order."""
    lines = text.splitlines()
    for block, body in reversed(texts.items()):  # so that the lines of those before it hold
        first = block.line - 1
        lines[first : first + len(block.text.splitlines())] = body.splitlines()
    return "\n".join(lines) + "\n"

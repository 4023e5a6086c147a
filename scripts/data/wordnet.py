"""Words and their definitions: WordNet 3, out of Debian's package `wordnet-base`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.packaged import refusal

FOLDER = Path("/usr/share/wordnet")


def read() -> Iterator[tuple[str, str]]:
    """Yield each word with the first part of its gloss, file by file."""
    files = sorted(FOLDER.glob("data.*"))
    if not files:
        remedy = "Install Debian's package wordnet-base"
        raise refusal("the words of WordNet", f"no data files in {FOLDER}", remedy)
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry, _, gloss = line.partition(" | ")
            definition = gloss.split(";")[0].strip()
            if definition and not line.startswith(" "):  # the license at the head of each file
                yield entry.split(" ")[4].replace("_", " ").partition("(")[0], definition

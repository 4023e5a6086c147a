"""Where the rows come from: the user's files, or data that comes with a package.

A source is a function that gives rows to train on, rows held out, and rows to report on.
Nothing of what is read is stored in this repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import pairs, snippets
from data.packaged import refusal

from training.rows import Fields, Row, hold_out, read

__all__ = ["BUILT_IN", "Data", "built_in", "from_files"]

WORDNET = Path("/usr/share/wordnet")  # where Debian's package `wordnet-base` puts it


@dataclass(frozen=True, slots=True)
class Data:
    """Rows in three parts.

    Attributes:
        train: To train on.
        held_out: To choose the best checkpoint by, and to stop by.
        test: To report on; empty where there are none beside the held-out ones.
        prompt: How a context is put to a language model.
    """

    train: list[Row]
    held_out: list[Row]
    test: list[Row]
    prompt: str = "{text}\n"


def from_files(
    train: Path, held_out: Path | None, test: Path | None, fields: Fields, share: float
) -> Data:
    """Rows of the user's own files.

    Args:
        train: Rows to train on; a share of their texts is held out where there is no `held_out`.
        held_out: Rows to choose by.
        test: Rows to report on.
        fields: Names of columns.
        share: Share of the texts to hold out.

    Raises:
        SystemExit: A file cannot be read, or the held-out part is empty.
    """
    rows = read(train, fields)
    parts = hold_out(rows, share) if held_out is None else (rows, read(held_out, fields))
    if not all(parts):
        found = f"{len(parts[0])} and {len(parts[1])} rows"
        raise refusal("rows to train on and rows to hold out", found, "Give --held-out")
    return Data(*parts, [] if test is None else read(test, fields))


def docstrings(folder: Path) -> Data:
    """Functions of the Python that runs this, and the first line of their docstrings."""
    del folder
    split = pairs.collect()

    def rows(found: list[pairs.Pair]) -> list[Row]:
        return [Row(pairs.prompt_of(p.code), pairs.target_of(p.summary)) for p in found]

    return Data(rows(split.train), rows(split.held_out), [], prompt="{text}")


def movies(folder: Path) -> Data:
    """Snippets of movie reviews: good or bad, the clear ones."""
    found = snippets.sentiment(snippets.read(snippets.fetch(folder), "movies"))
    return _snippets(found, {snippet.text: str(snippet.label) for snippet in found})


def movie_scores(folder: Path) -> Data:
    """Snippets of movie reviews with what people felt, from -4 to 4."""
    found = snippets.read(snippets.fetch(folder), "movies")
    return _snippets(found, {snippet.text: str(snippet.score) for snippet in found})


def _snippets(found: Sequence[snippets.Snippet], targets: Mapping[str, str]) -> Data:
    split = snippets.split(found)
    parts = (split.train, split.dev, split.test)
    return Data(*([Row(s.text, targets[s.text]) for s in part] for part in parts))


def wordnet(folder: Path) -> Data:
    """Words of WordNet and their definitions, from Debian's package."""
    del folder
    rows = []
    for path in sorted(WORDNET.glob("data.*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" ") or " | " not in line:
                continue  # the licence at the head of each file
            entry, _, gloss = line.partition(" | ")
            definition = gloss.split(";")[0].strip()
            word = entry.split(" ")[4].replace("_", " ").partition("(")[0]
            if definition:
                rows.append(Row(word, definition))
    if not rows:
        found = f"no data files in {WORDNET}"
        raise refusal("the words of WordNet", found, "Install Debian's package wordnet-base")
    train, held_out = hold_out(rows, 0.05)
    return Data(train, held_out, [], prompt="{text} is")


BUILT_IN = {
    "docstrings": ("pairs", docstrings),
    "wordnet": ("pairs", wordnet),
    "movies": ("classify", movies),
    "movie-scores": ("regress", movie_scores),
}


def built_in(name: str, task: str, folder: Path) -> Data:
    """Rows of a source that comes with a package.

    Args:
        name: One of `BUILT_IN`.
        task: What is to be learnt.
        folder: Where a download is kept.

    Raises:
        SystemExit: The source is for another task, or is not there.
    """
    made_for, source = BUILT_IN[name]
    if made_for != task:
        raise refusal(f"{name!r} to {task}", f"it is for {made_for!r}", f"Pass --task {made_for}")
    return source(folder)

"""Sentences with the mean of what twenty people felt in them: movie reviews, tweets and more.

The source distribution of `vaderSentiment` carries the data of its paper (Hutto and Gilbert, ICWSM
2014), so a classification task comes with pip alone. A split is by the text alone: the same
sentence lands on the same side wherever this runs.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.packaged import check_digest, number_of

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
KINDS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
HELD_OUT_SHARES = (0.15, 0.35)  # of the development and of the test part


class Snippet(NamedTuple):
    """A sentence; its id up to the underscore, if there is one, names the review."""

    id: str
    text: str
    score: float  # from -4 to 4

    @property
    def label(self) -> int:
        """1 where the score is positive."""
        return int(self.score > 0)


class Split(NamedTuple):
    """Snippets to train on, to choose by, and to report on; no review is in two of them."""

    train: list[Snippet]
    dev: list[Snippet]
    test: list[Snippet]


def read(folder: Path, kind: str = "movies") -> list[Snippet]:
    """Read the sentences of a kind that are clearly good or bad, from an archive by pip."""
    path = folder / SDIST
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*command, ":all:", "--dest", str(folder), PACKAGE], check=True)
    check_digest(path, SHA256)
    with (
        tarfile.open(path) as outer,
        tarfile.open(fileobj=io.BytesIO(_file(outer, INNER))) as inner,
    ):
        lines = _file(inner, f"hutto_ICWSM_2014/{KINDS[kind]}").splitlines()
    found: dict[str, Snippet] = {}
    for line in filter(None, map(_decoded, lines)):
        id_, score, words = line.split("\t")
        text = " ".join(words.split())
        found.setdefault(text, Snippet(id_, text, float(score)))
    return [snippet for snippet in found.values() if abs(snippet.score) >= 0.5]


def _file(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None  # the SHA-256 was checked
    return file.read()


def _decoded(line: bytes) -> str:
    """One line of a file that is UTF-8 but for a few lines of cp1252."""
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace").strip()


def split(snippets: Sequence[Snippet]) -> Split:
    """Cut into three by a hash of the review, or of the text where the id names none."""
    parts = Split([], [], [])
    dev, test = HELD_OUT_SHARES
    for snippet in sorted(snippets, key=lambda snippet: number_of(snippet.text)):
        review, underscore, _ = snippet.id.partition("_")
        place = number_of(review if underscore else snippet.text)
        parts[1 if place < dev else 2 if place < dev + test else 0].append(snippet)
    return parts

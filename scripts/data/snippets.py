"""Sentences with the mean of what twenty people felt in them: movie reviews, tweets and more.

The source distribution of `vaderSentiment` carries the data of its paper (Hutto and
Gilbert, ICWSM 2014), 23,703 sentences of four kinds, each scored by people from -4 to 4, so a real
classification task comes with pip alone. `fetch` gets the archive, `read` reads one kind,
`sentiment` makes of it two classes that are as large as each other, near enough, and splits them by
the text alone, so that the same sentence lands on the same side wherever this runs.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.packaged import new_folder, number_of, refusal, sha256

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
KINDS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
CLEAR_SCORE = 0.5  # a mean nearer to 0 says neither good nor bad
HELD_OUT_SHARES = (0.15, 0.35)  # of the development and of the test part


@dataclass(frozen=True, slots=True)
class Snippet:
    """One sentence.

    Attributes:
        id: As in the file; up to the underscore, if there is one, it names the review.
        text: The sentence.
        score: Mean of what people said, from -4 to 4.
    """

    id: str
    text: str
    score: float

    @property
    def label(self) -> int:
        """1 where the score is positive."""
        return int(self.score > 0)


@dataclass(frozen=True, slots=True)
class Split:
    """Snippets in three parts, no sentence in two of them.

    Attributes:
        train: To train on.
        dev: To choose by, such as a learning rate.
        test: To report on.
    """

    train: list[Snippet]
    dev: list[Snippet]
    test: list[Snippet]


def fetch(folder: Path) -> Path:
    """Return the source distribution in `folder`, downloaded by pip if it is not there yet.

    Raises:
        SystemExit: pip could not get it, or it is another file.
    """
    path = folder / SDIST
    if not path.is_file():
        with new_folder(folder / "download") as partial:
            _download(partial)
            folder.mkdir(parents=True, exist_ok=True)
            (partial / SDIST).replace(path)
        (folder / "download").rmdir()
    found = sha256(path)
    if found != SHA256:
        raise refusal(f"{SDIST} with SHA-256 {SHA256}", f"found {found}", f"Remove {path}")
    return path


def _download(folder: Path) -> None:
    """Let pip fetch the source distribution, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / SDIST).is_file():
        last = (done.stderr.strip() or "no file").splitlines()[-1]
        raise refusal(
            f"the source distribution of {PACKAGE}",
            f"pip could not download it ({last})",
            f"Put {SDIST} there by hand, or give the folder that holds it",
        )


def read(sdist: Path, kind: str = "movies") -> list[Snippet]:
    """Read the sentences of one kind, each text once.

    Args:
        sdist: What `fetch` returned.
        kind: One of `KINDS`.

    Returns:
        In the order of the file.

    Raises:
        SystemExit: The file is not what it was: a line without three columns.
    """
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None  # the SHA-256 was checked
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{KINDS[kind]}")
            assert file is not None
            lines = [_decoded(line) for line in file.read().splitlines()]
    found: dict[str, Snippet] = {}
    for number, line in enumerate(filter(None, lines), 1):
        columns = line.split("\t")
        if len(columns) != 3:
            raise refusal(f"line {number} of {kind}", f"{len(columns)} columns", f"Get {SDIST}")
        text = " ".join(columns[2].split())
        found.setdefault(text, Snippet(columns[0], text, float(columns[1])))
    return list(found.values())


def _decoded(line: bytes) -> str:
    """One line of a file that is UTF-8 but for a few lines of cp1252."""
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace").strip()


def sentiment(snippets: Sequence[Snippet]) -> list[Snippet]:
    """Those that are clearly good or clearly bad: a mean of at least 0.5 either way."""
    return [snippet for snippet in snippets if abs(snippet.score) >= CLEAR_SCORE]


def split(snippets: Sequence[Snippet]) -> Split:
    """Cut into three parts by a hash of the text, or of the review where the id names one.

    The order within a part is that of the hash, so that its first n rows are a fair sample.
    """
    parts: tuple[list[Snippet], list[Snippet], list[Snippet]] = ([], [], [])
    dev, test = HELD_OUT_SHARES
    for snippet in sorted(snippets, key=lambda snippet: number_of(snippet.text)):
        review, underscore, _ = snippet.id.partition("_")
        place = number_of(review if underscore else snippet.text)
        parts[1 if place < dev else 2 if place < dev + test else 0].append(snippet)
    return Split(*parts)

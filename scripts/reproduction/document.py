"""The document: what the paper says, what was found here, and whether it holds.

A stage gives a `Section` made of its records alone, so the document can be written at any
time from whatever runs are finished, and says what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOLDS, FAILS, OPEN, PARTLY = "holds", "**does not hold**", "undecided", "holds in part"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what was found.

    Attributes:
        claim: What the paper says, in one sentence.
        paper: Its figure.
        here: The figure here.
        verdict: `HOLDS`, `FAILS`, `PARTLY`, or `OPEN` where the noise is larger than what is asked.
    """

    claim: str
    paper: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """What a stage has to say.

    Attributes:
        title: Its heading.
        claims: The claims it is about.
        text: Paragraphs, tables and pictures, as Markdown.
        notes: What a reader must know besides the numbers.
    """

    title: str
    claims: Sequence[Claim]
    text: Sequence[str] = ()
    notes: Sequence[str] = field(default=())


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A table of Markdown; all columns but the first `words` are flush right."""
    rule = [":--" if i < words else "--:" for i in range(len(head))]
    lines = [head, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_above(difference: float, error: float, bound: float = 0.0) -> str:
    """Whether a difference is above a bound, two standard errors being the noise."""
    if difference - 2 * error > bound:
        return HOLDS
    return FAILS if difference + 2 * error < bound else OPEN


def n_bytes(number: float) -> str:
    """Bytes with a unit, to three figures or so."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number:.0f} bytes"


def picture(path: Path, document: Path, title: str) -> str:
    """A picture of Markdown, by its path from the document."""
    return f"![{title}]({path.relative_to(document.parent).as_posix()})"


def write(path: Path, head: str, sections: Mapping[str, Section | None], machine: str) -> None:
    """Write the whole document.

    Args:
        path: Where to.
        head: What stands above everything.
        sections: By the name of the stage; None where nothing of it was run.
        machine: Where and when, as Markdown.
    """
    lines = [head, "", "## All claims", ""]
    rows: list[Sequence[object]] = []
    for name, section in sections.items():
        if section is None:
            rows.append((f"stage `{name}`", "", "not run", ""))
        else:
            rows += [(c.claim, c.paper, c.here, c.verdict) for c in section.claims]
    lines += [table(("claim", "in the paper", "here", ""), rows, words=4), ""]
    for section in filter(None, sections.values()):
        lines += [f"## {section.title}", ""]
        for block in section.text:
            lines += [block, ""]
        if section.notes:
            lines += [*(f"- {note}" for note in section.notes), ""]
    lines += ["## Machine, versions, times", "", machine]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    partial.replace(path)


def where(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Say on what machine, with what versions, when, how long, and how busy it was.

    Args:
        found: What `benchmarks.report.machine` says.
        records: Those of all runs.
    """
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    dates = [record["date"] for record in records]
    wall, cpu = (sum(record[k] for record in records) / 60 for k in ("seconds", "cpu_seconds"))
    loads = sorted(record["load"] for record in records if "load" in record)
    lines = [
        (
            f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, "
            f"{found['capability']}; {found['system']}"
        ),
        f"Python {found['python']}; {versions}",
        (
            f"{len(records)} runs from {min(dates)} to {max(dates)}: {wall:.0f} minutes by the "
            "clock, "
            f"{cpu:.0f} minutes of processor time"
        ),
    ]
    if loads:
        lines.append(
            f"processes that wanted a core at the end of a run: median "
            f"{loads[len(loads) // 2]:.1f}, at most {loads[-1]:.1f}; with more of them processor "
            "time grows a little and wall-clock time much"
        )
    return "\n".join(f"- {line}" for line in lines)

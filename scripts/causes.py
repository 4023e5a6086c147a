"""What broke, in a line for each cause: of a pytest run, and of the other checks.

    python scripts/causes.py FOLDER

FOLDER has pytest's junit.xml and a NAME.log for each other check that failed. Tests that fail for
one reason share a line: the first exception of the chain, without the numbers and names in it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree as ET

WIDTH = 200  # of a line
VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?|/\S+")


def of_failure(text: str) -> str:
    """The line of a traceback as pytest prints it that says what happened first.

    An exception that was raised because of another one is printed after it.
    """
    for line in text.splitlines():
        if line.startswith("E  "):
            return line[1:].strip()
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def of_tests(path: Path) -> list[str]:
    """A line for each cause of failed tests, the most frequent one first."""
    first: dict[str, str] = {}
    tests: defaultdict[str, list[str]] = defaultdict(list)
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it
        for result in (*case.findall("failure"), *case.findall("error")):
            cause = of_failure(result.text or result.get("message", ""))
            kind = VARYING.sub("*", cause)
            first.setdefault(kind, cause)
            tests[kind].append(f"{case.get('classname') or ''}::{case.get('name')}".strip(":"))
    order = sorted(tests, key=lambda kind: -len(tests[kind]))
    return [
        line(counted(len(tests[k]), "test"), first[k], f"first in {tests[k][0]}") for k in order
    ]


def of_check(path: Path) -> str:
    """A line for another check that failed."""
    lines = [text for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    errors = [text for text in lines if "error" in text.lower()] or lines or ["no message"]
    return line(path.stem, errors[0], counted(len(lines), "line"))


def line(who: str, what: str, more: str) -> str:
    """One line, cut where it is long."""
    if len(what) > WIDTH:
        what = what[:WIDTH] + "..."
    return f"{who}: {what} ({more})"


def counted(n: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{n} {noun}{'s' * (n != 1)}"


def main() -> None:
    """Print all causes; exit with 1 if there is one."""
    folder = Path(sys.argv[1])
    causes = [of_check(path) for path in sorted(folder.glob("*.log"))]
    results = folder / "junit.xml"
    causes += of_tests(results) if results.exists() else ["pytest: it wrote no results"]
    for cause in causes:
        print(f"broken: {cause}")
    sys.exit(bool(causes))


if __name__ == "__main__":
    main()

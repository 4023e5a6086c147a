"""The command line: `lora-inject`, also `python -m lora_inject`.

A command is arguments, one call of the package, and printing. Results go to stdout,
progress and errors to stderr, and the exit code says which it was.
"""

from lora_inject.cli import analyze, look, on_disk  # which put their commands into the program
from lora_inject.cli.program import app, main

__all__ = ["analyze", "app", "look", "main", "on_disk"]

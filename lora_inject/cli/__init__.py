"""The command line: `lora-inject`, also `python -m lora_inject`.

A command is its arguments, one call of the package, and printing. Results go to stdout, progress
and errors to stderr.
"""

from lora_inject.cli.app import app, main

__all__ = ["app", "main"]

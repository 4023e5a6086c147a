"""The command line: `lora-inject`, also `python -m lora_inject`.

One idea: a command is arguments, one call of the package, and printing. Results go to stdout,
progress and errors to stderr, and the exit code says which it was.

What is not here: logic. What a command does is a function of the package, or of one of the modules
beside the commands.
"""

from lora_inject.cli import analysis, commands, on_disk  # which put their commands into the program
from lora_inject.cli.program import app, main

__all__ = ["analysis", "app", "commands", "main", "on_disk"]

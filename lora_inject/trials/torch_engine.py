"""What trials ask of autograd's engine: whether a backward will run a node."""

from __future__ import annotations

from lora_inject.private import look_up, needed

_NAME = "torch._C._will_engine_execute_node"

will_run = look_up(_NAME)
"""Say of a node whether the running backward will come to it; None where torch does not tell."""


def check_engine_tells() -> None:
    """Raise if this torch does not tell which nodes a backward runs."""
    needed(_NAME, "Trials")

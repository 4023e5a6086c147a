"""What the core asks of the rooms around it: by name, and imported only when it is asked for.

The core imports no room: where a verb needs what lies in one, this is the only way there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

ROOMS = {
    "algebra": "lora_inject.algebra.values",
    "experts": "lora_inject.experts.grouped",
    "formats": "lora_inject.formats",
    "from_peft": "lora_inject.formats.from_peft",
    "gathering": "lora_inject.distributed.gathering",
    "graphs": "lora_inject.compiled.graphs",
    "hub": "lora_inject.formats.hub",
    "libraries": "lora_inject.integrations.libraries",
    "mixtures": "lora_inject.experts.mixtures",
    "moving_buffers": "lora_inject.checks.moving_buffers",
    "on_parts": "lora_inject.experts.on_parts",
    "probing": "lora_inject.serving.probing",
    "reached": "lora_inject.checks.reached",
    "sharding": "lora_inject.distributed.sharding",
    "slots": "lora_inject.serving.slots",
    "stages": "lora_inject.distributed.stages",
    "stacks": "lora_inject.experts.stacks",
    "unused": "lora_inject.checks.unused",
}
"""What is asked for, to the module that answers."""

REGISTERED: list[Any] = []
"""Weight kinds from outside, asked before the rows of `WEIGHT_KINDS`, the newest first."""

_TABLES: dict[str, Any] = {}  # those that `library_rows` has been handed
_MADE: dict[str, Any] = {}  # the objects that `the_one` has made


def room(name: str) -> Any:
    """Return the module that answers.

    Examples:
        >>> room("from_peft").__name__
        'lora_inject.formats.from_peft'
    """
    return import_module(ROOMS[name])


def library_rows(name: str) -> Any:
    """Return a table of what is known of other libraries: the core is handed each of them once.

    Examples:
        >>> {len(row) for row in library_rows("WEIGHT_KINDS")}
        {2}
    """
    if name not in _TABLES:
        _TABLES[name] = getattr(room("libraries"), name)
    return _TABLES[name]


def standing_at(path: str) -> Any:
    """Return what a row names as `module:name`.

    Examples:
        >>> standing_at("lora_inject.checks.reached:unreached").__name__
        'unreached'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def the_one(path: str) -> Any:
    """Return the one object of a class, which a compiled forward finds made: it cannot import."""
    if path not in _MADE:
        _MADE[path] = standing_at(path)()
    return _MADE[path]

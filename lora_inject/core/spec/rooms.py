"""What the core asks of the rooms around it: by name, and imported only when it is asked for.

The core imports no room. What it can do without one, it does; where a verb needs what lies in a
room (a file of another program, the config of another library), this is the only way there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

ROOMS = {
    "formats": "lora_inject.formats",
    "from_peft": "lora_inject.formats.from_peft",
    "guards": "lora_inject.integrations.guards",
    "hub": "lora_inject.formats.hub",
}
"""What is asked for, to the module that answers."""


def room(name: str) -> Any:
    """Return the module that answers.

    Examples:
        >>> room("from_peft").__name__
        'lora_inject.formats.from_peft'
    """
    return import_module(ROOMS[name])

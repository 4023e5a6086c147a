"""What a process can hand on of a refusal."""

from collections.abc import Callable
from typing import Any

import lora_inject as li


def said(run: Callable[[], Any]) -> str:
    """What a refusal says, with its class; empty where it went through."""
    try:
        run()
    except li.LoraInjectError as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""

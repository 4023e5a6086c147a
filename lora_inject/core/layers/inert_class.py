"""The error of a class that leaves adapters without use."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from lora_inject.errors import LayerError


def refuse_inert_class(module: nn.Module, asked: str) -> NoReturn:
    """Raise for a module with adapters that was given a class without support for them."""
    cls = type(module).__name__
    problem = f"its layer has adapters and was later given the class {cls}, which leaves them inert"
    raise LayerError(asked, problem, "Eject them, then inject again")

"""Forwards that somebody has put onto an instance, before that of its class."""

from __future__ import annotations

from functools import cache

from torch import nn

from lora_inject.core.layers.library import Library, libraries, loaded_libraries
from lora_inject.errors import LayerError


def keepers(module: nn.Module) -> list[Library]:
    """Return the libraries that keep a forward of a module from before theirs."""
    return [library for library in loaded_libraries() if library.kept(module) is not None]


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the instance has a forward, and one that does not call that of its class."""
    if "forward" not in module.__dict__:
        return False
    return not any(library.calls_class(module) for library in loaded_libraries())


def check_not_offloaded(module: nn.Module) -> None:
    """Raise if a library offloads a module: gradients of copies are lost."""
    for library in _that_offload():  # asked in each forward of training
        if library.is_there() and library.offloads(module):
            raise LayerError(
                f"training an adapter on a {type(module).__name__} that is offloaded",
                "its forward gets copies of all parameters, whose gradients are lost",
                "Train without offload; for inference call model.eval()",
            )


@cache
def _that_offload() -> tuple[Library, ...]:
    return tuple(each for each in libraries() if type(each).offloads is not Library.offloads)

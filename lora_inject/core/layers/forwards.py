"""Forwards that somebody has put onto an instance, before that of its class.

The core knows none of the libraries that do so. What is known of one is a subclass of
`ForwardOwner` in the library's file, with a row in `FORWARD_OWNERS`
(`integrations/libraries.py`), and is imported only if the library is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lora_inject.core.spec.rooms import library_rows, the_one
from lora_inject.errors import LayerError


class ForwardOwner:
    """A library that puts forwards onto instances."""

    def kept(self, module: nn.Module) -> Any:
        """Return the forward of before, which the library's forward on an instance calls."""
        del module

    def keep(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let the library's forward on an instance call another one."""

    def calls_class(self, module: nn.Module) -> bool:
        """Return whether the forward on an instance is the library's and calls the class's."""
        del module
        return False

    def offloads(self, module: nn.Module) -> bool:
        """Return whether a forward gets copies of the Parameters, whose gradients are lost."""
        del module
        return False

    def away(self, modules: Iterable[nn.Module]) -> tuple[str, str] | None:
        """Return why weights of a model on the meta device have no values, and what to do."""
        del modules
        return None


def loaded_owners() -> list[ForwardOwner]:
    """Return those of the libraries that are loaded."""
    return [
        the_one(path) for library, path in library_rows("FORWARD_OWNERS") if library in sys.modules
    ]


def keepers(module: nn.Module) -> list[ForwardOwner]:
    """Return the libraries that keep a forward of a module from before theirs."""
    return [owner for owner in loaded_owners() if owner.kept(module) is not None]


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the instance has a forward, and one that does not call that of its class."""
    if "forward" not in module.__dict__:
        return False
    return not any(owner.calls_class(module) for owner in loaded_owners())


def check_not_offloaded(module: nn.Module) -> None:
    """Raise if a library offloads a module: gradients of copies are lost."""
    if any(owner.offloads(module) for owner in loaded_owners()):
        raise LayerError(
            f"training an adapter on a {type(module).__name__} that is offloaded",
            "its forward gets copies of all parameters, whose gradients are lost",
            "Train without offload; for inference call model.eval()",
        )

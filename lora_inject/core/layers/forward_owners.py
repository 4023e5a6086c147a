"""What the core asks of a library that puts forwards onto instances.

The core knows none of these libraries. What is known of one is a subclass of `ForwardOwner` in the
library's file, with a row in `FORWARD_OWNERS` (`integrations/libraries.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


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

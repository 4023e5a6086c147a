"""Forwards that somebody has put onto an instance, before that of its class.

What is known of a library that does so is a `ForwardOwner` (`forward_owners`), which is imported
only if the library is loaded.
"""

from __future__ import annotations

import sys

from torch import nn

from lora_inject.core.layers.forward_owners import ForwardOwner
from lora_inject.core.layers.offloaded import offloaded
from lora_inject.core.spec.rooms import library_rows, the_one


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
    for library, path in library_rows("FORWARD_OWNERS"):  # asked in each forward of training
        if library not in sys.modules or not the_one(path).offloads(module):
            continue
        raise offloaded(type(module))

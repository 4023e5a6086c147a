"""Models made of parts that are given by their dotted names."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def tree(parts: Mapping[str, nn.Module | nn.Parameter]) -> Any:
    """Return a module that holds each part under its dotted name, with plain modules between."""
    root = nn.Module()
    for name, part in parts.items():
        path, _, last = name.rpartition(".")
        owner = root
        for segment in path.split(".") if path else ():
            if segment not in owner._modules:
                owner.add_module(segment, nn.Module())
            owner = owner._modules[segment]
        if isinstance(part, nn.Parameter):
            owner.register_parameter(last, part)
        else:
            owner.add_module(last, part)
    return root

"""Models made of parts that are given by their dotted names, and experts that pick tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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


class Picking(nn.Module):
    """Experts that get the tokens whose first feature has their sign."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out, chosen = torch.zeros_like(flat), (flat[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero()[:, 0]
            if len(here):
                out = out.index_add(0, here, expert(flat[here]))
        return out.view_as(x)


def of_signs(signs: str, seed: int) -> Tensor:
    """One row for each word, one token for each sign."""
    words = signs.split()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(words), len(words[0]), 4, generator=generator).double() + 0.1
    return x * torch.tensor([[[1.0 if s == "+" else -1.0] for s in word] for word in words])

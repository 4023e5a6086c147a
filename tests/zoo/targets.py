"""What of a model is targeted: all Linear and Conv1D modules, and stacked experts.

A model that has neither is held to the same steps on its convolutions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from zoo.shrink import WIDTH

RANK, ALPHA = 2, 3.0

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EXPERTS = re.compile(r"(?:.*\.)?(?:experts|shared_experts|(?:in|out)put_linear)\.[a-z_]+")


@dataclass
class Targets:
    """What to adapt."""

    modules: dict[str, int]  # name to rank, which is 1 where a side is narrower than RANK
    experts: dict[str, str]  # name of a stacked parameter to its layout, `out_in` or `in_out`
    has_linear: bool  # the model has any Linear or Conv1D

    def config(self) -> dict[str, Any]:
        by_rank = [
            {"match": either(names), "rank": rank}
            for rank in (RANK, 1)
            if (names := [name for name, of in self.modules.items() if of == rank])
        ]
        by_layout = [
            {"match": either(names), "layout": layout}
            for layout in ("out_in", "in_out")
            if (names := [name for name, of in self.experts.items() if of == layout])
        ]
        return {"rank": RANK, "alpha": ALPHA, "targets": [*by_rank, *by_layout]}


def either(names: Iterable[str]) -> str:
    """A pattern that matches exactly these names."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def targets_of(model: nn.Module) -> Targets:
    """Return what of `model` is targeted."""
    shapes = {
        cls: {n: m.weight.flatten(1).shape for n, m in model.named_modules() if isinstance(m, cls)}
        for cls in ((nn.Linear, Conv1D), _CONVOLUTIONS)
    }
    linear, convolutions = shapes.values()
    modules = {name: RANK if min(shape) >= RANK else 1 for name, shape in linear.items()}
    wide = {name: RANK for name, shape in convolutions.items() if min(shape) >= RANK}
    experts = {
        name: _layout(name, parameter.shape, model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and _EXPERTS.fullmatch(name)
    }
    return Targets(modules or wide, experts, has_linear=bool(modules))


def _layout(name: str, shape: tuple[int, ...], owner: nn.Module) -> str:
    """Tell the layout from the side that is the model's width, and see that the owner agrees."""
    assert (shape[-2] == WIDTH) != (shape[-1] == WIDTH), f"{name} {shape}: cannot tell the layout"
    ends_in_width = "down" in name or "output" in name
    out_in = shape[-2 if ends_in_width else -1] == WIDTH
    stated = getattr(owner, "is_transposed", None)
    assert stated is None or stated is not out_in, f"{name} {shape}: is_transposed={stated}"
    return "out_in" if out_in else "in_out"

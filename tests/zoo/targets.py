"""What of a model is targeted: all Linear and Conv1D modules, and stacked experts.

A model that has neither is held to the same steps on its convolutions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from zoo.shrink import WIDTH

RANK, ALPHA = 2, 3.0

_EXPERTS = re.compile(r"(?:.*\.)?(?:experts|shared_experts|(?:in|out)put_linear)\.[a-z_]+")


@dataclass
class Targets:
    """What to adapt.

    Attributes:
        modules: Name to rank, which is 1 where a side is narrower than RANK.
        experts: Name of a stacked parameter to its layout, `out_in` or `in_out`.
        refused: Names of Linear modules that cannot carry an adapter.
        has_linear: Whether the model has any Linear or Conv1D.
    """

    modules: dict[str, int] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    has_linear: bool = True

    def config(self) -> dict[str, Any]:
        """Return the config."""
        rules: list[Any] = []
        for rank in (RANK, 1):
            names = [name for name, r in self.modules.items() if r == rank]
            if names:
                rules.append({"match": either(names), "rank": rank})
        for layout in ("out_in", "in_out"):
            names = [name for name, found in self.experts.items() if found == layout]
            if names:
                rules.append({"match": either(names), "layout": layout})
        return {"rank": RANK, "alpha": ALPHA, "targets": rules}


def either(names: Iterable[str]) -> str:
    """A pattern that matches exactly these names."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def targets_of(model: nn.Module) -> Targets:
    """Return what of `model` is targeted."""
    found = Targets()
    modules = dict(model.named_modules())
    candidates = inventory(Survey(model)).candidates
    for c in candidates:
        if c.kind in ("linear", "conv1d"):
            if c.refusal is not None:
                found.refused.append(c.name)
            else:
                found.modules[c.name] = RANK if min(c.in_features, c.out_features) >= RANK else 1
        elif c.kind == "parameter" and len(c.weight_shape) == 3 and _EXPERTS.fullmatch(c.name):
            found.experts[c.name] = _layout(c.name, c.weight_shape, modules[c.owner])
    if not found.modules:
        found.has_linear = False
        found.modules = {
            c.name: RANK
            for c in candidates
            if c.kind == "conv" and min(c.in_features, c.out_features) >= RANK
        }
    return found


def _layout(name: str, shape: tuple[int, ...], owner: nn.Module) -> str:
    """Tell the layout from the side that is the model's width, and see that the owner agrees."""
    assert (shape[-2] == WIDTH) != (shape[-1] == WIDTH), f"{name} {shape}: cannot tell the layout"
    ends_in_width = "down" in name or "output" in name
    out_in = shape[-2 if ends_in_width else -1] == WIDTH
    stated = getattr(owner, "is_transposed", None)
    assert stated is None or stated is not out_in, f"{name} {shape}: is_transposed={stated}"
    return "out_in" if out_in else "in_out"

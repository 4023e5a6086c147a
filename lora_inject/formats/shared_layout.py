"""The names and shapes of stacks `experts.w1`, `w2` and `w3`, and the single experts in them.

See `shared_experts`, which writes them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_inject.errors import FormatError

_Shape = tuple[int, ...] | None
_STACK = re.compile(r".+\.experts\.w[123]")
_KEY = re.compile(r"(.+\.experts)\.(w[123])\.lora_([AB])\.weight")
_NAMINGS = (("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"))


def is_shared_layout(names: Collection[str]) -> bool:
    """Return whether a file's keys are of this layout."""
    return any(_KEY.fullmatch(name) for name in names)


def of_one(name: str, a: _Shape, b: _Shape) -> tuple[_Shape, _Shape]:
    """Return the shapes of A and B of a module; of a stack of this layout those of one expert.

    Examples:
        >>> of_one("mlp.experts.w1", (1, 8, 64), (4, 32, 8))
        ((8, 64), (32, 8))
        >>> of_one("mlp.up_proj", (8, 64), (32, 8))
        ((8, 64), (32, 8))
    """
    if not _STACK.fullmatch(name):
        return a, b
    return (a and a[1:]), (b and b[1:])


def as_single_experts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a file with a pair for each expert, as PEFT names them.

    The config's targets tell how the base calls a matrix.

    Raises:
        FormatError: A tensor is no stack, or the stacks of a block have other numbers of experts.
    """
    targets = config.get("target_modules")
    said = targets if isinstance(targets, list) else ()
    naming = next((n for n in _NAMINGS if {*n} & {*said}), _NAMINGS[0])
    counts = _n_experts(tensors)
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            made[key] = tensor
            continue
        block, part, role = match.groups()
        for expert in range(counts[block]):
            name = f"{block}.{expert}.{naming[int(part[1]) - 1]}.lora_{role}.weight"
            made[name] = tensor[expert if len(tensor) > 1 else 0]
    return made


def _n_experts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many experts each block has."""
    sizes: dict[str, set[int]] = defaultdict(set)
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is not None:
            if tensor.dim() != 3:
                problem = f"it has {tensor.dim()} dimensions, and a stack has 3"
                raise FormatError(f"tensor '{key}'", problem, "Fetch the file again")
            sizes[match[1]].add(len(tensor))
    for block, several in sizes.items():
        if len(own := sorted(several - {1})) > 1:
            problem = f"its stacks are of {', '.join(map(str, own))} experts"
            raise FormatError(f"experts '{block}'", problem, "Fetch the file again")
    return {block: max(several) for block, several in sizes.items()}

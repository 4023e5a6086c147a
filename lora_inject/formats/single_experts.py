"""Names of single experts, and the stacks `experts.w1`, `w2` and `w3` that servers load.

Such a stack is one tensor for the A or the B of all experts. A file's tensors are rewritten here,
both ways: a pair for each expert, as PEFT names them, and the stacks of the matrices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import FormatError

_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_PAIR = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_STACK = re.compile(r"(.+\.experts)\.(w[123])\.lora_([AB])\.weight")
_NAMINGS = (("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"))
_NUMBERS = {name: number for naming in _NAMINGS for number, name in enumerate(naming, 1)}
_SHARED = {1: "A", 2: "B", 3: "A"}
"""By the number of a matrix: the factor that all experts have in common, in stacks once."""


def block_and_part(name: str) -> tuple[str, int, str] | None:
    """Return the block, the number and the matrix of a single expert; None for another name.

    Examples:
        >>> block_and_part("mlp.experts.3.up_proj")
        ('mlp.experts', 3, 'up_proj')
    """
    match = _SINGLE.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def missing_matrices(names: Iterable[str], known: Collection[str] = ()) -> list[str]:
    """Return the matrices of adapted blocks that have no pair.

    Args:
        names: The adapted modules.
        known: The base's modules; without them a block has the experts up to the last adapted one,
            and each has what one of them has.

    Examples:
        >>> missing_matrices(["mlp.experts.0.up_proj", "mlp.experts.2.up_proj"])
        ['mlp.experts.1.up_proj']
    """
    adapted = {name: place for name in names if (place := block_and_part(name))}
    blocks: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for block, number, part in adapted.values():
        blocks[block].add((number, part))
    due = {name for name in known if (place := block_and_part(name)) and place[0] in blocks}
    for block, there in blocks.items() if not due else ():
        parts, last = {part for _, part in there}, max(there)[0]
        due |= {f"{block}.{number}.{part}" for number in range(last + 1) for part in parts}
    return sorted(due - adapted.keys())


def has_server_stacks(keys: Iterable[str]) -> bool:
    """Return whether keys of a file are of such stacks."""
    return any(".experts.w" in key and _STACK.fullmatch(key) for key in keys)


def as_single_experts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a file with a pair for each expert, as PEFT names them.

    The config's targets tell how the base calls a matrix.

    Raises:
        FormatError: A tensor is no stack, or the stacks of a block have other numbers of experts.
    """
    if not has_server_stacks(tensors):
        return dict(tensors)
    targets = config.get("target_modules")
    said = targets if isinstance(targets, list) else []
    naming = next((n for n in _NAMINGS if any(part in said for part in n)), _NAMINGS[0])
    places = {key: match.groups() for key in tensors if (match := _STACK.fullmatch(key))}
    sizes: dict[str, set[int]] = defaultdict(set)
    for key, (block, _, _) in places.items():
        if tensors[key].dim() != 3:
            problem = f"it has {tensors[key].dim()} dimensions, and a stack has 3"
            raise FormatError(f"tensor '{key}'", problem, "Fetch the file again")
        sizes[block].add(len(tensors[key]))
    for block, several in sizes.items():
        if len(own := sorted(several - {1})) > 1:
            problem = f"its stacks are of {', '.join(map(str, own))} experts"
            raise FormatError(f"experts '{block}'", problem, "Fetch the file again")
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key not in places:
            made[key] = tensor
            continue
        block, part, role = places[key]
        for expert in range(max(sizes[block])):
            name = f"{block}.{expert}.{naming[int(part[1]) - 1]}.lora_{role}.weight"
            made[name] = tensor[expert if len(tensor) > 1 else 0]
    return made


def as_server_stacks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the pairs of single experts in stacks.

    Raises:
        FormatError: Servers do not know a matrix, or experts have factors of their own where the
            layout has one for all.
    """
    made: dict[str, Tensor] = {}
    stacks: dict[tuple[str, int, str], dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if (match := _PAIR.fullmatch(key)) is None:
            made[key] = tensor
            continue
        block, expert, name, role = match.groups()
        if name not in _NUMBERS:
            problem = f"servers know {', '.join(_NUMBERS)}, not {name!r}"
            raise FormatError(f"tensor '{key}'", problem, 'Write it with format="vllm"')
        stacks[block, _NUMBERS[name], role][int(expert)] = tensor
    for (block, number, role), of in stacks.items():
        first, *others = each = [of[expert] for expert in sorted(of)]
        if role == _SHARED[number] and not all(torch.equal(first, other) for other in others):
            problem = f"each expert has its own {role}, and the layout has one for all"
            remedy = "Train it with share: A on gate and up and share: B on down, or write a pair "
            remedy += 'for each expert: format="vllm"'
            raise FormatError(f"experts '{block}.w{number}'", problem, remedy)
        stacked = [first] if role == _SHARED[number] else each
        made[f"{block}.w{number}.lora_{role}.weight"] = torch.stack(stacked)
    return made

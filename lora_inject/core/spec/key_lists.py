"""The inventory of a checkpoint's keys and shapes, which do not state kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import around, canonical, is_bias, leaf, parent


def inventory_of(shapes: Mapping[str, tuple[int, ...]]) -> Inventory:
    """Make an inventory of a checkpoint's keys and shapes, which do not state kinds.

    A two-dimensional `X.weight` is taken for a linear layer, `(in, out)` where the length of
    `X.bias` says so; one of three to five dimensions for a convolution. Other tensors of two
    or more dimensions are parameters. Counts of A and B do not depend on what is assumed.

    Examples:
        >>> inventory = inventory_of({"h.0.q.weight": (4, 8), "h.0.ln.weight": (8,)})
        >>> [(c.name, c.kind, c.in_features) for c in inventory.candidates]
        [('h.0.q', 'linear', 8)]
        >>> inventory.others["h.0.ln"]
        'no matrix'
    """
    parameters = {canonical(key): tuple(shape) for key, shape in shapes.items()}
    candidates = []
    others = dict[str, str]()
    for key in shapes:
        name = canonical(key)
        candidate = _assume(name, key, parameters)
        if candidate is not None:
            candidates.append(candidate)
        else:
            others[name] = "bias" if is_bias(name) else f"{len(parameters[name])}-d tensor"
    known = {candidate.name for candidate in candidates}
    others.update(_modules_around(parameters, known))
    return Inventory(tuple(candidates), others, parameters, assumed=True)


def _modules_around(parameters: Iterable[str], known: set[str]) -> dict[str, str]:
    """Return the modules around parameters that are not candidates, with the reason."""
    owners = dict.fromkeys(map(parent, parameters), "no matrix")
    reasons = owners | dict.fromkeys(around(owners), "container")
    return {name: why for name, why in reasons.items() if name and name not in known}


def _assume(name: str, key: str, parameters: Mapping[str, tuple[int, ...]]) -> Candidate | None:
    """Return what a tensor is assumed to be, or None."""
    shape = parameters[name]
    if len(shape) < 2 or is_bias(name) or 0 in shape:
        return None
    module, (rows, columns) = parent(name), shape[-2:]
    if not module or leaf(name) != "weight" or len(shape) > 5:
        stack = math.prod(shape[:-2]) if len(shape) > 2 else None
        return Candidate(
            name, "parameter", columns, rows, shape, key, False, stack, module,
            needs_layout=len(shape) > 2, update="weight",
        )  # fmt: skip
    if len(shape) > 2:
        return Candidate(module, "conv", math.prod(shape[1:]), shape[0], shape, key)
    if rows != columns and parameters.get(f"{module}.bias") == (columns,):
        return Candidate(module, "conv1d", rows, columns, shape, key, transposed=True)
    return Candidate(module, "linear", columns, rows, shape, key)

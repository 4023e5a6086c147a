"""All names of a model or a checkpoint, with what matching needs to know of each.

A live model, a model on the meta device and a checkpoint's key list all become one
`Inventory`, so the same code plans them all. Of a key list the kinds are guessed, and it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_inject.spec.names import canonical, is_bias, leaf, parent


class Candidate(NamedTuple):
    """A module or a parameter that may become a site; a tuple, as a model has thousands.

    Attributes:
        name: Canonical dotted name.
        kind: Row of the table of layer kinds: `linear`, `conv1d`, `embedding`, `conv`, ...; or
            `parameter`.
        in_features: Width of the input of A.
        out_features: Width of the output of B.
        weight_shape: Shape of the weight tensor.
        weight: Name of the weight tensor in the state dict.
        transposed: True where the weight matrix is `(in, out)`.
        experts: Number of stacked matrices, or None.
        owner: For a parameter, the name of the module that owns it.
        aliases: Other names of the same module or parameter.
        tied: Names of the same tensor in other modules.
        refusal: None, or what was found and what to do, where it may not be adapted.
        needs_layout: True for a stacked parameter, whose rule must say which dimension is which.
        update: `forward`, or `weight` where the weight is read rather than the module called.
        dtype: The weight's dtype, such as `bfloat16`, or empty where it is not known.
        members: Names of the candidates for which this one stands: whoever names an attention
            module means its projections. Such a name is not a site itself.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    weight: str
    transposed: bool = False
    experts: int | None = None
    owner: str = ""
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    refusal: tuple[str, str] | None = None
    needs_layout: bool = False
    update: Literal["forward", "weight"] = "forward"
    dtype: str = ""
    members: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module whose biases belong to this candidate."""
        return self.owner if self.kind == "parameter" else self.name

    def as_parameter(self, name: str) -> Candidate:
        """Return the same weight as a parameter, for a pattern that matches the weight alone."""
        return self._replace(
            name=name, kind="parameter", owner=self.name, update="weight", aliases=()
        )


@dataclass(frozen=True)
class Inventory:
    """All names of a model or a checkpoint, with what matching needs to know of each.

    Attributes:
        candidates: What may become a site, in model order.
        others: Every other name of a module or a parameter, with the short reason why it may not:
            `container`, `LayerNorm`, `Dropout`, ...
        parameters: Shape of every parameter, by canonical name, a tied one under its first name.
        assumed: True where kinds were assumed from names and shapes.
        aliases: Further names of parameters, with the one under which `parameters` has them.
        heads: Names of the output head, as the model itself states it.
        buffers: Names of buffers, which no pattern may mean.
    """

    candidates: tuple[Candidate, ...]
    others: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    assumed: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    @classmethod
    def from_keys(cls, shapes: Mapping[str, tuple[int, ...]]) -> Inventory:
        """Make an inventory of a checkpoint's keys and shapes, which tell no kinds.

        A two-dimensional `X.weight` is taken for a linear layer, `(in, out)` where the length of
        `X.bias` says so; one of three to five dimensions for a convolution. Other tensors of two
        or more dimensions are parameters. Counts of A and B do not depend on what is assumed.

        Examples:
            >>> inventory = Inventory.from_keys({"h.0.q.weight": (4, 8), "h.0.ln.weight": (8,)})
            >>> [(c.name, c.kind, c.in_features) for c in inventory.candidates]
            [('h.0.q', 'linear', 8)]
            >>> inventory.others["h.0.ln"]
            'no matrix'
        """
        parameters = {canonical(key): tuple(shape) for key, shape in shapes.items()}
        candidates, others = [], dict[str, str]()
        for key in shapes:
            name = canonical(key)
            candidate = _assume(name, key, parameters)
            if candidate is not None:
                candidates.append(candidate)
            else:
                others[name] = "bias" if is_bias(name) else f"{len(parameters[name])}-d tensor"
        known = {candidate.name for candidate in candidates}
        others.update(_modules_around(parameters, known))
        return cls(tuple(candidates), others, parameters, assumed=True)


def _modules_around(parameters: Iterable[str], known: set[str]) -> dict[str, str]:
    """Return the modules that parameters lie in and that are not candidates, with the reason."""
    owners = dict.fromkeys(parent(name) for name in parameters)
    containers: dict[str, None] = {}
    for owner in owners:
        module = parent(owner)
        while module and module not in containers:
            containers[module] = None
            module = parent(module)
    reasons = {**dict.fromkeys(owners, "no matrix"), **dict.fromkeys(containers, "container")}
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

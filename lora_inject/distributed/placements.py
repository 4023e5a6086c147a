"""Adapters of weights that each process has a part of: which part of A and B goes with it.

| the weight is sharded along | A | B |
|---|---|---|
| its outputs (colwise) | whole | along its outputs |
| its inputs (rowwise, rows of a vocabulary) | along its inputs | whole |
| the experts of a stack | along the experts, whole if all share it | the same |
| nothing | whole | whole |

A trained copy goes with what it is a copy of. What is whole is the same in every process, and its
gradient is summed over them: that is what DTensors do, of which such adapters consist.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.survey import Carried
from lora_inject.core.layers.weight_kinds import is_quantized
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import LayerError

_FIRST = (
    "Inject or load first, then shard: parallelize_module distributes an adapter with its layer"
)


def check_parts(asked: str, carried: Iterable[Carried], *, gathered: bool = False) -> None:
    """Check that each entry of a new adapter can go with the parts of its weight.

    Args:
        asked: What messages begin with.
        carried: The places of the entries.
        gathered: Whether FSDP2 brings the weights together over all axes of the mesh but the last.

    Raises:
        LayerError: It cannot; nothing has changed.
    """
    for place in carried:
        if (reason := _against(place, gathered=gathered)) is not None:
            raise LayerError(f"{asked}, {place.name!r}", *reason)


def _against(place: Carried, *, gathered: bool) -> tuple[str, str] | None:
    """Return why an entry cannot go with the parts of its weight, and what to do."""
    weight, spec = place.weight, place.entry.spec
    if is_quantized(weight):
        return "its weight is quantized, and the model is spread over processes", _FIRST
    if not hasattr(weight, "full_tensor"):
        if spec is not None and spec.dropout:
            problem = "each process has this weight whole, and would drop other elements"
            return f"{problem} (dropout {spec.dropout:g})", "Give its rule dropout: 0"
        return None
    placements = weight.placements  # type: ignore[attr-defined]
    if len(placements) > 1 and not gathered:
        return f"its weight is {placements}, on a mesh of several axes", _FIRST
    shard = _shard(weight)
    if shard is not None and place.entry.rows is not None:
        problem = "its rows are in several processes, and single ones are to train"
        return problem, "Leave the tokens out, or shard with fully_shard"
    return None if shard is None or spec is None else _against_site(place, spec, shard)


def _against_site(place: Carried, spec: SiteSpec, shard: Any) -> tuple[str, str] | None:
    """Return the same of a site on a weight of which each process has a part."""
    along = _along(place, shard)
    if spec.variant != "lora":
        problem = f"variant {spec.variant} needs the norms of a weight that is sharded here"
        return problem, "Train it with variant: lora, or shard with fully_shard"
    if along == "":
        axis, n = _axis(place.weight, shard), place.weight.dim()
        return f"its weight is sharded along axis {axis} of {n}", _FIRST
    if along == "out" and spec.slices is not None:
        return "its slices are parts of an output that is sharded", _FIRST
    if along == "experts" and spec.only is not None:
        problem = "only some experts are to be adapted, and each process has other ones"
        return problem, "Leave only out of the rule, or load the model without expert parallelism"
    return None


def distribute(place: Carried, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put the parts of this process in place of an entry's whole tensors.

    Args:
        place: The entry.
        made: What was made of each tensor so far; tied copies stay one tensor.
    """
    if not hasattr(place.weight, "full_tensor"):
        return
    module = place.module
    for role, flat in place.entry.names.items():
        whole = module._parameters[flat]
        assert whole is not None
        if whole not in made:
            made[whole] = _part(whole, place, role)
        module._parameters[flat] = made[whole]


@torch.no_grad()
def _part(whole: nn.Parameter, place: Carried, role: str) -> nn.Parameter:
    """Return a tensor of an adapter as a DTensor on the mesh of its weight."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    weight: Any = place.weight
    last, n_axes = _placement(place, role, whole), weight.device_mesh.ndim
    placements = [*[Replicate()] * (n_axes - 1), last]
    made = distribute_tensor(whole.detach(), weight.device_mesh, placements)
    return nn.Parameter(made.clone(), whole.requires_grad)


def _placement(place: Carried, role: str, whole: Tensor) -> Any:
    """Return how a tensor of an entry lies over the last axis of the mesh of its weight."""
    from torch.distributed.tensor import Replicate

    shard, spec = _shard(place.weight), place.entry.spec
    if shard is None:
        return Replicate()
    if spec is None:
        return shard
    along, factor = _along(place, shard), role[0]
    if along == "experts":
        return _moved(shard, 0) if len(whole) > 1 else Replicate()
    if (along, factor) == ("out", "B"):
        return _moved(shard, whole.dim() - 2)
    if (along, factor) == ("in", "A"):
        return _moved(shard, whole.dim() - 1)
    return Replicate()


def _shard(weight: Any) -> Any:
    """Return how a weight is sharded over the last axis of its mesh; None if it is not."""
    last = weight.placements[-1]
    return last if hasattr(last, "dim") else None


def _moved(shard: Any, dim: int) -> Any:
    """Return the same way of sharding along another axis."""
    if hasattr(shard, "split_factor"):
        return type(shard)(dim, split_factor=shard.split_factor)
    return type(shard)(dim)


def _axis(weight: Tensor, shard: Any) -> int:
    return int(shard.dim) % weight.dim()


def _along(place: Carried, shard: Any) -> str:
    """Return what a weight is sharded along: `out`, `in`, `experts`, or "" for anything else."""
    spec, weight = place.entry.spec, place.weight
    assert spec is not None
    axis, stacked = _axis(weight, shard), spec.experts is not None
    if weight.dim() != 2 + stacked:  # a convolution, or stacks of stacks
        return "out" if axis == 0 and not spec.transposed and not stacked else ""
    if stacked and axis == 0:
        return "experts"
    rows = axis == weight.dim() - 2
    return "out" if rows != spec.transposed else "in"

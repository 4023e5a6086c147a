"""Room for adapters that are not known yet: a slot of zeros, which takes any adapter up to a rank.

An adapter that is swapped in takes a part of the slot's A and B, and its scale is multiplied into
B; the rest is zero, and so are sites that it does not have. So no tensor of the model changes its
shape, and no number is a constant in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.model.inject import plan
from lora_inject.core.model.load import install
from lora_inject.core.roots.root import root_of
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.sites import SiteSpec, meaning
from lora_inject.errors import FormatError, StateError, within
from lora_inject.formats.pairs import refuse_more_than_pairs, site_in_pairs

M = TypeVar("M", bound=nn.Module)
Targets = Sequence[str | dict[str, Any]]


def reserve(model: M, name: str = "slot", *, rank: int, targets: Targets = ("all-linear",)) -> M:
    """Put an adapter of zeros onto a model, into which `swap_adapter` puts others up to a rank.

    What is swapped in may have other ranks, scales and slices at each site, and fewer sites. The
    model keeps its tensors, and a compiled one its graph. As after `load_adapter`, the slot is
    active only where no adapter of the model is active, and does not train.

    Args:
        model: Any module.
        name: Name of the slot.
        rank: The highest rank; each forward costs as much.
        targets: The sites, as in a config, as whole layers.

    Returns:
        The same object.

    Raises:
        ConfigError: The rank is not a whole number above 0.
        MatchError: A target matches nothing.
        LayerError: A matched module cannot carry an adapter.
        StateError: The name is in use, the model is merged, or a target has slices.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> from lora_inject.core.model.read_off import adapter_state
        >>> from lora_inject.core.model.swap import swap_adapter
        >>> net = nn.Sequential(nn.Linear(4, 6))
        >>> small = adapter_state(inject(net, {"rank": 2, "targets": ["0"]}))
        >>> _ = reserve(net, "slot", rank=8, targets=["0"])
        >>> _ = swap_adapter(net, small, "slot")
        >>> tuple(adapter_state(net, "slot").sites["0"].A.shape)
        (8, 4)
    """
    config = Config.from_dict({"rank": rank, "alpha": rank, "targets": targets})
    sites = {}
    for spec in plan(model, config).sites:
        is_plain = spec.slices is None and spec.variant == "lora" and not spec.lora_bias
        is_plain = is_plain and spec.init == config.init
        if not is_plain or spec.rank != rank or spec.scale != 1:
            problem = (
                "a slot has whole layers, one rank, scale 1, and no variant or start of its own"
            )
            raise StateError(f"reserve {name!r}, {spec.name!r}", problem, "Give patterns only")
        sites[spec.name] = _zeros(spec)
    install(model, AdapterState(sites), name, base="any")
    root_of(model, f"reserve {name!r}")[1].adapters[name].is_slot = True
    return model


def _zeros(spec: SiteSpec) -> SiteState:
    return SiteState(spec, torch.zeros(spec.a_shape), torch.zeros(spec.b_shape))


@torch.no_grad()
def placed(slot: AdapterState, state: AdapterState) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a slot, or parts of them, each with its new values.

    Raises:
        FormatError: The adapter has a higher rank, a site that the slot has not or other parts of
            a weight, or more than A and B; or values become infinite.
    """
    refuse_more_than_pairs(state, "a slot", {site.spec.kind for site in state.sites.values()})
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, held in slot.sites.items():
        if name not in state.sites:
            pairs += [(tensor, _zeros_like(tensor)) for tensor in held.tensors.values()]
            continue
        with within(f"site {name!r}"):
            pairs += _placed_at(held, state.sites[name])
    return pairs


def _placed_at(held: SiteState, site: SiteState) -> list[tuple[Tensor, Tensor]]:
    """Return the same for one site of both."""
    room, plain = held.spec.rank, site_in_pairs(site)
    if plain.spec.rank > room:
        problem = f"its rank is {plain.spec.rank}, and the slot has room for {room}"
        remedy = f"Reserve a slot of rank {plain.spec.rank}, or truncate the adapter"
        raise FormatError("", problem, remedy)
    if meaning(plain.spec) != meaning(held.spec):
        problem = "it adapts other parts of the weight than the slot"
        raise FormatError("", problem, "Load it under another name")
    wide = plain.B.double() * plain.scale  # the slot's is 1
    scaled = wide.to(held.B.dtype)
    if lost_by_cast(wide, scaled):
        problem = f"its values are not finite in {scaled.dtype}, or so small that they become 0"
        raise FormatError("", problem, "Reserve over a base of a wider dtype")
    return [*_parts(held.A, plain.A, -2), *_parts(held.B, scaled, -1)]


def _parts(held: Tensor, value: Tensor, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Return the part of a tensor of a slot that a value takes, and the rest with zeros."""
    rank, room = value.shape[dim], held.shape[dim]
    if rank == room:
        return [(held, value)]
    if hasattr(held, "full_tensor"):  # a part of shards is no part of the memory
        return [(held, F.pad(value, (0, room - rank) if dim == -1 else (0, 0, 0, room - rank)))]
    rest = held.narrow(dim, rank, room - rank)
    return [(held.narrow(dim, 0, rank), value), (rest, _zeros_like(rest))]


def _zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros of the shape, dtype and device of a tensor, in the memory of one number."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

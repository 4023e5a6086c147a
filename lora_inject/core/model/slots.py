"""Room for adapters that are not known yet: a slot of zeros, which takes any adapter up to a rank.

An adapter that is swapped in takes a part of the slot's A and B, and its scale is multiplied into
B; the rest is zero, and so are sites that it does not have. So no tensor of the model changes its
shape, and no number is a constant in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.install import install
from lora_inject.core.model.planning import plan
from lora_inject.core.roots.carried import records_of
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.sites import SiteSpec, meaning
from lora_inject.errors import FormatError, StateError
from lora_inject.formats.peft.tensor_layout import file_rank
from lora_inject.formats.plain import refuse_more_than_pairs, site_in_pairs

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
    config = Config.from_dict({"rank": rank, "alpha": rank, "targets": [*targets]})
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
    for _, root in records_of(Survey(model), name):
        root.slots.add(name)
    return model


def _zeros(spec: SiteSpec) -> SiteState:
    return SiteState(spec, torch.zeros(spec.a_shape), torch.zeros(spec.b_shape))


def refuse_in_slot(state: AdapterState, slot: AdapterState) -> None:
    """Refuse an adapter that has a higher rank than a slot, or what no slot holds.

    Raises:
        FormatError: It does.
    """
    kinds = {site.spec.kind for site in state.sites.values()}
    refuse_more_than_pairs(state, "a slot", kinds)
    room = next(iter(slot.sites.values())).spec.rank
    for name, site in state.sites.items():
        rank = file_rank(site.spec)
        if rank > room:
            problem = f"its rank is {rank}, and the slot has room for {room}"
            remedy = f"Reserve a slot of rank {rank}, or truncate the adapter"
            raise FormatError(f"site {name!r}", problem, remedy)


def present(slot: AdapterState, state: AdapterState) -> AdapterState:
    """Return the part of a slot at the sites that an adapter has."""
    sites = {
        name: held
        for name, held in slot.sites.items()
        if any(known in state.sites for known in (name, *held.spec.aliases))
    }
    return replace(slot, sites=sites)


@torch.no_grad()
def placed(
    slot: AdapterState, state: AdapterState, sites: Mapping[str, SiteState]
) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a slot, or parts of them, each with its new values.

    Args:
        slot: The slot.
        state: The adapter.
        sites: Sites of the slot by their names in the adapter.

    Raises:
        FormatError: A site adapts other parts of the weight, or values become infinite.
    """
    zeros = _Zeros()
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, held in sites.items():
        plain = site_in_pairs(state.sites[name])
        if meaning(plain.spec) != meaning(held.spec):
            problem = "it adapts other parts of the weight than the slot"
            raise FormatError(f"site {name!r}", problem, "Load it under another name")
        # The slot's scale is 1.
        wide = plain.B.double() * plain.scale
        scaled = wide.to(held.B.dtype)
        if lost_by_cast(wide, scaled):
            problem = f"its values are not finite in {scaled.dtype}, or so small that they become 0"
            raise FormatError(f"site {name!r}", problem, "Reserve over a base of a wider dtype")
        pairs += _parts(held.A, plain.A, -2, zeros)
        pairs += _parts(held.B, scaled, -1, zeros)
    others = slot.sites.keys() - {held.spec.name for held in sites.values()}
    empty = (tensor for name in others for tensor in slot.sites[name].tensors.values())
    return [*pairs, *((tensor, zeros.like(tensor)) for tensor in empty)]


def _parts(held: Tensor, value: Tensor, dim: int, zeros: _Zeros) -> list[tuple[Tensor, Tensor]]:
    """Return the part of a tensor of a slot that a value takes, and the rest with zeros."""
    rank, room = value.shape[dim], held.shape[dim]
    if rank == room:
        return [(held, value)]
    if hasattr(held, "full_tensor"):  # a part of shards is no part of the memory
        return [(held, F.pad(value, (0, room - rank) if dim == -1 else (0, 0, 0, room - rank)))]
    rest = held.narrow(dim, rank, room - rank)
    return [(held.narrow(dim, 0, rank), value), (rest, zeros.like(rest))]


class _Zeros:
    """Zeros of any shape, each in the memory of one number; made once for each shape."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return zeros of the shape, dtype and device of a tensor."""
        kind = (tensor.shape, tensor.dtype, tensor.device)
        if kind not in self._made:
            zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
            self._made[kind] = zero.expand(tensor.shape)
        return self._made[kind]

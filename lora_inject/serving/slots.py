"""Room for adapters that are not known yet: a slot of zeros, which takes any adapter up to a rank.

An adapter that is swapped in gets the slot's form: A and B are padded with zeros to its rank, the
scale is multiplied into B, and sites that it does not have are zero. So no tensor of the model
changes its shape, and no number is a constant in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import records_of
from lora_inject.core.model.inject import plan
from lora_inject.core.model.load import install
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, StateError, within
from lora_inject.formats.peft.tensor_layout import file_rank
from lora_inject.formats.plain import plain_sites

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


def in_slot(state: AdapterState, slot: AdapterState, asked: str) -> AdapterState:
    """Return an adapter in the form of a slot.

    Args:
        state: The adapter to be swapped in.
        slot: The slot, with the model's Parameters.
        asked: What asks, for the errors.

    Raises:
        FormatError: It has a higher rank, or what a slot cannot hold.
    """
    some = next(iter(slot.sites.values()))
    for name, site in state.sites.items():
        rank = file_rank(site.spec, derived=site.A0 is not None)
        if rank > some.spec.rank:
            problem = f"its rank is {rank}, and the slot has room for {some.spec.rank}"
            remedy = f"Reserve a slot of rank {rank}, or truncate the adapter"
            raise FormatError(f"{asked}, site {name!r}", problem, remedy)
    kinds = {site.spec.kind for site in state.sites.values()}
    dtype = str(some.A.dtype).removeprefix("torch.")
    with within(asked):
        plain = plain_sites(
            state, "a slot", kinds, dtype=dtype, one_rank=True, alpha="rank", rank=some.spec.rank
        )
    for name, site in slot.sites.items():
        if not any(known in plain for known in (name, *site.spec.aliases)):
            plain[name] = SiteState(site.spec, torch.zeros_like(site.A), torch.zeros_like(site.B))
    return replace(state, sites=plain, config=None)

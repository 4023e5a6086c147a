"""The size of an adapter, for a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.names import counted


def size_in_words(sites: Mapping[str, SiteState], trained: Mapping[str, Tensor]) -> str:
    """Return the numbers of sites, ranks, trained tensors and parameters in a line."""
    ranks = sorted({site.spec.rank for site in sites.values()}) or [0]
    rank = f"ranks {ranks[0]} to {ranks[-1]}" if ranks[1:] else f"rank {ranks[0]}"
    n_parameters = sum(site.spec.n_parameters for site in sites.values())
    n_parameters += sum(t.numel() for t in trained.values())
    counts = counted(len(sites), "site"), counted(len(trained), "trained tensor")
    return f"AdapterState({counts[0]}, {rank}, {counts[1]}, {n_parameters:,} parameters)"

"""What an adapter loses in files of a format."""

from __future__ import annotations

from collections.abc import Collection

from lora_inject.core.adapter.state import AdapterState
from lora_inject.formats.exchange import format_of
from lora_inject.formats.format import NUMBERS, ONE, RANKS
from lora_inject.formats.peft.tensor_layout import file_rank


def losses_of(state: AdapterState, format: str) -> list[str]:  # noqa: A002
    """Return what an adapter loses in a format, as sentences; empty if nothing.

    Examples:
        >>> losses_of(AdapterState({}, config={"rank": 8}), "portable")
        ['the config is left out']
    """
    keeps = format_of(format, f"convert to '{format}'").keeps
    if keeps is None:
        return []
    sites = state.sites.values()
    losses = {
        "config": (state.config is not None, "the config is left out"),
        "fingerprint": (
            state.fingerprint is not None,
            "the base's fingerprint is left out: another base of the same shape is not noticed",
        ),
        "training": (
            any(site.spec.dropout or site.spec.compute != "base" for site in sites),
            "dropout and the dtype of the arithmetic are left out",
        ),
        "slices": (
            any(site.spec.slices for site in sites),
            "slices of fused projections become pairs of the whole projection, of higher rank",
        ),
        "start": (
            any(site.A0 is not None for site in sites),
            "frozen starts become further ranks, which train on like all others",
        ),
        **_losses_of_numbers(state, keeps),
    }
    return [words for part, (is_so, words) in losses.items() if is_so and part not in keeps]


def _losses_of_numbers(state: AdapterState, keeps: Collection[str]) -> dict[str, tuple[bool, str]]:
    """Return what happens to ranks and scales where a format has one for all sites, or none."""
    numbers = {(file_rank(site.spec), site.scale) for site in state.sites.values()}
    mixed = len(numbers) > 1 or ONE not in keeps
    scaled = any(scale != 1 for _, scale in numbers)
    several_ranks = len({rank for rank, _ in numbers}) > 1
    return {
        "scales": (mixed and scaled and NUMBERS not in keeps, "scales are folded into B"),
        RANKS: (several_ranks and not {NUMBERS, RANKS} & {*keeps}, "ranks are padded with zeros"),
    }

"""What an adapter loses in a format's files, although its deltas are kept.

A row of the table of formats states what the format keeps. From this follow the losses of an
adapter.
"""

from __future__ import annotations

from collections.abc import Collection

from lora_inject.adapter.state import AdapterState
from lora_inject.formats.peft.tensor_layout import file_rank

NUMBERS, ONE, RANKS = "numbers", "one", "ranks"
EVERYTHING = frozenset({"config", "fingerprint", "training", "slices", "start", NUMBERS})
"""`config` and `fingerprint` of the state; `training`: dropout, init and compute of each site;
`slices` of fused projections; `start`: the frozen start of pissa and olora; `numbers`: rank, alpha
and scaling of each site; or `one`: those numbers only if all sites agree;
or `ranks`: the rank of each site alone."""


def losses(state: AdapterState, keeps: Collection[str]) -> list[str]:
    """Return what a format that keeps only `keeps` changes in an adapter, as sentences."""
    specs = [site.spec for site in state.sites.values()]
    numbers = {
        (file_rank(site.spec, derived=site.A0 is not None), site.scale)
        for site in state.sites.values()
    }
    mixed = len(numbers) > 1 or ONE not in keeps
    folded = mixed and any(scale != 1 for _, scale in numbers) and NUMBERS not in keeps
    padded = len({rank for rank, _ in numbers}) > 1 and not {NUMBERS, RANKS} & set(keeps)
    there = {
        "config": (state.config is not None, "the config is left out"),
        "fingerprint": (
            state.fingerprint is not None,
            "the base's fingerprint is left out: another base of the same shape is not noticed",
        ),
        "training": (
            any(spec.dropout or spec.compute != "base" for spec in specs),
            "dropout and the dtype of the arithmetic are left out",
        ),
        "slices": (
            any(spec.slices for spec in specs),
            "slices of fused projections become pairs of the whole projection, of higher rank",
        ),
        "start": (
            any(site.A0 is not None for site in state.sites.values()),
            "frozen starts become further ranks, which train on like all others",
        ),
        "scales": (folded, "scales are folded into B"),
        RANKS: (padded, "ranks are padded with zeros"),
    }
    return [words for part, (holds, words) in there.items() if holds and part not in keeps]

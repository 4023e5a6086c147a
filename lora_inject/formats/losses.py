"""What a format's files lose of an adapter although its deltas are kept.

A row of the table of formats states what it keeps; the losses of a given adapter follow from it.
"""

from __future__ import annotations

from collections.abc import Collection

from lora_inject.adapter.state import AdapterState

NUMBERS, ONE = "numbers", "one"
EVERYTHING = frozenset({"config", "fingerprint", "training", "slices", "start", NUMBERS})
"""`config` and `fingerprint` of the state; `training`: dropout, init and compute of each site;
`slices` of fused projections; `start`: the frozen start of pissa and olora; `numbers`: rank, alpha
and scaling of each site; or `one`: those numbers only if all sites agree."""


def losses(state: AdapterState, keeps: Collection[str]) -> list[str]:
    """Return what a format that keeps only `keeps` changes in an adapter, as sentences."""
    specs = [site.spec for site in state.sites.values()]
    numbers = {(spec.rank, spec.scale) for spec in specs}
    plain = len(numbers) < 2 and (ONE in keeps or all(scale == 1 for _, scale in numbers))
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
        NUMBERS: (
            not plain,
            "scales are folded into B and ranks are padded with zeros",
        ),
    }
    return [words for part, (holds, words) in there.items() if holds and part not in keeps]

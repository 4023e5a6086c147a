"""Whether several adapters are of one base, by what each knows of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

from torch import Tensor

from lora_inject.core.adapter.fingerprint import (
    Fingerprint,
    base_differences,
    same_values,
    unverifiable,
    without_weights,
)
from lora_inject.errors import StateError


def check_one_base(several: Iterable[Fingerprint | None], names: Iterable[str], asked: str) -> None:
    """Refuse adapters of different bases, by the weights that two fingerprints have in common.

    `names` are what messages call the adapters.
    """
    marks = [(mark, name) for mark, name in zip(several, names, strict=True) if mark is not None]
    for (one, first), (two, second) in combinations(marks, 2):
        unknown = {*(one.keys() - two.keys()), *unverifiable(one, two)}
        unknown |= {n for n in one.keys() - unknown if one[n].shape != two[n].shape}
        common = without_weights(one, unknown)  # not where only one of the bases was quantized
        if wrong := base_differences(common, two, ("in one", "in the other")):
            name, what = next(iter(wrong.items()))
            problem = f"they were made on different bases: '{name}' {what}"
            remedy = "Give adapters of one base; where the second was trained after the first was "
            remedy += "merged, combine them with any_base=True"
            raise StateError(f"{asked}, {first} and {second}", problem, remedy)


def common_copies(
    several: Iterable[Mapping[str, Tensor]], names: Iterable[str], asked: str
) -> dict[str, Tensor]:
    """Return the copies of the base's tensors that any of several adapters carries.

    `names` are what messages call the adapters.
    """
    common: dict[str, Tensor] = {}
    holders: dict[str, str] = {}
    for copies, holder in zip(several, names, strict=True):
        for name, tensor in copies.items():
            held, first = common.setdefault(name, tensor), holders.setdefault(name, holder)
            if not same_values(held, tensor):
                different = f"{first} and {holder} hold different copies of this base tensor"
                raise StateError(f"{asked}, '{name}'", different, "Give adapters of one base")
    return common

"""The adapter as a value: tensors and numbers, apart from any model.

An `AdapterState` is all that an adapter is. Reading one off a live model, putting one on,
writing one to files and folding one into a checkpoint all meet here, so each of them is written
once. Its tensors are in the native layout of `sites.SiteSpec` (A stacked over slices, B without
the rows of the slices that are left alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lora_inject.spec.sites import SiteSpec


@dataclass(frozen=True)
class Fingerprint:
    """What the base looked like at the adapted sites, to tell another base of the same shape.

    Attributes:
        shapes: Shape of each adapted weight, by its name in the state dict.
        samples: A few values of each, float32, taken at evenly spaced flat positions.
        quantised: Names of weights that are not plain floating point tensors; they have no samples.
    """

    shapes: Mapping[str, tuple[int, ...]]
    samples: Mapping[str, tuple[float, ...]]
    quantised: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteState:
    """One site of an adapter: its numbers and its tensors.

    Attributes:
        spec: Shapes and hyper-parameters.
        A: `spec.a_shape`, float32 or the base's dtype.
        B: `spec.b_shape`.
        A0: Frozen start of A for the inits that are derived from W, else None.
        B0: Frozen start of B likewise. The site computes `W + scale * (B @ A - B0 @ A0)`.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None

    @property
    def scale(self) -> float:
        """The factor on `B @ A`."""
        return self.spec.scale


@dataclass(frozen=True)
class AdapterState:
    """An adapter as a value.

    Attributes:
        sites: Site name to its state, in the order of the model.
        trained: Full trained copies by the name of the base's tensor (`classifier.weight`).
        config: The config it was made from, as plain data, or None where it is not known.
        fingerprint: What the base looked like, or None where it is not known.
        base_copies: Tensors of the base that the file carries beside the adapter, by the base's
            name: PEFT stores a whole embedding that way. They are not part of the adapter; whoever
            loads it compares them with the base (equal: dropped, else: refused).
    """

    sites: Mapping[str, SiteState]
    trained: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    config: Mapping[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

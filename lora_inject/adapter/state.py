"""The adapter as a value: tensors and numbers, apart from any model.

Reading off a live model, loading, writing to files and folding into a checkpoint all take or make
an `AdapterState`. Its tensors are in the native layout of `spec.sites.SiteSpec`: A stacked over
slices, B without the rows of the slices that are not adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_inject.adapter.fingerprint import Fingerprint
from lora_inject.spec.sites import SiteSpec

T = TypeVar("T")


def signed_pairs(A: T, B: T, A0: T | None, B0: T | None) -> tuple[tuple[T, T, float], ...]:
    """Return `(A, B, sign)` of tensors or their names: the update, and its frozen start if any.

    The site computes `W + scale * sum of sign * B @ A`. A0 and B0 are the frozen start of pissa
    and olora, which has the sign -1.

    Examples:
        >>> signed_pairs("A", "B", "A0", "B0")
        (('A', 'B', 1.0), ('A0', 'B0', -1.0))
    """
    if A0 is None or B0 is None:
        return ((A, B, 1.0),)
    return (A, B, 1.0), (A0, B0, -1.0)


@dataclass(frozen=True, eq=False)
class SiteState:
    """One site of an adapter: its numbers and its tensors. Equal where all of them are.

    Attributes:
        spec: Shapes and hyper-parameters.
        A: `spec.a_shape`, float32 or the base's dtype.
        B: `spec.b_shape`.
        A0: Frozen start of A for the inits that are derived from W, else None.
        B0: Frozen start of B likewise. The site computes `W + scale * (B @ A - B0 @ A0)`.
        further: What the variant adds to these, by role.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: SiteSpec, tensors: Mapping[str, Tensor]) -> SiteState:
        """Return the site that has these tensors by their roles."""
        further = {role: tensors[role] for role in spec.shapes if role not in ("A", "B")}
        frozen = tensors.get("A0"), tensors.get("B0")
        return cls(spec, tensors["A"], tensors["B"], *frozen, further)

    @property
    def scale(self) -> float:
        """The factor on `B @ A`."""
        return self.spec.scale

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor, float], ...]:
        """`(A, B, sign)` of the update and of its frozen start; see `signed_pairs`."""
        return signed_pairs(self.A, self.B, self.A0, self.B0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their roles: A, B, a frozen start A0 and B0, and what the variant adds."""
        roles = ("A", "B") if self.A0 is None or self.B0 is None else ("A", "B", "A0", "B0")
        return {**{role: getattr(self, role) for role in roles}, **self.further}

    def __eq__(self, other: object) -> bool:
        """Compare the numbers and the tensors bit for bit, dtypes included."""
        if not isinstance(other, SiteState):
            return NotImplemented
        return self.spec == other.spec and _same(self.tensors, other.tensors)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False, repr=False)
class AdapterState:
    """An adapter as a value. It can be compared, copied and pickled.

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
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Compare by content: specs, config, fingerprint, and tensors with their dtypes."""
        if not isinstance(other, AdapterState):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle read-only mappings, which Python can do neither with, as dicts."""
        values = (getattr(self, f.name) for f in fields(self))
        return AdapterState, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __repr__(self) -> str:
        """Say how large it is, and not what it holds."""
        ranks = ", ".join(map(str, sorted({site.spec.rank for site in self.sites.values()})))
        n_parameters = sum(site.spec.n_parameters for site in self.sites.values())
        n_parameters += sum(t.numel() for t in self.trained.values())
        return (
            f"AdapterState({len(self.sites)} sites, rank {ranks or '-'}, "
            f"{len(self.trained)} trained, {n_parameters:,} parameters)"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with tensors in mappings compared bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)

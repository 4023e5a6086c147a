"""One site of an adapter as a value: its numbers and its tensors.

Tensors are in the native layout of `spec.sites.SiteSpec`: A stacked over slices, B without the rows
of the slices that are not adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec, signed_pairs
from lora_inject.errors import LoraInjectError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of an adapter's tensors, and of the weights whose values are known."""


class Comparable:
    """Dataclasses with tensors: equal if their contents are, bit for bit, dtypes included."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        parts = [part.name for part in fields(self) if part.compare]  # type: ignore[arg-type]
        return all(same(getattr(self, name), getattr(other, name)) for name in parts)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False, repr=False)
class SiteState(Comparable):
    """One site of an adapter: its numbers and its tensors.

    Attributes:
        spec: Shapes and hyper-parameters.
        A: `spec.a_shape`, float32 or the base's dtype.
        B: `spec.b_shape`.
        A0: Frozen start of A for the inits that are derived from W, else None.
        B0: Frozen start of B likewise. The site computes `W + scale * (B @ A - B0 @ A0)`.
        further: Further tensors of the variant, by role.
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

    def at(self, spec: SiteSpec) -> SiteState:
        """Return the same tensors at another place; `dataclasses.replace` takes twice as long."""
        return SiteState(spec, self.A, self.B, self.A0, self.B0, self.further)

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
        """The tensors by role: A, B, a frozen start A0 and B0, and those of the variant."""
        factors = {"A": self.A, "B": self.B}
        if self.A0 is not None and self.B0 is not None:
            factors |= {"A0": self.A0, "B0": self.B0}
        return {**factors, **self.further}

    @property
    def is_zero(self) -> bool:
        """Whether the update is that before training: A or B is 0, or both are their start."""
        if self.A0 is not None and self.B0 is not None:
            return torch.equal(self.A, self.A0) and torch.equal(self.B, self.B0)
        return not (bool(self.A.any()) and bool(self.B.any()))

    def check_tensors(self, error: type[LoraInjectError]) -> None:
        """Refuse tensors of other names, shapes or dtypes than the spec states."""
        spec, where = self.spec, f"site '{self.spec.name[:200]}'"
        every = {"A": self.A, "B": self.B, "A0": self.A0, "B0": self.B0, **self.further}
        tensors = {role: tensor for role, tensor in every.items() if tensor is not None}
        found = {role: tensor.shape for role, tensor in tensors.items()}
        due = dict(spec.shapes)
        if spec.init in FROM_WEIGHT:
            due |= {"A0": spec.a_shape, "B0": spec.b_shape}
        if found != due:
            shapes = {role: tuple(shape) for role, shape in found.items()}
            remedy = "The tensors and what is said about them do not belong together"
            raise error(where, f"its tensors are {shapes} where {due} are due", remedy)
        dtype = self.A.dtype
        for role, tensor in tensors.items():
            # Further tensors may have a dtype of their own.
            as_due = role in self.further or tensor.dtype == dtype
            if tensor.dtype not in FLOATS or not as_due:
                problem = f"A is {dtype} and {'B' if role == 'A' else role} {tensor.dtype}"
                remedy = "Both must be of one of float16, bfloat16, float32, float64"
                raise error(where, problem, remedy)

    def __repr__(self) -> str:
        """Return the numbers in a line, without the values of tensors."""
        spec = self.spec
        widths = f"{spec.in_features} -> {spec.out_features}"
        return f"SiteState({spec.name!r}, {spec.kind}, {widths}, rank {spec.rank})"


def same(one: object, other: object) -> bool:
    """Whether two values are equal, with tensors in mappings compared bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape, one.is_meta) == (other.dtype, other.shape, other.is_meta)
        return alike and (one.is_meta or torch.equal(one, other.to(one.device)))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)

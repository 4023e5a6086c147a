"""What is folded in: adapters as values, each with a mixing weight.

Whatever could spoil a merge from the adapter's side is settled before the base is even
looked at: a number that is not finite, a weight of zero, an adapter with nothing in it. The digest
says later, on resuming, whether it is still the same adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import CheckpointError
from lora_inject.functional import all_finite

_STEP_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Part:
    """One adapter to fold in.

    Attributes:
        state: The adapter.
        weight: Mixing weight: the base gets `weight` times its delta.
        label: What to call it in messages, such as its path.
        magnitudes: DoRA's magnitude `(out,)` by site name: the site's weight becomes
            `m * (W + delta) / |W + delta|` (arXiv:2402.09353, eq. 5).
        added: By tensor name, what is added to a vector of the base, scale included (lora_bias).
        rows: By tensor name, indices of rows that are replaced, and their values
            (trainable tokens).
    """

    state: AdapterState
    weight: float = 1.0
    label: str = "the adapter"
    magnitudes: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    added: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(
        default_factory=lambda: MappingProxyType({})
    )


def tensors_of(part: Part) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter with a name for messages and for the digest."""
    state = part.state
    for name, site in state.sites.items():
        pairs = (("A", site.A), ("B", site.B), ("A0", site.A0), ("B0", site.B0))
        yield from ((f"{name} {which}", t) for which, t in pairs if t is not None)
    yield from state.trained.items()
    yield from state.base_copies.items()
    yield from ((f"{name} magnitude", t) for name, t in part.magnitudes.items())
    yield from ((f"{name} added", t) for name, t in part.added.items())
    yield from ((f"{name} rows {at}", t) for name, (at, t) in part.rows.items())


def check_parts(parts: Sequence[Part]) -> None:
    """Refuse adapters that cannot be merged into anything.

    Raises:
        CheckpointError: None given, one is empty, a weight is zero or not finite, or a tensor holds
            NaN or Inf.
    """
    if not parts:
        raise CheckpointError("merge", "no adapter was given", "Name at least one")
    for part in parts:
        asked = f"merge {part.label}"
        if not math.isfinite(part.weight) or part.weight == 0:
            raise CheckpointError(
                asked, f"its weight is {part.weight}", "Give a finite weight other than zero"
            )
        if not (part.state.sites or part.state.trained or part.rows):
            raise CheckpointError(
                asked, "it holds no tensors", "It is not a trained adapter; check the path"
            )
        for name, tensor in tensors_of(part):
            if tensor.is_meta:
                raise CheckpointError(
                    asked, f"'{name}' is on the meta device", "Load the adapter's values first"
                )
            if not all(map(all_finite, _steps(tensor))):
                raise CheckpointError(
                    asked,
                    f"'{name}' holds NaN or Inf",
                    "Its training diverged; take an earlier checkpoint of the adapter",
                )
    _check_different(parts)


def _check_different(parts: Sequence[Part]) -> None:
    """Refuse the same adapter twice."""
    seen: dict[str, Part] = {}
    for part in parts if len(parts) > 1 else ():
        first = seen.setdefault(digest(replace(part, weight=1.0)), part)
        if first is not part:
            raise CheckpointError(
                f"merge {first.label} and {part.label}",
                "they are the same adapter, which would count twice",
                "Give it once, with the weight that is meant",
            )


def _steps(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's values in their order, in pieces that memory does not notice."""
    flat = tensor.detach().contiguous().flatten()
    for start in range(0, flat.numel(), _STEP_ELEMENTS):
        yield flat[start : start + _STEP_ELEMENTS]


def digest(part: Part) -> str:
    """Return the SHA-256 of an adapter's numbers and its weight; the order of sites is no part."""
    sha = hashlib.sha256(repr(part.weight).encode())
    for name, site in sorted(part.state.sites.items()):
        spec = site.spec
        facts = (
            name,
            spec.weight,
            spec.kind,
            spec.in_features,
            spec.out_features,
            spec.rank,
            spec.alpha,
            spec.scaling,
            spec.transposed,
            spec.experts,
            spec.spans,
        )
        sha.update(repr(facts).encode())
    for name, tensor in sorted(tensors_of(part), key=lambda row: row[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for step in _steps(tensor):
            sha.update(_bytes(step.view(torch.uint8)))
    return sha.hexdigest()


def _bytes(flat: Tensor) -> bytearray:
    """Copy a uint8 tensor into plain bytes, without numpy."""
    buffer = bytearray(flat.numel())
    torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat)
    return buffer

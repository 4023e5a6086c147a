"""Recognize the base of an adapter among others of the same shape, by a few of its values.

Sixteen values at evenly spaced places of each parameter identify the base. They are compared to the
precision of bfloat16, so the same base in another dtype passes and another base does not. Tensors
that the adapter does not touch are sampled as well: it was trained with them. Of a quantized
adapted weight the class, the settings and a few packed bytes are compared. Whole tensors of the
base that an adapter carries are compared as such.

An embedding's adapter changes the rows of the tokens that training saw, slices are a part of the
outputs, and an expert that is not adapted, or met no token, stays what it was. Evenly spaced places
would miss what moved, and the adapter's own merged base would pass. So values that moved are
sampled too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.sites import Block

N_SAMPLES = 16


class Sampled(NamedTuple):
    """What is known of one weight of a base.

    Attributes:
        shape: Its shape.
        values: Its values at `sample_positions` and at those of `moved`, as float32; None of a
            weight that is packed, sharded or on the meta device.
        packed: What an adapted weight is that is no plain floating point tensor: class, format,
            block size and a few packed bytes; empty for sharded tensors and on the meta device.
        moved: Flat positions where an adapter changes a weight that it leaves alone elsewhere,
            such as rows of an embedding.
    """

    shape: tuple[int, ...]
    values: tuple[float, ...] | None = None
    packed: str = ""
    moved: tuple[int, ...] = ()

    def comparable(self, other: Sampled | None) -> bool:
        """Whether a weight is plain in two bases, or packed in both."""
        if other is None:
            return False
        plain = self.values is not None and other.values is not None
        return plain or bool(self.packed and other.packed)


Fingerprint = Mapping[str, Sampled]
"""What is known of a base's weights, by their names in the state dict."""


def without_weights(mark: Fingerprint, names: Collection[str]) -> Fingerprint:
    """Return what is known of all but some weights."""
    return {name: sampled for name, sampled in mark.items() if name not in names}


@cache  # models have many weights of few shapes
def sample_positions(shape: tuple[int, ...], n: int = N_SAMPLES) -> tuple[int, ...]:
    """Flat positions of the values that are compared: `n` evenly spaced ones, or all there are.

    The last part has none: rows that were added to a vocabulary lie there, and they have other
    values in each process.

    Examples:
        >>> sample_positions((2, 2)), sample_positions((10, 10), n=4)
        ((0, 1, 2, 3), (0, 24, 49, 74))
    """
    numel = math.prod(shape)
    if numel <= n:
        return tuple(range(numel))
    return tuple(i * (numel - 1) // n for i in range(n))


def samples(
    weights: Mapping[str, Tensor], moved: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> dict[str, tuple[float, ...]]:
    """Return values of plain floating point tensors at their `sample_positions`, as float32.

    Of a weight in `moved` those at its further flat positions follow. Equal shapes are sampled
    together, in one transfer from a GPU.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        key = (weight.shape, weight.dtype, weight.device, moved.get(name, ()))
        alike.setdefault(key, []).append(name)
    values_of: dict[str, tuple[float, ...]] = dict.fromkeys(weights, ())
    for (shape, _, device, further), names in alike.items():
        positions = (*sample_positions(shape), *further)
        at = torch.tensor(positions, dtype=torch.long, device=device)
        with torch.no_grad():
            values = torch.stack([weights[name].take(at) for name in names])
        values_of.update(zip(names, map(tuple, values.float().tolist()), strict=True))
    return values_of


@torch.no_grad()
def moved_positions(site: SiteState, n: int = N_SAMPLES) -> tuple[int, ...]:
    """Return flat positions of the weight that the update moves most, at most `n`, in order.

    Empty where it moves all of the weight, or nothing: any position is as good as another then.

    Examples:
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("e", "embedding", 4, 3, (4, 3), rank=1, alpha=1, transposed=True)
        >>> seen = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
        >>> moved_positions(SiteState(spec, seen, torch.tensor([[1.0], [0.0], [3.0]])))
        (5, 11)
    """
    spec = site.spec
    if site.A.is_meta or site.is_zero or _moves_all(site):
        return ()
    strength = site.B.reshape(-1, spec.rank).abs().amax(1).tolist()
    blocks = sorted(spec.blocks, key=lambda block: -max(strength[slice(*block.b)]))
    most: list[tuple[float, int]] = []
    for block in blocks[:n]:
        most += _most_of(site, block, n)
    return tuple(sorted(position for _, position in sorted(most, reverse=True)[:n]))


def _moves_all(site: SiteState) -> bool:
    spec = site.spec
    if spec.slices is not None or spec.only is not None:
        return False
    outputs = site.B.any(-1)
    inputs = site.A.reshape(-1, spec.rank, spec.in_features).any(1)
    return bool(outputs.all()) and bool(inputs.all())


def _most_of(site: SiteState, block: Block, n: int) -> list[tuple[float, int]]:
    """Return the size of the update and the position, for the inputs of a block that move most."""
    spec = site.spec
    left = torch.cat([_rows(b, block.b) * sign for _, b, sign in site.pairs], 1)
    right = torch.cat([_rows(a, block.a) for a, _, _ in site.pairs])
    inputs = right.norm(dim=0).topk(min(n, spec.in_features)).indices
    size, outputs = (left @ right[:, inputs]).abs().max(0)
    row, column = (inputs, outputs) if spec.transposed else (outputs, inputs)
    positions = (block.rows[0] + row) * spec.matrix_shape[1] + block.cols[0] + column
    pairs = zip(size.tolist(), positions.tolist(), strict=True)
    return [(moved, position) for moved, position in pairs if moved > 0]


def _rows(stack: Tensor, rows: tuple[int, int]) -> Tensor:
    """Return rows of A or B, flattened to two dimensions."""
    return stack.detach().reshape(-1, stack.shape[-1])[slice(*rows)].float()


def union_of(several: Iterable[Fingerprint]) -> Fingerprint:
    """Return the union of fingerprints of one base, which may have been packed in some."""
    known: dict[str, Sampled] = {}
    for mark in several:
        for name, one in mark.items():
            other = known.get(name, one)
            plain = other if one.values is None else one
            known[name] = plain._replace(packed=one.packed or other.packed)
    return known


def same_values(one: Tensor, two: Tensor) -> bool:
    """Compare two copies of a tensor in the narrower of their dtypes: one may have been rounded."""
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(narrow), two.to(narrow))


# bfloat16 keeps 8 significant bits: rounding moves a value by at most 2**-8 of itself. The saved
# and the found base may each have been rounded. The smallest step of float16 is 2**-24.
_RELATIVE = 2.0**-7
_ABSOLUTE = 2.0**-23


def base_differences(
    saved: Fingerprint,
    current: Fingerprint,
    words: tuple[str, str] = ("in the file", "here"),
) -> dict[str, str]:
    """Return how weights of the base at hand differ from the one that an adapter was made on.

    Empty: the same base, as far as the values reach (see `unverifiable`). `words` say where the
    values of each are.
    """
    differences = {n: _difference(one, current.get(n), words) for n, one in saved.items()}
    return {name: how for name, how in differences.items() if how}


def _difference(one: Sampled, two: Sampled | None, words: tuple[str, str]) -> str:
    """Return how a weight differs, "" if it does not as far as can be seen."""
    if two is None:
        return "is not in this model"
    in_one, in_two = words
    if one.packed and two.packed:  # shapes included
        same = one.packed == two.packed
        return "" if same else f"is {one.packed[:300]} {in_one} and {two.packed[:300]} {in_two}"
    if one.shape != two.shape:
        return f"has shape {one.shape} {in_one} and {two.shape} {in_two}"
    if one.values is None or two.values is None or one == two:
        return ""
    n = len(sample_positions(one.shape))
    where, n_compared = "", n
    wrong = _differing(one.values[:n], two.values[:n])
    if not wrong and one.moved == two.moved:
        wrong = _differing(one.values[n:], two.values[n:])
        where, n_compared = " where the adapter moves it,", len(one.moved)
    if not wrong:
        return ""
    first = f"first {wrong[0][0]:.6g} {in_one} and {wrong[0][1]:.6g} {in_two}"
    return f"differs{where} in {len(wrong)} of {n_compared} sampled values, {first}"


def _differing(one: tuple[float, ...], two: tuple[float, ...]) -> list[tuple[float, float]]:
    """Return the pairs of values that differ by more than a rounding."""
    pairs = () if one == two else zip(one, two, strict=True)
    return [pair for pair in pairs if not _close(*pair)]


def _close(a: float, b: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def unverifiable(saved: Fingerprint, current: Fingerprint) -> tuple[str, ...]:
    """Names of weights that cannot be compared: quantized on one side only, sharded or on meta."""
    return tuple(n for n, there in saved.items() if not there.comparable(current.get(n)))


# --------------------------------------------------------------------------------- packed weights

# Of a packed tensor: its settings and a few codes, None if it is of no library that is known.
Described = Callable[[Tensor], Iterable[str] | None]


def packing(weight: Tensor, described: Described = lambda _: None) -> str:
    """Describe a quantized weight: class, format, block size, and a few of its bytes.

    Scales, which devices may round differently, have three digits. The result is empty for a tensor
    whose values this process does not hold. `described` tells what is known of a library's tensors.

    Examples:
        >>> packing(torch.arange(3, dtype=torch.int8))
        'Tensor, int8 (3,) 000102'
    """
    if weight.is_meta or hasattr(weight, "full_tensor"):
        return ""
    return ", ".join((type(weight).__name__, *_parts(weight, described)))


def _parts(weight: Tensor, described: Described) -> Iterator[str]:
    """Yield the settings and the inner tensors of a packed tensor."""
    if (said := described(weight)) is not None:
        yield from said
    elif hasattr(weight, "__tensor_flatten__"):
        names, settings = weight.__tensor_flatten__()
        yield from _settings(settings.items() if isinstance(settings, Mapping) else ())
        for name in names:
            yield f"{name}: {', '.join(_parts(getattr(weight, name), described))}"
    else:
        yield glimpse(weight)


def _settings(items: Iterable[tuple[str, object]]) -> Iterator[str]:
    for name, value in items:
        if isinstance(value, float):
            yield f"{name} {value:.2e}"
        elif isinstance(value, str | int | tuple | list) and not name.endswith("dtype"):
            yield f"{name} {value}"  # any dtype will do, as for a plain base


def glimpse(tensor: Tensor) -> str:
    """Return the dtype, the shape and a few values of a tensor that holds codes or scales."""
    flat = tensor.detach().reshape(-1)
    start = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.is_floating_point() and tensor.element_size() > 1:
        values = flat[list(sample_positions(flat.shape)[::5])].tolist()
        return " ".join((start, *(f"{value:.2e}" for value in values)))
    raw = flat.view(torch.uint8)
    return f"{start} {bytes(raw[list(sample_positions(raw.shape))].tolist()).hex()}"

"""How a fingerprint describes a packed weight, to recognize its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lora_inject.core.adapter.fingerprint import sample_positions

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

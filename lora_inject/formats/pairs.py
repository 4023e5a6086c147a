"""Pairs of matrices out of files of other programs, checked, as sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.files.strict_json import is_positive
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, within

_DAMAGED = "The file is damaged or was edited; fetch it again"


def plain_site(
    name: str, a: Tensor, b: Tensor, alpha: float | Tensor | None, kind: str = "linear"
) -> SiteState:
    """Return the site of a foreign pair: A `(r, in)` or `(r, in, k, ...)`, B `(out, r)`.

    Without alpha, a number or a scalar tensor, the scale is 1. The kind is `linear`, `conv1d` or
    `embedding`, or that of a convolution if A has a kernel; loading onto a model replaces it by the
    kind of the model's layer.
    """
    with within(f"site '{name[:200]}'"):
        check_shapes(a, b)
        if isinstance(alpha, Tensor) and (alpha.numel() != 1 or alpha.ndim > 1):
            raise FormatError("", f"its alpha has shape {tuple(alpha.shape)}", _DAMAGED)
        number: Any = alpha.item() if isinstance(alpha, Tensor) else alpha
        number = len(a) if number is None else number
        if not is_positive(number):
            raise FormatError("", f"its alpha is {str(number)[:40]}", _DAMAGED)
    rank, n_in, n_out = int(a.shape[0]), a[0].numel(), int(b.shape[0])
    kind, turned = "conv" if a.ndim > 2 else kind, kind != "linear" and a.ndim == 2
    shape = (n_in, n_out) if turned else (n_out, *a.shape[1:])
    spec = SiteSpec(name, kind, n_in, n_out, shape, rank, float(number), transposed=turned)
    return SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))


def check_shapes(a: Tensor, b: Tensor) -> None:
    """Refuse a pair unless A is `(rank, in, ...)` and B is `(out, rank, 1, ...)`."""
    fits = 2 <= a.ndim <= 5 and b.shape[1:] == (len(a), *(1,) * (a.ndim - 2))
    if not fits or not (a.numel() and b.numel()):
        problem = f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks or kernels do "
        problem += "not fit; PEFT's grouped convolutions have no dense delta"
        raise FormatError("", problem, _DAMAGED)


def pairs_of(
    parts: Mapping[str, Mapping[str, Tensor]], a: str, b: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return complete pairs by module.

    `parts` are a file's tensors by module and by role; `a` and `b` are the roles of a pair.
    """
    for module, halves in parts.items():
        for role in {a, b} - halves.keys():
            raise FormatError(f"site '{module[:200]}'", f"its {role} is missing", _DAMAGED)
    if not parts:
        raise FormatError("", "it holds no pair of matrices", "Check the path")
    return {module: (halves[a], halves[b]) for module, halves in parts.items()}


def matrices(
    tensors: Mapping[str, Tensor], ends: tuple[str, str], remedy: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of a file, which must hold nothing else, by the keys without their ends.

    `remedy` is for any other tensor.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None or tensor.ndim != 2:
            problem = f"'{key[:200]}' of shape {tuple(tensor.shape)} is not a matrix of a pair"
            raise FormatError("", problem, remedy)
        parts.setdefault(key.removesuffix(end), {})[end.strip(".")] = tensor
    return pairs_of(parts, ends[0].strip("."), ends[1].strip("."))

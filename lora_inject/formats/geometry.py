"""Fitting a site that was read from a file to the module that it is for.

A foreign file says how wide a site is and which numbers it has; what kind of layer that
is, only the model knows. `conform` takes the geometry from the model's spec and the numbers and
tensors from the file, and refuses where the two cannot be one site.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from lora_inject.adapter.state import SiteState
from lora_inject.errors import FormatError
from lora_inject.spec.sites import SiteSpec, Slices

_LINEAR = {"linear", "conv1d"}


def conform(site: SiteState, spec: SiteSpec) -> SiteState:
    """Return the site with the geometry of the module that the model has under its name.

    Args:
        site: As read from a file.
        spec: As the model has it: kind, shapes, orientation; its numbers are not looked at.

    Returns:
        The same update, in the module's terms.

    Raises:
        FormatError: The module has other widths, or is of a kind that the file cannot be for.

    Example:
        >>> import torch
        >>> read = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=2)
        >>> here = SiteSpec("fc", "conv1d", 4, 6, (4, 6), rank=1, alpha=1, transposed=True)
        >>> site = SiteState(read, torch.zeros(2, 4), torch.zeros(6, 2))
        >>> conform(site, here).spec.kind, conform(site, here).spec.rank
        ('conv1d', 2)
    """
    there = site.spec
    if _same_geometry(there, spec):
        return dataclasses.replace(site, spec=_with_numbers(spec, there, there.slices))
    # PEFT until 0.18 took stacks of (out, in) matrices for (in, out): its A and B change places.
    turned = there.kind == spec.kind == "parameter" and there.transposed and not spec.transposed
    widths = (there.out_features, there.in_features) if turned else _widths(there)
    if there.slices is not None or not _may_be(there.kind, spec.kind):
        raise _mismatch(there, spec)
    if (widths, there.experts or 1) != (_widths(spec), spec.experts or 1):
        raise _mismatch(there, spec)
    fitted = _with_numbers(spec, there, None)
    pair = _fitted(site.A, site.B, fitted, turned=turned)
    if site.A0 is None or site.B0 is None:
        return SiteState(fitted, *pair)
    return SiteState(fitted, *pair, *_fitted(site.A0, site.B0, fitted, turned=turned))


def _fitted(a: Tensor, b: Tensor, spec: SiteSpec, *, turned: bool) -> tuple[Tensor, Tensor]:
    a, b = (b.mT, a.mT) if turned else (a, b)
    return a.reshape(spec.a_shape).contiguous(), b.reshape(spec.b_shape).contiguous()


def _with_numbers(spec: SiteSpec, there: SiteSpec, slices: Slices | None) -> SiteSpec:
    """The model's geometry with the file's hyper-parameters."""
    return dataclasses.replace(
        spec,
        slices=slices,
        rank=there.rank,
        alpha=there.alpha,
        scaling=there.scaling,
        dropout=there.dropout,
        init=there.init,
        compute=there.compute,
    )


def _widths(spec: SiteSpec) -> tuple[int, int]:
    return spec.in_features, spec.out_features


def _same_geometry(there: SiteSpec, here: SiteSpec) -> bool:
    parts = ("kind", "in_features", "out_features", "weight_shape", "transposed", "experts")
    return all(getattr(there, part) == getattr(here, part) for part in parts)


def _may_be(there: str, here: str) -> bool:
    """Whether a file's assumed kind can stand for the model's kind."""
    return there == here or (there in _LINEAR and here in _LINEAR)


def _mismatch(there: SiteSpec, here: SiteSpec) -> FormatError:
    return FormatError(
        f"site '{there.name}'",
        f"the file has {_words(there)}, the model {_words(here)}",
        "The adapter was made for another model",
    )


def _words(spec: SiteSpec) -> str:
    stack = f"{spec.experts} times " if spec.experts else ""
    return f"a {spec.kind} of {stack}{spec.in_features} -> {spec.out_features}"

"""Whether a format from outside the package wrote the adapter that it was given: it is read again.

Tests hold the formats of the package to this. A format from outside is held to it at each write,
before anything stands at the destination: whatever its `write` does not know (a scaling, a
variant, a frozen start) would be lost without a word.

1. The file means the same: the sites, each site's update as a matrix, further tensors of variants,
   and trained tensors.
2. If its row does not say `deltas_only`, everything else is there too: dropout, the config, the
   base's fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.site_state import SiteState, same
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import show
from lora_inject.core.spec.sites import SiteSpec, fits_kernel
from lora_inject.errors import FormatError, within
from lora_inject.formats.pairs import plain_pair

_REMEDY = "Correct the format's `write` and `read`, or let `write` refuse such an adapter. The "
_REMEDY += 'built-in format="native" holds every adapter'
_UNSAID = "Write it, or say deltas_only=True in the format's row: `convert` then names what is lost"
_EXACT = 2.0**-30
"""A share of an update that float64 arithmetic may be off by."""


def check_read_back(due: AdapterState, found: AdapterState, *, deltas_only: bool) -> None:
    """Refuse an adapter that is not the one that was written.

    Values may be rounded once to the dtype that was read.

    Args:
        due: The adapter that was written.
        found: What the format read from its own files.
        deltas_only: Whether the files need not hold how the adapter was trained.

    Raises:
        FormatError: They differ; it names the site or the tensor, and the difference.
    """
    _check_names("site", due.sites, found.sites)
    for name, site in due.sites.items():
        with within(f"site '{name}'"):
            _check_site(site, found.sites[name], deltas_only=deltas_only)
    _check_names("trained tensor", due.trained, found.trained)
    for name, tensor in due.trained.items():
        with within(f"trained tensor '{name}'"):
            _check_tensor("it", tensor, found.trained[name])
            _check_field("rows", due.rows.get(name), found.rows.get(name))
    if not deltas_only:
        for name in ("config", "fingerprint"):
            if not same(getattr(due, name), getattr(found, name)):
                raise FormatError("", f"its {name} is not what was written", _UNSAID)


def _check_names(what: str, due: Iterable[str], found: Iterable[str]) -> None:
    for verb, names in {"lacks": {*due} - {*found}, "adds": {*found} - {*due}}.items():
        if names:
            problem = f"what is read back {verb} the {what} {one_line(sorted(names))}"
            raise FormatError("", problem, _REMEDY)


def _check_field(name: str, due: object, found: object, remedy: str = _REMEDY) -> None:
    if due != found:
        problem = f"its {name} is {show(found)} when it is read back, expected {show(due)}"
        raise FormatError("", problem, remedy)


def _check_site(due: SiteState, found: SiteState, *, deltas_only: bool) -> None:
    spec, back = due.spec, found.spec
    for name in ("variant", "lora_bias", "in_features", "out_features", "experts"):
        _check_field(name, getattr(spec, name), getattr(back, name))
    _check_field("orientation", _turned(spec), _turned(back))
    if not fits_kernel(spec, back.weight_shape):
        _check_field("shape", spec.weight_shape, back.weight_shape)
    off, size, rounding = _distance(due, found)
    if not off <= rounding:
        problem = f"its update is off by {off:.3g} when it is read back, and the size of the "
        problem += f"update is {size:.3g}"
        names = [n for n in ("alpha", "scaling", "init") if getattr(spec, n) != getattr(back, n)]
        for name in names:
            problem += f"; {name} is {getattr(back, name)!r}, expected {getattr(spec, name)!r}"
        raise FormatError("", problem, _REMEDY)
    for role, tensor in due.further.items():
        _check_tensor(f"its {role}", tensor, found.further[role])
    if not deltas_only:
        for each in fields(spec):
            if each.compare:
                _check_field(each.name, getattr(spec, each.name), getattr(back, each.name), _UNSAID)


def _turned(spec: SiteSpec) -> bool | None:
    """Return which way round a parameter lies; the kind of a layer says it of its weight."""
    return spec.transposed if spec.kind == "parameter" else None


def _check_tensor(what: str, due: Tensor, found: Tensor) -> None:
    due, found = due.detach().cpu(), found.detach().cpu()
    if due.shape != found.shape:
        problem = f"{what} has shape {tuple(found.shape)} when it is read back, expected "
        raise FormatError("", f"{problem}{tuple(due.shape)}", _REMEDY)
    if same(due, found):
        return
    off = (found.double() - due.double()).abs()
    eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    if not bool((off <= eps * due.double().abs()).all()):
        problem = f"{what} has other values when it is read back, off by up to {float(off.max()):g}"
        raise FormatError("", problem, _REMEDY)


def _distance(due: SiteState, found: SiteState) -> tuple[float, float, float]:
    """Return the size of the difference of two updates, of the first, and what rounding explains.

    The size is the root of the sum of squares. No matrix `(out, in)` is formed. One rounding of
    each factor to a dtype moves the update by no more than the dtype's `eps` times the sizes of the
    factors.
    """
    (a, b), (a_found, b_found) = (_wide(site) for site in (due, found))
    exact = torch.equal(a, a_found) and torch.equal(b, b_found)
    eps = _EXACT if exact else max(_EXACT, torch.finfo(found.A.dtype).eps)
    left = torch.cat([due.scale * b, -found.scale * b_found], dim=2)
    off = _size(left, torch.cat([a, a_found], dim=1))
    sizes = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    return off, due.scale * _size(b, a), eps * due.scale * float(torch.linalg.vector_norm(sizes))


def _wide(site: SiteState) -> tuple[Tensor, Tensor]:
    """Return A `(experts, k, in)` and B `(experts, out, k)` in float64."""
    a, b = plain_pair(site)
    return a.cpu().double(), b.cpu().double()


def _size(left: Tensor, right: Tensor) -> float:
    """Return the root of the sum of squares of `left @ right`, from the thin factors."""
    R_l, R_r = (torch.linalg.qr(factor, mode="r").R for factor in (left, right.mT))
    return float(torch.linalg.vector_norm(R_l @ R_r.mT))

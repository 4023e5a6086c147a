"""Checks that every format makes before it writes, and after it read.

A site's tensors must have the shapes and dtypes that its spec states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.metadata import one_line

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_site(site: SiteState, asked: str) -> None:
    """Refuse a site whose tensors do not fit its spec, or that has only one of A0 and B0."""
    spec, where = site.spec, f"{asked}, site '{site.spec.name}'"
    check_pair(site.A, site.B, spec.a_shape, spec.b_shape, where)
    for role, tensor in site.further.items():
        if tensor.shape != spec.shapes[role] or tensor.dtype not in FLOATS:
            found = f"{role} is {tensor.dtype} {tuple(tensor.shape)}, not {spec.shapes[role]}"
            remedy = "The tensors and what is said about them do not belong together"
            raise FormatError(where, found, remedy)
    if site.A0 is None and site.B0 is None:
        return
    if site.A0 is None or site.B0 is None:
        raise FormatError(where, "it has only one of A0 and B0", "Give both or neither")
    check_pair(site.A0, site.B0, spec.a_shape, spec.b_shape, f"{where}, A0 and B0")
    if site.A0.dtype != site.A.dtype:
        raise FormatError(
            where, f"A is {site.A.dtype} and A0 {site.A0.dtype}", "Give them one dtype"
        )


def check_pair(
    a: Tensor, b: Tensor, a_shape: tuple[int, ...], b_shape: tuple[int, ...], where: str
) -> None:
    """Refuse a pair of other shapes than these, or that is not plain floating point."""
    dtype = a.dtype
    if a.shape == a_shape and b.shape == b_shape and dtype == b.dtype and dtype in FLOATS:
        return
    for name, tensor, shape in (("A", a, a_shape), ("B", b, b_shape)):
        if tensor.shape != shape:
            raise FormatError(
                where,
                f"{name} has shape {tuple(tensor.shape)} where {shape} is due",
                "The tensors and what is said about them do not belong together",
            )
    raise FormatError(
        where,
        f"A is {dtype} and B {b.dtype}",
        "Both must be of one of float16, bfloat16, float32 and float64",
    )


def check_keys(found: Iterable[str], due: Iterable[str], asked: str) -> None:
    """Refuse a file whose tensors are not exactly the ones that are due."""
    found, due = set(found), set(due)
    if found == due:
        return
    missing, unknown = sorted(due - found), sorted(found - due)
    if missing or unknown:
        parts = [f"it lacks {one_line(missing)}"] if missing else []
        parts += [f"it holds {one_line(unknown)}, which nothing accounts for"] if unknown else []
        raise FormatError(asked, "; ".join(parts), "The file is incomplete or was edited")


def check_no_clash(keys: Iterable[str], asked: str) -> None:
    """Refuse two tensors of one name."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise FormatError(
            asked, f"two tensors would be called {one_line(twice)}", 'Use format="native"'
        )


def check_trained(state: AdapterState, asked: str) -> None:
    """Refuse a value that cannot be stored as a full tensor, or as rows of one."""
    trained: Mapping[str, object] = state.trained
    for name, rows in state.rows.items():
        tensor = state.trained.get(name)
        if tensor is None or tensor.dim() != 2 or len(tensor) != len(rows) or not rows:
            found = f"it has {len(rows)} row numbers for a tensor of other rows"
            raise FormatError(f"{asked}, trained tensor '{name}'", found, "Give one for each row")
    wrong = [name for name, tensor in trained.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise FormatError(asked, f"{one_line(wrong)} is not a tensor", "Pass tensors only")

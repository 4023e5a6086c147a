"""Checks of every adapter before it is written and after it is read, and names for messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError, check_type

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_state(state: AdapterState) -> AdapterState:
    """Return an adapter if its tensors fit its specs; raise if they do not."""
    check_type("", state, AdapterState, "Give an AdapterState, as adapter_state(model) does")
    trained: Mapping[str, object] = state.trained
    if wrong := [name for name, tensor in trained.items() if not isinstance(tensor, Tensor)]:
        from lora_inject.core.adapter.file_keys import one_line

        raise FormatError("", f"{one_line(wrong)} is not a tensor", "Pass tensors only")
    for name, rows in state.rows.items():
        tensor = state.trained.get(name)
        if tensor is None or tensor.dim() != 2 or len(tensor) != len(rows) or not rows:
            problem = f"it has {len(rows)} row numbers for a tensor of other rows"
            raise FormatError(f"trained tensor '{name}'", problem, "Give one for each row")
    for site in state.sites.values():
        _check_site(site, f"site '{site.spec.name[:200]}'")
    return state


def _check_site(site: SiteState, where: str) -> None:
    """Refuse a site whose tensors have other shapes or dtypes than its spec states."""
    frozen = "A0" in site.spec.roles
    if (site.A0 is not None, site.B0 is not None) != (frozen, frozen):
        problem = (
            f"its init is {site.spec.init}, which has {'both' if frozen else 'none'} of A0 and B0"
        )
        raise FormatError(where, problem, "Give A0 and B0 with pissa and olora only")
    for role, tensor in site.tensors.items():
        due = site.spec.shapes[role.removesuffix("0")]
        if tensor.shape != due:
            problem = f"{role} has shape {tuple(tensor.shape)} where {due} is due"
            remedy = "The tensors and what is said about them do not belong together"
            raise FormatError(where, problem, remedy)
        of_pair = role not in site.further
        if tensor.dtype not in FLOATS or (of_pair and tensor.dtype != site.A.dtype):
            other, what = ("B", site.B) if role == "A" else (role, tensor)
            problem = f"A is {site.A.dtype} and {other} {what.dtype}"
            remedy = "Both must be of one of float16, bfloat16, float32 and float64"
            raise FormatError(where, problem, remedy)

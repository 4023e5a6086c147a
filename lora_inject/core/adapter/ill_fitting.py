"""Why the tensors of an adapter do not fit what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.site_state import FLOATS, SiteState
from lora_inject.errors import FormatError


def check_trained(trained: Mapping[str, object], rows: Mapping[str, Sequence[int]]) -> None:
    """Refuse what is no tensor, and numbers of rows that are not those of a tensor."""
    if wrong := [name for name, tensor in trained.items() if not isinstance(tensor, Tensor)]:
        raise FormatError("", f"{one_line(wrong)} is not a tensor", "Pass tensors only")
    for name, numbers in rows.items():
        tensor = trained.get(name)
        fits = isinstance(tensor, Tensor) and tensor.dim() == 2 and len(tensor) == len(numbers)
        if not fits or not numbers:
            problem = f"it has {len(numbers)} row numbers for a tensor of other rows"
            raise FormatError(f"trained tensor '{name}'", problem, "Give one for each row")


def why_ill_fitting(site: SiteState) -> FormatError:
    """Return the error of a site whose tensors have other shapes or dtypes than its spec states."""
    spec = site.spec
    where = f"site '{spec.name[:200]}'"
    frozen = "A0" in spec.roles
    if (site.A0 is not None, site.B0 is not None) != (frozen, frozen):
        has = "both" if frozen else "none"
        problem = f"its init is {spec.init}, which has {has} of A0 and B0"
        return FormatError(where, problem, "Give A0 and B0 with pissa and olora only")
    remedy = "The tensors and what is said about them do not belong together"
    if roles := sorted(site.tensors.keys() ^ {*spec.roles}):
        problem = f"it has {', '.join(site.tensors)} where {', '.join(spec.roles)} are due"
        return FormatError(f"{where}, {roles[0]}", problem, remedy)
    for role, tensor in site.tensors.items():
        due = spec.shape_of(role)
        if tensor.shape != due:
            problem = f"{role} has shape {tuple(tensor.shape)} where {due} is due"
            return FormatError(where, problem, remedy)
    dtypes = {role: tensor.dtype for role, tensor in site.tensors.items()}
    other = next(
        role
        for role, dtype in dtypes.items()
        if dtype not in FLOATS or (role not in site.further and dtype != site.A.dtype)
    )
    problem = f"A is {site.A.dtype} and {'B' if other == 'A' else other} {dtypes[other]}"
    return FormatError(where, problem, "Both must be of one of float16, bfloat16, float32, float64")

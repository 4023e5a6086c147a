"""Candidates without a kind: raw parameters, and modules whose name stands for every weight."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from lora_inject.core.layers.plain_tensors import dtype_name
from lora_inject.core.layers.refusals import computed_weights
from lora_inject.core.layers.stacks import is_transposed
from lora_inject.core.spec.inventory import Candidate
from lora_inject.core.spec.names import joined, parent
from lora_inject.core.spec.sites import Geometry

Refusal = tuple[str, str] | None


def raw_candidate(
    full: str,
    module: nn.Module,
    parameter: nn.Parameter,
    *,
    aliases: tuple[str, ...],
    tied: tuple[str, ...],
    refusal: Refusal,
) -> Candidate:
    """Return the candidate of a parameter of two or more dimensions, or of one that is lazy."""
    shape = () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
    known = is_transposed(module) if len(shape) == 3 else None
    stated = _geometry(shape, transposed=bool(known))
    return Candidate(
        full,
        "parameter",
        *stated[:3],
        full,
        *stated[3:],
        owner=parent(full),
        aliases=aliases,
        tied=tied,
        refusal=refusal,
        needs_layout=len(shape) > 2 and known is None,
        update="weight",
        dtype=dtype_name(parameter.dtype),
    )


def _geometry(shape: tuple[int, ...], *, transposed: bool) -> Geometry:
    if len(shape) < 2:
        return Geometry(0, 0, shape)
    n_out, n_in = shape[:-3:-1] if transposed else shape[-2:]
    experts = math.prod(shape[:-2]) if len(shape) > 2 else None
    return Geometry(n_in, n_out, shape, transposed=transposed, experts=experts)


def whole_module(
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    aliases: tuple[str, ...],
    why_not: Callable[[nn.Module, str, Tensor | None], Refusal],
) -> Candidate | None:
    """Return the candidate of an attention or a recurrent module, None if it reads no weights."""
    members = _members(module, own)
    if not members:
        return None
    computed = computed_weights(module)
    return Candidate(
        name,
        "attention" if "out_proj" in members else "recurrent",
        *(0, 0, (), ""),
        aliases=aliases,
        members=() if computed else tuple(joined(name, key) for key in members),
        refusal=why_not(module, next(iter(computed)), None) if computed else None,
    )


def _members(module: nn.Module, own: dict[str, nn.Parameter]) -> list[str]:
    """Return what is meant by the name of an attention or a recurrent module: what it reads."""
    if isinstance(module, nn.MultiheadAttention):
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [*filter(own.__contains__, keys), "out_proj"]
    recurrent = isinstance(module, nn.RNNBase)
    return [key for key in own if key.startswith("weight")] if recurrent else []

"""How stacks of experts lie, and how many experts a token meets, known by classes of transformers.

Most of its classes say it themselves: `use_experts_implementation` leaves attributes on each
object. What the others mean stands here, by the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")

_MODELS = "transformers.models"

# Classes without that decorator, whether their matrices are (in, out).
_TRANSPOSED = {
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": False,
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextExperts": True,
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": False,
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": False,
}
# Classes whose experts lie below each other in matrices, with the attribute that says how many.
_IN_ONE_MATRIX = {f"{_MODELS}.dbrx.modeling_dbrx.DbrxExpertGLU": "moe_num_experts"}
# Routers that state no number, whose class is written for one.
_TOP_K = {
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeTop2Router": 2,
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersTop1Router": 1,
}


def is_transposed(module: nn.Module) -> bool | None:
    """Return whether the stacks of a module are `(experts, in, out)`; None if no class says it.

    Examples:
        >>> is_transposed(nn.Linear(2, 2)) is None
        True
    """
    own = module.__dict__  # set by transformers' use_experts_implementation, always both
    stated = own.get("is_transposed") if "has_bias" in own else None
    return stated if isinstance(stated, bool) else _known(module, _TRANSPOSED)


def n_in_one_matrix(module: nn.Module) -> int | None:
    """Return how many experts lie in each matrix of a module; None if no class says it."""
    return getattr(module, _known(module, _IN_ONE_MATRIX) or "", None)


def top_k_of_class(module: nn.Module) -> int | None:
    """Return how many experts a router's class is written for; None if it is for any number."""
    return _known(module, _TOP_K)


def _known(module: nn.Module, table: Mapping[str, T]) -> T | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)

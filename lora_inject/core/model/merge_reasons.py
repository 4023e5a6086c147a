"""Why a merge cannot write a tensor, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.layers.packed_weights import reason_against
from lora_inject.core.layers.plain_tensors import sharded_by
from lora_inject.core.model.packed_target import reasons_against_packed
from lora_inject.core.model.target import Target
from lora_inject.errors import LayerError, StateError


def refuse_unwritable(target: Target) -> None:
    """Raise if there is a reason; a weight that is not plain may be written all the same."""
    for reason in _reasons(target):
        raise LayerError(f"merge into {target.name!r}", *reason)


def _reasons(target: Target) -> Iterator[tuple[str, str]]:
    """Yield why the tensor cannot be written, and what to do."""
    weight = target.weight
    if weight.device.type == "meta":
        yield "the weight is on the meta device", "Load the base weights first"
    if how := sharded_by(weight):
        yield f"the weight is sharded by {how}", "Merge into an unsharded copy"
    if target.is_packed:
        yield from reasons_against_packed(target)
    else:
        yield from _reasons_here(target)


def _reasons_here(target: Target) -> Iterator[tuple[str, str]]:
    """Yield why nothing can be added to a whole weight where it stands."""
    weight = target.weight
    if (reason := reason_against("merge", target.holder.module, weight)) is not None:
        yield reason
    if tuple(weight.shape) != target.due_shape:
        problem = f"the weight has shape {tuple(weight.shape)}, and the adapter is for "
        remedy = "Merge into an unsharded copy (within summon_full_params(model), where there "
        remedy += "is one)"
        yield f"{problem}{target.due_shape}: it is sharded or was replaced", remedy
    if not weight.is_contiguous():
        remedy = "Make it so first: model.to(memory_format=torch.contiguous_format), or "
        yield "the weight is not contiguous", remedy + "weight.data = weight.data.contiguous()"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        problem = "the weight was made in inference mode, outside of which nobody may write it"
        remedy = "Call merge within torch.inference_mode(), or load the base outside of it"
        yield problem, remedy
    if weight.is_cpu and weight.is_shared():  # type: ignore[no-untyped-call]
        problem = "the weight is in memory that other processes share, whose adapters would be "
        problem += "added to what is merged"
        yield problem, "Merge before share_memory() and before it is sent, or a copy.deepcopy"


def no_root(inner: Iterable[str]) -> StateError:
    """Return the error of a module that is no root; `inner` are the names of those inside."""
    problem = "this module has no adapters"
    if names := sorted(inner):
        problem = f"parts of this module were injected, each alone: {names}"
    remedy = "Call it on the model that was given to inject"
    return StateError("merge or unmerge", problem, remedy)


def left_written(i: int, n: int) -> StateError:
    """Return the error of a merge that failed where nothing of before was kept."""
    problem = f"it failed at tensor {i} of {n}, and what was written stays written"
    remedy = "Load the base weights again, which undo=False did not keep"
    return StateError("merge(undo=False)", problem, remedy)


def refuse_values(tensor: Tensor, what: str, asked: str) -> None:
    """Raise for a tensor of an adapter that is sharded, NaN or Inf; `what` names it."""
    if how := sharded_by(tensor):
        problem = f"{what} is sharded by {how}"
        raise LayerError(asked, problem, "Merge into an unsharded copy")
    if not all_finite(tensor):
        problem = f"{what} is NaN or Inf in {int((~torch.isfinite(tensor)).sum())} places"
        remedy = "The adapter is broken; merge another checkpoint of it"
        raise StateError(asked, problem, remedy)

"""Models whose tensors are spread over processes: what must come before sharding is refused after.

An adapter that is put onto a sharded model would be plain Parameters among shards, whose
gradients nobody reduces. `fsdp2` loads onto what FSDP2 has sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.adapter.fingerprint import sample_positions
from lora_inject.errors import LayerError
from lora_inject.layers.survey import Survey


def sharded_by(tensor: Tensor) -> str | None:
    """Return what holds only a part of a tensor in this process, None for a whole tensor."""
    if type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor"):
        return "fully_shard or parallelize_module (it is a DTensor)"
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


def refuse_sharded(survey: Survey, asked: str) -> None:
    """Check that a model is not spread over processes yet."""
    wrapper: Any = type(survey.given)
    engine = wrapper.__module__ == "deepspeed.runtime.engine"
    if engine or issubclass(wrapper, nn.parallel.DistributedDataParallel):
        raise LayerError(
            asked,
            f"the model is wrapped in {wrapper.__name__}, which would not reduce its gradients",
            "Inject into the model first, then wrap it",
        )
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    wrapped = (path for path, module in survey.modules if fsdp and isinstance(module, fsdp))
    # A list: one call, and not one for each tensor of all adapters.
    stepped = [
        path
        for path, module in survey.modules
        for parameter in module._parameters.values()
        if hasattr(parameter, "_hp_mapping")  # what DeepSpeed's optimizer has, others come too late
    ]
    zero = ((path, "DeepSpeed ZeRO (its gradients)") for path in stepped)
    # Older releases of transformers keep each process's part as a plain tensor.
    split = ((path, "tp_plan") for path, m in survey.modules if "_hf_tp_plan" in m.__dict__)
    parts = ((holder.name, sharded_by(holder.tensor)) for holder in survey.holders)
    whole = ((path, "FullyShardedDataParallel") for path in wrapped)
    for path, how in chain(whole, zero, split, parts):
        if how:
            raise LayerError(
                asked,
                f"{path or 'the model'!r} is sharded by {how}, and the adapter's gradients would "
                "not be reduced",
                "Inject or load first, then shard: fully_shard, parallelize_module and DeepSpeed "
                "distribute an adapter with its layer (transformers: load without tp_plan); "
                "load_adapter and swap_adapter also work after fully_shard",
            )


def is_sharded(survey: Survey) -> bool:
    """Return whether each process holds only a part of any tensor of the model."""
    return any(hasattr(p, "full_tensor") for _, m in survey.modules for p in m._parameters.values())


def writes_here(survey: Survey) -> bool:
    """Return whether this process writes a model's files: one of several with shards."""
    return not is_sharded(survey) or torch.distributed.get_rank() == 0


def reshard(survey: Survey) -> None:
    """Reshard FSDP2 modules: parameters that a forward left gathered are copies."""
    for module in fsdp2_modules(survey):
        module.reshard()


def fsdp2_modules(survey: Survey) -> list[Any]:
    """Return the modules that `fully_shard` was called with."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for _, module in survey.modules if isinstance(module, fsdp)]


@torch.no_grad()
def copy_into(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write values into Parameters; of sharded ones each process writes its part.

    Every process has all the values, so nothing is sent.
    """
    plain: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter, value in zip(parameters, values, strict=True):
        held: Any = parameter
        if type(held) is not nn.Parameter and hasattr(held, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = value.detach().to(held.device, held.dtype)  # noqa: PLW2901
            mesh, placements = held.device_mesh, held.placements
            held.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
        else:
            plain[0].append(parameter)
            plain[1].append(value)
    if plain[0]:
        torch._foreach_copy_(*plain)


@torch.no_grad()
def samples_of_shards(weights: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Sample DTensors as `adapter.fingerprint.samples` does tensors; a collective operation."""
    alike: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((weight.device_mesh, weight.placements), []).append(name)
    found: dict[str, tuple[float, ...]] = {}
    for (mesh, placements), names in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not all(type(p).__name__ in ("Shard", "Replicate") for p in placements):
            continue
        local = [_local_samples(weights[name]) for name in names]
        width = max(map(len, local))
        rows = torch.zeros(len(names), width, device=weights[names[0]].device)
        for row, values in zip(rows, local, strict=True):
            row[: len(values)] = values
        parts = [Partial() if p.is_shard() else Replicate() for p in placements]
        whole = DTensor.from_local(rows, mesh, parts).full_tensor().tolist()
        for name, values, row in zip(names, local, whole, strict=True):
            found[name] = tuple(row[: len(values)])
    return found


def _local_samples(weight: Any) -> Tensor:
    """Return the sampled values that this process holds, 0 for the others."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, whole = weight.device_mesh, weight.placements, tuple(weight.shape)
    shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    local = weight.to_local()
    positions = torch.tensor(sample_positions(whole), dtype=torch.long, device="cpu")
    index = torch.stack(torch.unravel_index(positions, whole), dim=1) - positions.new_tensor(offset)
    here = ((index >= 0) & (index < positions.new_tensor(shape))).all(dim=1)
    values = torch.zeros(len(positions), device=local.device)
    values[here] = local[index[here].unbind(dim=1)].to(values.dtype)
    return values

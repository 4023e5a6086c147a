"""Models whose tensors are spread over processes: what must come before sharding is refused after.

An adapter that is put onto a sharded model would be plain Parameters beside shards, whose
gradients nobody reduces.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.layers.survey import Survey


def sharded_by(tensor: Tensor) -> str | None:
    """Return what holds only a part of a tensor in this process, None for a whole tensor."""
    if hasattr(tensor, "full_tensor"):
        return "fully_shard or parallelize_module (it is a DTensor)"
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


def refuse_sharded(survey: Survey, asked: str) -> None:
    """Check that a model is not spread over processes yet."""
    if isinstance(survey.given, nn.parallel.DistributedDataParallel):
        raise LayerError(
            asked,
            "the model is wrapped in DistributedDataParallel, which would not reduce its gradients",
            "Inject into the model first, then wrap it",
        )
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for path, module in survey.modules:
        how = "FullyShardedDataParallel" if isinstance(module, fsdp) else None
        for key, parameter in () if how else survey.own[id(module)].items():
            if how := sharded_by(parameter):
                path = f"{path}.{key}" if path else key  # noqa: PLW2901 - it ends the loop
                break
        if how:
            raise LayerError(
                asked,
                f"{path or 'the model'!r} is sharded by {how}, and the adapter's gradients would "
                "not be reduced",
                "Inject or load first, then shard: fully_shard, parallelize_module and DeepSpeed "
                "distribute an adapter with its layer",
            )

"""How Trainer is set up: alone, with torchrun or accelerate, with DDP or FSDP2.

`--batch` counts the rows of an update over all processes and parts, so the loss curve
does not depend on how many share the work.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from training.arguments import warmup_of

__all__ = ["last_checkpoint", "on_cpu", "settings", "world"]


def world() -> int:
    """How many processes torchrun or accelerate has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether there is no accelerator."""
    return not torch.accelerator.is_available()


def settings(args: argparse.Namespace, n_rows: int, metric: str, higher: bool) -> Any:
    """What Trainer is told.

    Args:
        args: The command line.
        n_rows: Rows to train on.
        metric: Which number of the held-out rows chooses the best checkpoint.
        higher: Whether more of it is better.
    """
    from transformers import TrainingArguments

    steps = args.max_steps if args.max_steps > 0 else math.ceil(n_rows / args.batch * args.epochs)
    eval_every = args.eval_every or max(1, steps // 10)
    part = args.batch // (world() * args.accumulate)
    return TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        seed=args.seed,
        per_device_train_batch_size=part,
        per_device_eval_batch_size=max(part, 16),
        gradient_accumulation_steps=args.accumulate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=warmup_of(args, steps),
        bf16=args.bf16,
        eval_strategy="steps",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=eval_every,
        save_total_limit=args.keep,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{metric}",
        greater_is_better=higher,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        **_checkpointing(args),
        **_device(args),
    )


def _checkpointing(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import TrainingArguments

    # Renamed within transformers 5.
    known = TrainingArguments.__dataclass_fields__
    word = "activation" if "activation_checkpointing" in known else "gradient"
    how = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    return {f"{word}_checkpointing": True, **how} if args.gradient_checkpointing else {}


def _device(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if on_cpu():
        found |= {"use_cpu": True, "dataloader_pin_memory": False}
    if world() > 1:
        found |= {"ddp_find_unused_parameters": False}
        found |= {"ddp_backend": "gloo"} if on_cpu() else {}
    if args.fsdp:
        found |= {"fsdp": True, "fsdp_config": {"version": 2}}
        found |= _fsdp_on_cpu() if on_cpu() else {}
    return found


def _fsdp_on_cpu() -> dict[str, Any]:
    """Have accelerate shard on the CPU, where it would train with DDP and not say so.

    Its `AcceleratorState` takes up FSDP for every kind of several accelerators and leaves
    `MULTI_CPU` out, though torch shards over gloo as well. So it is told of several GPUs, once the
    device is settled as the CPU.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # as TrainingArguments begins, too
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}


def last_checkpoint(args: argparse.Namespace) -> Path | None:
    """The newest checkpoint of the run, if there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = args.output / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else Path(found)

"""Merge adapters into safetensors checkpoints, without building the model.

An output file is the base's file with some rows computed again, so most of a merge is copying.
`plan_merge` says what would happen, `merge_checkpoint` does it, `verify_checkpoint` checks it, and
`extract_adapter` is the reverse.
"""

from lora_inject.checkpoint.extract import ExtractReport, extract_adapter
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.merge import (
    check_output,
    free_bytes,
    merge_checkpoint,
    merge_planned,
)
from lora_inject.checkpoint.merge_inputs import MergeOptions, WeightedAdapter, read_weighted
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.verify import VerifyReport, verify_checkpoint

__all__ = [
    "Checkpoint",
    "ExtractReport",
    "MergeOptions",
    "MergePlan",
    "VerifyReport",
    "WeightedAdapter",
    "check_output",
    "extract_adapter",
    "free_bytes",
    "merge_checkpoint",
    "merge_planned",
    "plan_merge",
    "read_weighted",
    "verify_checkpoint",
]

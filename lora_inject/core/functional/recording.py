"""Whether what an operation returns may be written to in place.

Selective activation checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`)
keeps the results of some operations and hands them out again in the backward. It sees operations
through a dispatch mode. An update that is added in place to a kept product would be in it already
when the recomputation adds it again. So a result is written to only where no mode could keep it.
"""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether a dispatch mode sees each operation, and may keep what it returns."""
    return torch._C._len_torch_dispatch_stack() > 0

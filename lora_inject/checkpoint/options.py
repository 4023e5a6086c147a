"""How to merge: the choices, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_inject.checkpoint.quantized import FORMAT_DTYPES
from lora_inject.errors import CheckpointError

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16` to write every float tensor so; None keeps each
            tensor's own. `fp32`, `bf16` and `fp16` are understood.
        min_kept: Least share of every delta that must be left after rounding, in [0, 1]; if less is
            left, the merge fails before anything is visible. None: any.
        verify: Before publishing, compute every merged tensor again and compare every other byte.
        copy_code: Copy the base's `*.py` files.
        allow_new: Add trained tensors that the base lacks (a new classifier) instead of refusing.
        dequantize: `bfloat16`, `float16` or `float32`: write every quantized tensor of the base as
            plain floats, and a config without quantization.
        requantize: Quantize merged weights of a quantized base again, in their own format.
        any_base: Merge although the adapter's fingerprint says that it was made on another base.
        workers: Threads that compute; None: one for each core, at most four.
        rename: Beginnings of the adapters' names to beginnings of the base's names, if they differ
            and the base's class does not say so.
        tie: Name of a tensor that the base's files lack to the stored tensor that it equals; empty
            if nothing is tied. None asks the base's class if an update may concern a tie.
    """

    dtype: str | None = None
    min_kept: float | None = None
    verify: bool = False
    copy_code: bool = False
    allow_new: bool = False
    dequantize: str | None = None
    requantize: bool = False
    any_base: bool = False
    workers: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    tie: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for option in ("dtype", "dequantize"):
            said = getattr(self, option)
            if said is not None:  # an enum's member becomes plain text
                said = _SHORT.get(said, str(said))
                object.__setattr__(self, option, said)
            if said not in {None, *FORMAT_DTYPES}:
                remedy = f"Use {', '.join(FORMAT_DTYPES)}"
                raise CheckpointError(f"write {option} {said!r}", "it is not known", remedy)
        if self.requantize and self.dequantize is not None:
            found = "both dequantize and requantize are given"
            raise CheckpointError("merge", found, "Choose one of them")
        if self.min_kept is not None and not 0 <= self.min_kept <= 1:
            asked = f"keep at least {self.min_kept} of every delta"
            remedy = "Give a number from 0 to 1, such as 0.98"
            raise CheckpointError(asked, "it is not a share", remedy)
        if self.workers is not None and self.workers < 1:
            raise CheckpointError(f"{self.workers} workers", "it is below 1", "Give 1 or more")

    @property
    def n_threads(self) -> int:
        """Number of threads that compute."""
        return self.workers or min(4, os.cpu_count() or 1)

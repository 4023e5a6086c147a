"""What a merge of files did, besides what became of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_inject.core.functional.merge_report import MergeReport, TensorReport


@dataclass(frozen=True, repr=False, kw_only=True)
class MergedFiles(MergeReport):
    """What `merge_checkpoint` did; `n_tensors` counts those that were copied too.

    Attributes:
        output: The folder that was written.
        n_bytes: Size of all weight files.
        resumed: Weight files that an earlier run had finished.
        verified: Whether the output was verified before it was published.
        seconds: From the plan to the end.
        fsync_seconds: The part of it that was waiting for the disk.
        peak_memory_bytes: Most memory that the process ever held, None where unknown.
    """

    output: Path
    n_bytes: int
    resumed: tuple[str, ...]
    verified: bool
    seconds: float
    fsync_seconds: float
    peak_memory_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**super().to_dict(), "output": str(self.output), "resumed": list(self.resumed)}


def tensor_report(data: Mapping[str, Any]) -> TensorReport:
    """Return the report that its `to_dict` gave as plain data."""
    return TensorReport(
        **{**data, "shape": tuple(data["shape"]), "sites": tuple(data["sites"])},
    )

"""What a merge did, as plain data.

Every number that decides whether to trust the output is in the report, per tensor: how
large the delta was beside the weight, and how much of it the output's dtype could hold.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.output_rows import TensorReport

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: The folder.
        complete: Whether the output is published; False where other ranks have shards to finish.
        tensors: Every computed tensor of the shards that this process knows of.
        n_tensors: Tensors of the whole output.
        n_bytes: Size of all output shards.
        resumed: Shards that an earlier run had finished.
        lost: Names of tensors of whose delta less than `min_kept` survived.
        verified: Whether the output was verified before it was published.
        seconds: From the plan to the end.
        fsync_seconds: The part of it that was waiting for the disk.
        peak_memory_bytes: Most memory that the process ever held, None where unknown.
        notes: What a reader should know.
    """

    output: Path
    complete: bool
    tensors: tuple[TensorReport, ...]
    n_tensors: int
    n_bytes: int
    resumed: tuple[str, ...]
    lost: tuple[str, ...]
    verified: bool
    seconds: float
    fsync_seconds: float
    peak_memory_bytes: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        data = asdict(self)
        data["output"] = str(self.output)
        data["tensors"] = [tensor_to_dict(tensor) for tensor in self.tensors]
        return data


def tensor_to_dict(tensor: TensorReport) -> dict[str, Any]:
    """Return one tensor's report as plain data."""
    return {**asdict(tensor), "shape": list(tensor.shape), "sites": list(tensor.sites)}


def tensor_from_dict(data: dict[str, Any]) -> TensorReport:
    """Return a tensor's report from the record of a finished shard."""
    return TensorReport(**{**data, "shape": tuple(data["shape"]), "sites": tuple(data["sites"])})


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process ever held, None where the system does not say."""
    # Not getrusage on Linux: it starts from what the process held that started this one.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

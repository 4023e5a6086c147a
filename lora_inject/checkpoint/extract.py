"""The reverse of merging: the difference of two checkpoints as an adapter.

A fine-tuned checkpoint is its base and a delta for each tensor, and the best adapter of a
given rank is the delta's truncated SVD (Eckart and Young). Tensors are streamed; what no low rank
can carry (norms, biases) is stored in full when asked, and is listed when not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.choose import weight_name
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.merge_files import Progress
from lora_inject.checkpoint.output_files import FLOATS
from lora_inject.checkpoint.place import matrix_of
from lora_inject.checkpoint.read import RowReader
from lora_inject.checkpoint.same_base import fingerprint
from lora_inject.checkpoint.svd import Decomposed, decompose
from lora_inject.errors import CheckpointError
from lora_inject.formats import write_adapter
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.safetensors_file import TensorEntry


@dataclass(frozen=True)
class Extracted:
    """What became of one tensor that differs.

    Attributes:
        name: The tensor.
        kept: `low rank`, `in full`, or `left` where neither was possible or asked.
        rank: Rank of its site, None otherwise.
        energy: Share of the delta's sum of squares that the site holds, None otherwise.
        relative: `|delta| / |W|`.
        exact: Whether the SVD was exact.
    """

    name: str
    kept: str
    rank: int | None
    energy: float | None
    relative: float | None
    exact: bool = True


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction found.

    Attributes:
        tensors: Every tensor that differs.
        n_equal: How many do not.
    """

    tensors: tuple[Extracted, ...]
    n_equal: int

    @property
    def left(self) -> tuple[str, ...]:
        """Names of tensors whose difference the adapter does not hold."""
        return tuple(tensor.name for tensor in self.tensors if tensor.kept == "left")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "n_equal": self.n_equal,
            "left": list(self.left),
        }


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    format: str = "peft",  # noqa: A002
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the difference of two checkpoints as a low-rank adapter.

    Args:
        base: Folder of the base.
        tuned: Folder of the fine-tuned checkpoint; the same tensor names.
        output: Where to write the adapter.
        rank: Rank of every site, at most.
        energy: Share of each delta's sum of squares to keep, in (0, 1]; the rank follows.
        full: Store in full what has fewer than two dimensions or another shape than the base's.
        format: Format to write.
        overwrite: Replace an adapter that is there.
        progress: Called with bytes done and bytes in all.

    Returns:
        What the adapter holds of each tensor.

    Raises:
        CheckpointError: Neither or an impossible measure given, or the tensor names differ.
        FormatError: The format cannot hold the adapter, or the output is in the way.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> W, D = torch.zeros(6, 4), torch.outer(torch.arange(6.0), torch.ones(4))
        >>> save_file({"fc.weight": W}, folder / "base.safetensors")
        >>> save_file({"fc.weight": W + D}, folder / "tuned.safetensors")
        >>> report = extract_adapter(
        ...     folder / "base.safetensors", folder / "tuned.safetensors", folder / "sql", rank=1
        ... )
        >>> round(report.tensors[0].energy, 4)
        1.0
    """
    state, report = difference_of(
        base, tuned, rank=rank, energy=energy, full=full, progress=progress
    )
    write_adapter(state, output, format=format, overwrite=overwrite)
    return report


def difference_of(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> tuple[AdapterState, ExtractReport]:
    """Return the difference of two checkpoints as an adapter; see `extract_adapter`.

    Returns:
        The adapter, its scale 1 everywhere, with the base's fingerprint; and what it holds of each
        tensor.
    """
    _check_measure(rank, energy)
    first, second = Checkpoint.open(base), Checkpoint.open(tuned)
    of = BaseClass(first)
    _check_names(first, second)
    sites: dict[str, SiteState] = {}
    trained: dict[str, Tensor] = {}
    found: list[Extracted] = []
    n_equal, done, total = 0, 0, second.n_bytes
    with _readers(first) as mine, _readers(second) as theirs:
        for entry in second:
            pair = _Pair(first.tensors.get(entry.name), entry, mine, theirs, first, second)
            row = _take(pair, of, rank, energy, full, sites, trained)
            n_equal += row is None
            found += [row] if row is not None else []
            done += entry.n_bytes
            if progress is not None:
                progress(done, total)
    if not sites and not trained:
        raise CheckpointError(
            f"extract an adapter from '{tuned}'",
            f"{n_equal} tensors equal the base's and {len(found)} differ in what is not low rank",
            "Check the paths; store small tensors in full (full) if only they were trained",
        )
    known = fingerprint(first, [weight_name(site.spec) for site in sites.values()])
    state = AdapterState(sites, trained, fingerprint=known)
    return state, ExtractReport(tuple(found), n_equal)


def _check_measure(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise CheckpointError("extract", "neither rank nor energy was given", "Give one or both")
    if rank is not None and rank < 1:
        raise CheckpointError(f"extract rank {rank}", "that is none at all", "Give 1 or more")
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise CheckpointError(
            f"extract energy {energy}", "it is not a share", "Give a number above 0, at most 1"
        )


def _check_names(base: Checkpoint, tuned: Checkpoint) -> None:
    lost = sorted(base.tensors.keys() - tuned.tensors.keys())
    new = sorted(tuned.tensors.keys() - base.tensors.keys())
    if lost or new:
        what = [f"'{name}' is only in the base" for name in lost[:3]]
        what += [f"'{name}' is only in the fine-tuned one" for name in new[:3]]
        raise CheckpointError(
            f"compare '{base.folder}' and '{tuned.folder}'",
            f"{len(lost) + len(new)} tensor names differ: {'; '.join(what)}",
            "Save both with the same version of the same library",
        )


@contextlib.contextmanager
def _readers(checkpoint: Checkpoint) -> Iterator[dict[str, RowReader]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(RowReader(shard.path))
            for name, shard in checkpoint.shards.items()
        }


@dataclass(frozen=True)
class _Pair:
    """One tensor in both checkpoints."""

    before: TensorEntry | None
    after: TensorEntry
    mine: dict[str, RowReader]
    theirs: dict[str, RowReader]
    base: Checkpoint
    tuned: Checkpoint

    @property
    def is_float(self) -> bool:
        both = (self.before, self.after)
        return all(entry is not None and entry.dtype in FLOATS for entry in both)

    @property
    def same_shape(self) -> bool:
        return self.before is not None and self.before.shape == self.after.shape

    def difference(self) -> Tensor:
        """Return the delta, float32, of the tensor's shape."""
        assert self.before is not None
        n_cols, name = max(1, matrix_of(self.after.shape)[1]), self.after.name
        delta = torch.empty(self.after.n_elements // n_cols, n_cols)
        before = self.mine[self.base.shard_of[name]].blocks(self.before, n_cols)
        after = self.theirs[self.tuned.shard_of[name]].blocks(self.after, n_cols)
        for (start, old), (_, new) in zip(before, after, strict=True):
            delta[start : start + len(new)] = new.to(torch.float32) - old.to(torch.float32)
        return delta.view(self.after.shape)

    def size(self) -> float:
        """Return `|W|`."""
        assert self.before is not None
        reader, n_cols = (
            self.mine[self.base.shard_of[self.after.name]],
            matrix_of(self.after.shape)[1],
        )
        blocks = reader.blocks(self.before, max(1, n_cols))
        return math.sqrt(sum(float(w.double().square().sum()) for _, w in blocks))

    def value(self) -> Tensor:
        """Return the fine-tuned tensor."""
        reader = self.theirs[self.tuned.shard_of[self.after.name]]
        return reader.rows(self.after, 1, 0, self.after.n_elements).view(self.after.shape).clone()


def _take(
    pair: _Pair,
    of: BaseClass,
    rank: int | None,
    energy: float | None,
    full: bool,
    sites: dict[str, SiteState],
    trained: dict[str, Tensor],
) -> Extracted | None:
    """Put one tensor's difference into the adapter; None where there is none."""
    name, shape = pair.after.name, pair.after.shape
    if not pair.is_float or not pair.after.n_elements:
        return None if pair.same_shape else Extracted(name, "left", None, None, None)
    if not pair.same_shape:
        if full:
            trained[name] = pair.value()
        return Extracted(name, "in full" if full else "left", None, None, None)
    difference = pair.difference()
    delta = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    if not math.isfinite(delta):
        raise CheckpointError(
            f"compare '{name}'", "one of the two holds NaN or Inf", "It is damaged; fetch it again"
        )
    if delta == 0:
        return None
    relative = delta / size if (size := pair.size()) else None
    if len(shape) < 2 or min(matrix_of(shape)) < 2:
        if full:
            trained[name] = pair.value()
        return Extracted(name, "in full" if full else "left", None, None, relative)
    site, held, exact = _site(pair, of, difference, rank, energy)
    sites[site.spec.name] = site
    return Extracted(name, "low rank", site.spec.rank, held, relative, exact)


def _site(
    pair: _Pair, of: BaseClass, difference: Tensor, rank: int | None, energy: float | None
) -> tuple[SiteState, float, bool]:
    """Decompose one tensor; a stack of matrices matrix by matrix, to one rank."""
    name, shape = pair.after.name, pair.after.shape
    stacked = len(shape) == 3 and not name.endswith(".weight")
    rows, cols = matrix_of(shape[1:] if stacked else shape)
    n = shape[0] if stacked else 1
    matrices = difference.reshape(n, rows, cols)
    found = [decompose(matrix, rank, energy) for matrix in matrices]
    common = max(len(d.S) for d in found)
    kind = "parameter" if stacked or not name.endswith(".weight") else _kind(of, name, shape)
    transposed = kind in {"conv1d", "embedding"}
    halves = [_halves(d, common, transposed) for d in found]
    A, B = (torch.stack(side) if stacked else side[0] for side in zip(*halves, strict=True))
    n_in, n_out = (rows, cols) if transposed else (cols, rows)
    spec = SiteSpec(
        name=name if kind == "parameter" else name.removesuffix(".weight"),
        kind=kind,
        in_features=n_in,
        out_features=n_out,
        weight_shape=shape,
        rank=common,
        alpha=float(common),
        transposed=transposed,
        experts=n if stacked else None,
        weight=name,
    )
    total = sum(d.total for d in found)
    held = sum(d.energy * d.total for d in found) / total if total else 1.0
    return SiteState(spec, A, B), held, all(d.exact for d in found)


def _halves(found: Decomposed, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return A and B, each with half of the singular values, padded with zeros to `rank`."""
    root = found.S.sqrt()
    left, right = found.U * root, (found.V * root).T
    pad = rank - len(found.S)
    left = torch.nn.functional.pad(left, (0, pad))
    right = torch.nn.functional.pad(right, (0, 0, 0, pad))
    A, B = (left.T, right.T) if transposed else (right, left)
    return A.contiguous(), B.contiguous()


def _kind(of: BaseClass, name: str, shape: tuple[int, ...]) -> str:
    """Return the kind of layer that holds a weight, as the class says; linear without a class."""
    if len(shape) > 2:
        return "conv"
    module = of.module_of(name) if of.known else None
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "conv1d" if module is not None and of.transposed(name) else "linear"

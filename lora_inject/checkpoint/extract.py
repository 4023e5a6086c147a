"""The reverse of merging: the difference of two checkpoints as an adapter.

The best adapter of a given rank is the delta's truncated SVD (Eckart and Young). In memory are the
delta of one tensor, in float32 or float64, and the adapter. Tensors without a low-rank form (norms,
biases) are stored in full on request, else listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.algebra.svd import Decomposed, decompose
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.output_files import matrix_of
from lora_inject.checkpoint.pieces import Progress, counting_bytes
from lora_inject.core.adapter.fingerprint import Sampled
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import check_free
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.core.spec.names import counted, is_bias, parent
from lora_inject.core.spec.sites import Geometry, SiteSpec
from lora_inject.core.spec.tables import Figures, Listing, ListReport, listed, span, wrapped
from lora_inject.errors import CheckpointError, user_path
from lora_inject.formats.exchange import write_adapter
from lora_inject.formats.model_facts import ModelFacts


@dataclass(frozen=True)
class Extracted(Figures):
    """The result for one tensor that differs between the checkpoints."""

    name: str  # the tensor
    kept: str  # `low rank`, `in full`, or `left` if neither was possible or asked for
    relative: float | None = None  # `|delta| / |W|`
    rank: int | None = None  # rank of its site, None otherwise
    # share of the delta's sum of squares that the site holds, None otherwise
    energy: float | None = None


@dataclass(frozen=True)
class ExtractReport(ListReport):
    """What an extraction found.

    Attributes:
        tensors: Every tensor that differs.
        n_equal: Number of equal tensors.
        n_sites: Sites of the adapter; a tied tensor has one for each layer that shares it.
    """

    tensors: tuple[Extracted, ...]
    n_equal: int
    n_sites: int

    @property
    def left(self) -> tuple[str, ...]:
        """Names of tensors whose difference the adapter does not hold."""
        return tuple(tensor.name for tensor in self.tensors if tensor.kept == "left")

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield what the adapter holds of the difference, and what was left behind."""
        low = [tensor for tensor in self.tensors if tensor.kept == "low rank"]
        low.sort(key=lambda tensor: tensor.energy or 0.0)
        cells = tuple((t.name, float(t.rank or 0), t.relative, t.energy) for t in low)
        joined = "Of several: the ranks, median |D|/|W|, least energy; --all lists each."
        heads = ("tensor", "rank", "|D|/|W|", "energy")
        rows = Listing(heads, cells, {"rank": span, "energy": min})
        n_full = sum(tensor.kept == "in full" for tensor in self.tensors)
        totals = (
            f"{counted(self.n_sites, 'site')}, {counted(n_full, 'tensor')} in full; "
            f"{len(self.left):,} left behind, {self.n_equal:,} equal to the base's"
        )
        yield from rows.lines(width, everything=everything, joined=joined)
        yield from listed("left behind:", self.left, width, everything=everything)
        yield from wrapped(totals, width)


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    square: str | None = None,
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
        full: Store tensors in full that have fewer than two dimensions or another shape than the
            base's.
        square: What a layer is whose weight is square, where no class says it: `linear`, `conv1d`
            or `embedding`. Of the latter two the rows are the inputs.
        format: Format to write.
        overwrite: Replace an existing adapter.
        progress: Called with bytes done and bytes in all.

    Returns:
        What the adapter holds of each tensor.

    Raises:
        CheckpointError: Neither `rank` nor `energy` is given, one is out of its range, the tensor
            names differ, or nothing says what a square matrix is.
        FormatError: The format cannot express the adapter, or the output exists.

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
    check_free(user_path("extract, output", output), overwrite=overwrite)
    if rank is None and energy is None:
        raise CheckpointError("extract", "neither rank nor energy was given", "Give one or both")
    if rank is not None and rank < 1:
        raise CheckpointError(f"extract rank {rank}", "that is none at all", "Give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        remedy = "Give a number above 0, at most 1"
        raise CheckpointError(f"extract energy {energy}", "it is not a share", remedy)
    if square not in {None, *_SQUARE}:
        remedy = f"Give {', '.join(map(repr, _SQUARE))}"
        raise CheckpointError(f"extract, square {square!r}", "it is no such layer", remedy)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    extraction = _Extraction(before, after, rank, energy, full, square)
    extraction.check_names()
    results, opened, tensors = list[Extracted](), extraction.base, extraction.tuned.tensors
    for name in counting_bytes({name: entry.n_bytes for name, entry in tensors.items()}, progress):
        if (result := extraction.take(tensors[name])) is not None:
            results.append(result)
    n_equal = len(tensors) - len(results)
    if not extraction.sites and not extraction.trained:
        problem = (
            f"{n_equal} tensors equal the base's and {len(results)} differ in what is not low rank"
        )
        remedy = "Check the paths; where only small tensors were trained, pass full=True"
        raise CheckpointError(f"extract an adapter from '{tuned}'", problem, remedy)
    fingerprint = {
        entry.name: Sampled(entry.shape, opened.sample(entry))
        for entry in sorted(opened, key=lambda entry: entry.name)
        if entry.dtype in FLOATS and entry.name not in extraction.trained
    }
    state = AdapterState(extraction.sites, extraction.trained, fingerprint=fingerprint)
    facts = extraction.of.facts() if extraction.of.known else ModelFacts()
    write_adapter(state, output, format, facts=facts, overwrite=overwrite)
    return ExtractReport(tuple(results), n_equal, len(state.sites))


@dataclass
class _Extraction:
    """Adds the differences of tensors to an adapter, one after the other."""

    base: Checkpoint
    tuned: Checkpoint
    rank: int | None
    energy: float | None
    full: bool
    square: str | None

    def __post_init__(self) -> None:
        self.of = BaseClass(self.base)
        self.sites: dict[str, SiteState] = {}
        self.trained: dict[str, Tensor] = {}

    def check_names(self) -> None:
        """Refuse checkpoints whose tensors have other names."""
        lost = sorted(self.base.tensors.keys() - self.tuned.tensors.keys())
        new = sorted(name for name in self.tuned.tensors if self.before(name) is None)
        if lost or new:
            where = "the base" if lost else "the fine-tuned one"
            raise CheckpointError(
                f"compare '{self.base.folder}' and '{self.tuned.folder}'",
                f"'{(lost or new)[0]}' is only in {where}",
                "Save both with the same version of the same library, and tied tensors alike: "
                "apart or as one",
            )

    def before(self, name: str) -> TensorEntry | None:
        """Return the base's tensor of a name, or the one that it is tied to there."""
        stored = self.base.tensors
        source = self.of.source_of(name) if name not in stored and self.of.known else name
        return stored.get(source or "")

    def take(self, after: TensorEntry) -> Extracted | None:
        """Add one tensor's difference to the adapter; None if it does not differ."""
        name, before = after.name, self.before(after.name)
        assert before is not None  # as checked
        same_shape = after.shape == before.shape
        if not {after.dtype, before.dtype} <= FLOATS.keys() or not after.n_elements:
            return None if self._same_bytes(after, before) else Extracted(name, "left")
        if not same_shape:
            return self._whole(after, None)
        difference, size = self._difference(after, before)
        delta = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        if not math.isfinite(delta):
            problem, remedy = "one of the two holds NaN or Inf", "It is damaged; fetch it again"
            raise CheckpointError(f"compare '{name}'", problem, remedy)
        if not delta:
            return None
        relative = delta / size if size else None
        if min(matrix_of(after.shape)) < 2 or is_bias(name):
            return self._whole(after, relative)
        site, held = self._site(name, difference)
        for update in (site, *self._tied(name, site)):
            self.sites[update.spec.name] = update
        return Extracted(name, "low rank", relative, site.spec.rank, held)

    def _same_bytes(self, after: TensorEntry, before: TensorEntry) -> bool:
        """Whether two tensors are one, of whatever dtype."""
        if (after.dtype, after.shape) != (before.dtype, before.shape):
            return False
        mine, theirs = (replace(e, dtype="U8", shape=(e.n_bytes,)) for e in (after, before))
        return all(torch.equal(new, old) for _, new, old in self._blocks(mine, theirs, 1))

    def _blocks(
        self, after: TensorEntry, before: TensorEntry, n_cols: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the first row of each block of rows, and the rows of both."""
        new = RowReader(self.tuned.path_of(after.name)).blocks(after, n_cols)
        old = RowReader(self.base.path_of(before.name)).blocks(before, n_cols)
        for (start, mine), (_, theirs) in zip(new, old, strict=True):
            yield start, mine, theirs

    def _whole(self, after: TensorEntry, relative: float | None) -> Extracted:
        """Store a tensor without a low-rank form in full, if `full` is set."""
        if self.full:
            value = RowReader(self.tuned.path_of(after.name)).whole(after)
            self.trained[after.name] = value
            further = self._further(after.name)  # readers look a tied tensor up under each name
            self.trained |= dict.fromkeys(further, value)
        return Extracted(after.name, "in full" if self.full else "left", relative)

    def _difference(self, after: TensorEntry, before: TensorEntry) -> tuple[Tensor, float]:
        """Return the delta, of the tensor's shape and float32 (float64 for float64), and `|W|`."""
        n_cols, squares = matrix_of(after.shape)[1], 0.0
        wide = torch.float64 if "F64" in (after.dtype, before.dtype) else torch.float32
        delta = torch.empty(after.n_elements // n_cols, n_cols, dtype=wide, device="cpu")
        for start, new, old in self._blocks(after, before, n_cols):
            delta[start : start + len(new)] = new.to(wide) - old.to(wide)
            squares += float(torch.linalg.vector_norm(old, dtype=torch.float64)) ** 2
        return delta.view(after.shape), math.sqrt(squares)

    def _site(self, name: str, difference: Tensor) -> tuple[SiteState, float]:
        """Decompose one tensor; decompose a stack matrix by matrix, to one rank."""
        kind, lies = self._layer(name, tuple(difference.shape))
        n_cols = lies.out_features if lies.transposed else lies.in_features
        matrices = difference.reshape(lies.experts or 1, -1, n_cols)
        parts = [decompose(matrix, self.rank, self.energy) for matrix in matrices]
        rank = max(len(part.S) for part in parts)
        spec = _spec(name, kind, lies, rank)
        halves = [_halves(part, rank, spec.transposed) for part in parts]
        A = torch.stack([A for A, _ in halves]).reshape(spec.a_shape)
        B = torch.stack([B for _, B in halves]).reshape(spec.b_shape)
        total = sum(part.total for part in parts)
        held = sum(part.energy * part.total for part in parts) / total if total else 1.0
        return SiteState(spec, A, B), min(held, 1.0)  # sums differ in their last digits

    def _further(self, name: str) -> list[str]:
        """Return the names of tied tensors that neither checkpoint holds apart."""
        return sorted(self.of.tie_of(name) - self.base.tensors.keys() - self.tuned.tensors.keys())

    def _tied(self, name: str, site: SiteState) -> Iterator[SiteState]:
        """Yield the same update for each layer that shares a tensor, which the files name once."""
        if not self.of.known or len(site.spec.weight_shape) != 2:
            return
        modules = [self.of.module_of(name)]
        for other in self._further(name):
            module = self.of.module_of(other)
            if any(module is known for known in modules):
                continue  # one layer of several names
            modules.append(module)
            spec = _spec(other, *self._layer(other, site.spec.weight_shape), site.spec.rank)
            A, B = site.A, site.B
            if spec.transposed != site.spec.transposed:
                A, B = B.T.contiguous(), A.T.contiguous()
            yield SiteState(spec, A, B)

    def _layer(self, weight: str, shape: tuple[int, ...]) -> tuple[str, Geometry]:
        """Return the kind of layer that the class says, and how its weight is a matrix."""
        of, known = self.of, self.of.known
        layer = of.layer_of(weight) if known else None
        kind, transposed, experts = "parameter", False, None
        if layer is not None and len(layer[1].weight_shape) == len(shape):
            kind, transposed = layer[0], layer[1].transposed
        elif weight.endswith(".weight") and not (known and of.module_of(weight)):
            kind = "conv" if len(shape) > 2 else "linear"  # as its name alone says
            if len(shape) == 2 and shape[0] == shape[1] and not of.has(weight):  # no single expert
                kind = self._square(weight)
            transposed = kind in ("conv1d", "embedding")
        else:
            experts = shape[0] if len(shape) == 3 else None
            square = len(shape) > 2 and shape[-1] == shape[-2]  # whose shape says nothing
            transposed = known and bool((of.stack_transposed if square else of.transposed)(weight))
        n_out, n_in = matrix_of(shape if experts is None else shape[1:])
        if transposed:
            n_out, n_in = n_in, n_out
        return kind, Geometry(n_in, n_out, shape, transposed, experts)

    def _square(self, weight: str) -> str:
        """Return what the user says that a layer with a square weight is."""
        if self.square is None:
            problem = "it is square, and no class says which side is the input"
            remedy = "Put the model's config.json beside the files, or say what such a layer is: "
            said = f"square={_SQUARE[0]!r}, or {' or '.join(map(repr, _SQUARE[1:]))}"
            raise CheckpointError(f"extract '{weight}'", problem, remedy + said)
        return self.square


_SQUARE = ("linear", "conv1d", "embedding")


def _spec(weight: str, kind: str, lies: Geometry, rank: int) -> SiteSpec:
    """Return the site of a weight."""
    name = weight if kind == "parameter" else parent(weight)
    return SiteSpec(name, kind, *lies[:3], rank, float(rank), *lies[3:], weight=weight)


def _halves(part: Decomposed, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return A and B, each with half of the singular values, padded with zeros to `rank`."""
    root, pad = part.S.sqrt(), rank - len(part.S)
    left = torch.nn.functional.pad(part.U * root, (0, pad))
    right = torch.nn.functional.pad((part.V * root).T, (0, 0, 0, pad))
    A, B = (left.T, right.T) if transposed else (right, left)
    return A.contiguous(), B.contiguous()

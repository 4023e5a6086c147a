"""Merged rows of a tensor in 16 bits, with trained copies or with a gain, written or not."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.functional.rounded_fold import Tally, fold_rows, mix_copies
from lora_inject.core.model.target import Target
from lora_inject.errors import LayerError


def merged_rows(
    target: Target, rows: Tensor, start: int, tally: Tally | None, out: Tensor | None = None
) -> Tensor:
    """Return some merged rows, possibly into `rows` itself."""
    if not target.copies:
        return fold_rows(rows, start, target.delta, tally, out)
    wide = target.delta.dtype
    before = rows.to(wide, copy=True)
    wanted = target.delta.add_(mix_copies(rows, _copied(target, before, start), wide), start)
    merged = wanted.to(rows.dtype) if out is None else out.copy_(wanted)
    if tally is not None:
        tally.count(before, wanted - before, wanted - merged.to(wide))
    return merged


def _copied(target: Target, before: Tensor, start: int) -> list[tuple[Tensor, float]]:
    """Return some rows of each trained copy; a copy of other rows has those of before."""
    mixed_copies = []
    stop = start + before.shape[0]
    for copy, weight, some in target.copies:
        if some is None:
            mine = copy.reshape(target.matrix_shape)[start:stop]
        else:
            mine = before.clone()
            for at, row in enumerate(some):
                if start <= row < stop:
                    mine[row - start] = copy.detach()[at]
        mixed_copies.append((mine, weight))
    return mixed_copies


def write_rounded(target: Target, base: Tensor) -> None:
    """Write all merged rows of W, whose values were `base`; count unless that was done before."""
    tally = Tally() if target.narrow and target.tally is None else None
    for start, rows in target.blocks():
        merged_rows(target, rows, start, tally, out=rows)
    target.tally = target.tally or tally
    if target.tally is not None and not target.tally.finite:
        raise not_finite(target, base)


@torch.no_grad()
def formed_values(target: Target, tally: Tally | None = None) -> Tensor:
    """Return all merged values, finite, a new tensor in the shape that the layer states."""
    values = target.values()
    formed = torch.empty(values.shape, dtype=target.dtype, device=values.device)
    out = formed.view(target.matrix_shape)
    for start, rows in target.split(values):
        merged_rows(target, rows, start, tally, out[start : start + len(rows)])
    if not all_finite(formed):
        raise not_finite(target, values)
    return formed


def counted_in(target: Target, kept: dict[str, float] | None) -> Tensor:
    """Return all merged values; note in `kept` the share of the delta that rounding kept."""
    tally = Tally() if kept is not None and target.narrow else None
    formed = formed_values(target, tally)
    if tally is not None and kept is not None:
        kept[target.name] = tally.kept
    return formed


def not_finite(target: Target, base: Tensor) -> LayerError:
    """Return the error of a merged weight with NaN or Inf, whose base was `base`."""
    asked = f"merge into {target.name!r}"
    if not all_finite(base):
        return LayerError(asked, "the base holds NaN or Inf", "Check the base")
    problem = f"the merged weight overflows {target.dtype}"
    return LayerError(asked, problem, "Merge in a wider dtype")

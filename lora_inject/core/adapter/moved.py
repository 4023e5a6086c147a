"""Where an adapter moves a weight that it leaves alone elsewhere.

An embedding's adapter moves the rows of the tokens that training saw, slices are a part of the
outputs, and an expert that met no token stays what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.sites import Block


@torch.no_grad()
def moved_positions(site: SiteState, n: int) -> tuple[int, ...]:
    """Return flat positions of the weight that the update moves most, at most `n`, in order.

    Empty where it moves all of the weight, or nothing: any position is as good as another then.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("e", "embedding", 4, 3, (4, 3), rank=1, alpha=1, transposed=True)
        >>> seen = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
        >>> moved_positions(SiteState(spec, seen, torch.tensor([[1.0], [0.0], [3.0]])), 16)
        (5, 11)
    """
    spec = site.spec
    if site.A.is_meta or site.is_zero or _moves_all(site):
        return ()
    strength = site.B.reshape(-1, spec.rank).abs().amax(1).tolist()
    blocks = sorted(spec.blocks, key=lambda block: -max(strength[slice(*block.b)]))
    most: list[tuple[float, int]] = []
    for block in blocks[:n]:
        most += _most_of(site, block, n)
    return tuple(sorted(position for _, position in sorted(most, reverse=True)[:n]))


def _moves_all(site: SiteState) -> bool:
    spec = site.spec
    if spec.slices is not None:
        return False
    outputs = site.B.any(-1)
    inputs = site.A.reshape(-1, spec.rank, spec.in_features).any(1)
    return bool(outputs.all()) and bool(inputs.all())


def _most_of(site: SiteState, block: Block, n: int) -> list[tuple[float, int]]:
    """Return the size of the update and the position, for the inputs of a block that move most."""
    spec = site.spec
    left = torch.cat([_rows(b, block.b) * sign for _, b, sign in site.pairs], 1)
    right = torch.cat([_rows(a, block.a) for a, _, _ in site.pairs])
    inputs = right.norm(dim=0).topk(min(n, spec.in_features)).indices
    size, outputs = (left @ right[:, inputs]).abs().max(0)
    row, column = (inputs, outputs) if spec.transposed else (outputs, inputs)
    positions = (block.rows[0] + row) * spec.matrix_shape[1] + block.cols[0] + column
    pairs = zip(size.tolist(), positions.tolist(), strict=True)
    return [(moved, position) for moved, position in pairs if moved > 0]


def _rows(stack: Tensor, rows: tuple[int, int]) -> Tensor:
    """Return rows of A or B, flattened to two dimensions."""
    return stack.detach().reshape(-1, stack.shape[-1])[slice(*rows)].float()

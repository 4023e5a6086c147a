"""All figures of one adapter: block by block, and compared with W where its checkpoint is given.

An `Analysis` is plain numbers. What prints, draws or warns reads it and computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis.blocks import Figures, Place, site_blocks
from lora_inject.analysis.spectra import Spectrum, spectrum
from lora_inject.analysis.weights import BlockOnWeight, SiteOnWeight, Weights
from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.write import Progress, counted
from lora_inject.errors import StateError


@dataclass(frozen=True)
class BlockFigures(Place):
    """One low-rank block in numbers."""

    shape: tuple[int, int]  # `(out, in)` of the delta
    rank: int  # r as configured
    spectrum: Spectrum  # singular values of the delta


@dataclass(frozen=True)
class Analysis(Figures):
    """An adapter in numbers.

    Attributes:
        blocks: Every block of every site.
        weights: Site to its comparison with W; empty without a base.
        base: Folder of the base, None without one.
    """

    blocks: tuple[BlockFigures, ...]
    weights: dict[str, SiteOnWeight] = field(default_factory=dict)
    base: str | None = None

    @property
    def n_sites(self) -> int:
        """How many sites there are."""
        return len({block.site for block in self.blocks})

    def on_weight(self) -> list[BlockOnWeight]:
        """Return every block compared with W, in the order of the sites."""
        return [block for found in self.weights.values() for block in found.blocks]


def analyze(
    state: AdapterState,
    base: Weights | str | Path | None = None,
    *,
    any_base: bool = False,
    label: str = "the adapter",
    progress: Progress | None = None,
) -> Analysis:
    """Compute the figures of an adapter, compared with its base if that is given.

    Args:
        state: The adapter.
        base: Its base, a safetensors checkpoint that is streamed, possibly as `Weights` of this
            adapter; None: the adapter alone.
        any_base: Compare although the adapter was made on another base.
        label: What to call the adapter in messages.
        progress: Called with bytes done and bytes in all.

    Returns:
        The figures.

    Raises:
        StateError: The adapter has no sites, or holds NaN or Inf.
        CheckpointError: It does not fit the base.

    Examples:
        >>> import torch
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.site_state import SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))
        >>> block = analyze(AdapterState({"h.0.fc": site})).blocks[0]
        >>> block.kind, block.spectrum.values.tolist(), block.spectrum.stable_rank
        ('h.*.fc', [2.0, 2.0], 2.0)
    """
    if not state.sites:
        found = "it has no low-rank sites"
        raise StateError(f"analyze {label}", found, "Only A and B can be analyzed")
    if isinstance(base, str | Path):
        base = Weights(state, Checkpoint.open(base), label, any_base=any_base)
    sizes = {
        name: site.A.nbytes + site.B.nbytes + (base.n_bytes(name) if base else 0)
        for name, site in state.sites.items()
    }
    blocks: list[BlockFigures] = []
    compared: dict[str, SiteOnWeight] = {}
    for name in counted(sizes, progress):
        blocks += [
            BlockFigures(name, b.label, b.delta.shape, b.rank, spectrum(b.delta))
            for b in site_blocks(state.sites[name])
        ]
        if base is not None:
            compared[name] = base.look(name)
    folder = None if base is None else str(base.checkpoint.folder)
    return Analysis(tuple(blocks), compared, folder)

"""All figures of one adapter: block by block, and compared with W where its checkpoint is given.

An `Analysis` is plain numbers. What prints, draws or warns reads it and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis.places import Place, full_name, place_of
from lora_inject.analysis.spectra import SHARES, Spectrum, spectrum_of
from lora_inject.analysis.thin import site_blocks
from lora_inject.analysis.weights import BlockOnWeight, SiteOnWeight, Weights
from lora_inject.checkpoint import Checkpoint
from lora_inject.errors import StateError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class BlockFigures:
    """One low-rank block in numbers.

    Attributes:
        site: Name of the site.
        label: Slice and expert, empty for a plain site.
        place: Kind and position, from the name.
        shape: `(out, in)` of the delta.
        rank: r as configured.
        spectrum: Singular values of the delta.
    """

    site: str
    label: str
    place: Place
    shape: tuple[int, int]
    rank: int
    spectrum: Spectrum

    @property
    def name(self) -> str:
        """Site and label in one: `h.0.attn.c_attn [q]`."""
        return full_name(self.site, self.label)

    @property
    def first_share(self) -> float:
        """Share of the energy in the first direction; 0 for no delta."""
        return float(self.spectrum.energy[0]) if self.spectrum.rank else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        s = self.spectrum
        return {
            "site": self.site,
            "label": self.label,
            "kind": self.place.kind,
            "position": list(self.place.position),
            "shape": list(self.shape),
            "rank": self.rank,
            "norm": s.norm,
            "stable_rank": s.stable_rank,
            "effective_rank": s.effective_rank,
            "needed": {f"{share:.0%}": s.rank_for(share) for share in SHARES},
            "singular_values": s.values.tolist(),
            "energy": s.energy.tolist(),
        }


@dataclass(frozen=True)
class Analysis:
    """An adapter in numbers.

    Attributes:
        blocks: Every low-rank block, in the order of the sites.
        weights: Site to how it compares with its W; empty where no checkpoint was given.
        base: The checkpoint's folder, None where none was given.
    """

    blocks: tuple[BlockFigures, ...]
    weights: dict[str, SiteOnWeight] = field(default_factory=dict)
    base: str | None = None

    @property
    def on_weight(self) -> tuple[tuple[str, Place, BlockOnWeight], ...]:
        """`(site, place, block)` of every block compared with W, in the order of the sites."""
        return tuple(
            (site, place_of(site, block.label), block)
            for site, found in self.weights.items()
            for block in found.blocks
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        weights = {
            site: {
                "stored": found.stored,
                "rounded": {
                    name: {**asdict(r), "likeness": r.likeness} for name, r in found.rounded.items()
                },
                "blocks": [
                    {
                        "label": b.label,
                        "tensor": b.tensor,
                        **asdict(b.norms),
                        "relative": b.norms.relative,
                        "amplification": b.norms.factor,
                    }
                    for b in found.blocks
                ],
            }
            for site, found in self.weights.items()
        }
        return {
            "n_sites": len({block.site for block in self.blocks}),
            "blocks": [block.to_dict() for block in self.blocks],
            "base": self.base,
            "weights": weights,
        }


def analyze(
    state: AdapterState,
    base: Weights | Checkpoint | str | Path | None = None,
    *,
    rank: int | None = None,
    own: bool = True,
    formats: Collection[str] | None = None,
    any_base: bool = False,
    label: str = "the adapter",
    progress: Progress | None = None,
) -> Analysis:
    """Put an adapter into numbers, and compare it with its base where that is given.

    Args:
        state: The adapter.
        base: Its base, a safetensors checkpoint that is streamed, possibly as `Weights` of this
            adapter; None: the adapter alone.
        rank: Directions that amplification compares; those of each delta by default.
        own: Whether to compare with W's own directions, which takes an SVD of each W.
        formats: Formats of `rounding` to try; all by default.
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
        >>> from lora_inject.adapter.state import SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))
        >>> block = analyze(AdapterState({"h.0.fc": site})).blocks[0]
        >>> block.place.kind, block.spectrum.values.tolist(), block.spectrum.stable_rank
        ('h.*.fc', [2.0, 2.0], 2.0)
    """
    if not state.sites:
        raise StateError(
            f"analyze {label}", "it has no low-rank sites", "Only A and B can be analyzed"
        )
    weights = _weights(state, base, label, any_base=any_base)
    sizes = {
        name: (site.A.nbytes + site.B.nbytes, weights.n_bytes(name) if weights else 0)
        for name, site in state.sites.items()
    }
    done, total = 0, sum(map(sum, sizes.values()))
    blocks: list[BlockFigures] = []
    compared: dict[str, SiteOnWeight] = {}
    for name, site in state.sites.items():
        blocks += [
            BlockFigures(name, b.label, place_of(name, b.label), b.delta.shape, b.rank,
                         spectrum_of(b.delta))
            for b in site_blocks(site)
        ]  # fmt: skip
        if weights is not None:
            compared[name] = weights.look(name, rank, own=own, formats=formats)
        done += sum(sizes[name])
        if progress is not None:
            progress(done, total)
    folder = None if weights is None else str(weights.checkpoint.folder)
    return Analysis(tuple(blocks), compared, folder)


def _weights(
    state: AdapterState,
    base: Weights | Checkpoint | str | Path | None,
    label: str,
    *,
    any_base: bool,
) -> Weights | None:
    if base is None or isinstance(base, Weights):
        return base
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    return Weights(state, checkpoint, label, any_base=any_base)

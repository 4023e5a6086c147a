"""The least share of a delta that a merge has to keep when it rounds."""

from __future__ import annotations

from numbers import Real

from lora_inject.core.model.target import Target
from lora_inject.errors import LayerError, check_type


def check_min_kept(min_kept: float) -> None:
    """Check the smallest share of a delta that rounding may leave."""
    check_type("merge, min_kept", min_kept, Real, "Give a number from 0 to 1")
    if not 0 <= min_kept <= 1:
        asked = f"merge with min_kept={min_kept}"
        raise LayerError(asked, "it is a share of a delta", "Give a number from 0 to 1")


def check_kept(targets: list[Target], min_kept: float) -> None:
    """Refuse a merge of which rounding would leave less than was asked for."""
    kept = {t.name: t.tally.kept for t in targets if t.narrow and t.tally is not None}
    missed = [name for name, share in kept.items() if not share >= min_kept]
    if missed:
        worst = min(missed, key=lambda name: kept[name])
        raise LayerError(
            f"merge with min_kept={min_kept}",
            f"rounding would leave {kept[worst]:.3f} of the delta of {worst!r}, and less than "
            f"asked at {len(missed)} of {len(targets)} tensors",
            "Stay unmerged, or merge in float32",
        )

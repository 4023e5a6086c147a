"""Slices: the parts of a fused projection, and which of them are adapted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slices:
    """The parts of a fused projection's output, and which of them are adapted.

    Examples:
        >>> s = Slices((("q", 8), ("k", 4), ("v", 4)), ("q", "v"))
        >>> s.spans
        ((0, 8), (12, 16))
    """

    # `(name, width)` of each part along the output, in order; the widths sum to `out_features`
    sizes: tuple[tuple[str, int], ...]
    adapt: tuple[str, ...]  # names of the adapted parts, in the order of `sizes`

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """`(start, stop)` along the output of each adapted part."""
        spans, start = [], 0
        for name, width in self.sizes:
            if name in self.adapt:
                spans.append((start, start + width))
            start += width
        return tuple(spans)

    def reasons_against(self, n_outputs: int) -> Iterator[str]:
        """Yield why they are not the parts of an output of this width."""
        if sum(width for _, width in self.sizes) != n_outputs:
            yield "the slices do not fill the output"
        if not self.adapt or self.adapt != tuple(n for n, _ in self.sizes if n in self.adapt):
            yield "'adapt' does not name its slices in order"

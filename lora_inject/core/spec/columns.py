"""Columns of text that fit a width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def columns(
    rows: Sequence[Sequence[str]], n_left: int, width: int, indent: str = "  "
) -> Iterator[str]:
    """Yield rows with aligned columns; if they do not fit, each name is on a separate line.

    The first cell of a row is a name; the first `n_left` columns are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    apart = len(indent) + sum(widths) + 2 * (len(widths) - 1) > width
    for row in rows:
        name, *cells = (
            cell.ljust(size) if i < n_left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        if apart:
            yield indent + row[0]
            name = ""
        yield f"{indent}{'  '.join([name, *cells])}".rstrip()


def sides(shape: Iterable[int]) -> str:
    """Return a shape as `2 x 1,024`."""
    return " x ".join(f"{side:,}" for side in shape) or "scalar"

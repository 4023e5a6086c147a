"""Columns of text that fit a width, for the tables of plans and commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def columns(
    rows: Sequence[Sequence[str]], n_left: int, width: int, indent: str = "  "
) -> Iterator[str]:
    """Yield rows with aligned columns; where they do not fit, each name is on a line of its own.

    Args:
        rows: The cells; the first of each is a name.
        n_left: Columns that are aligned to the left, from the first; others to the right.
        width: In characters.
        indent: Before each line.
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

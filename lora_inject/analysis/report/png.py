"""A grid of numbers as a small PNG, without any library: for pages that must carry their pictures.

One pixel for each number, and the browser enlarges it. A palette of 256 colours makes it
a PNG of a few hundred bytes, where SVG would take an element for each cell.
Source: PNG specification (W3C, third edition), sections 5, 9 and 11.
"""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

# Eleven colours of matplotlib's magma, evenly spaced (Smith and van der Walt, CC0).
_MAGMA = (
    "000004", "150e37", "3b0f70", "641a80", "8c2981", "b73779",
    "de4968", "f7705c", "fe9f6d", "fecf92", "fcfdbf",
)  # fmt: skip
_BLANK = 255  # index of the transparent colour, for NaN
_TOP = 254


def palette() -> list[tuple[int, int, int]]:
    """Return 255 colours from dark to light.

    Example:
        >>> colours = palette()
        >>> len(colours), colours[0], colours[-1]
        (255, (0, 0, 4), (252, 253, 191))
    """
    stops = [bytes.fromhex(colour) for colour in _MAGMA]
    colours = []
    for i in range(_TOP + 1):
        at = i * (len(stops) - 1) / _TOP
        low = min(int(at), len(stops) - 2)
        mix = [a + (b - a) * (at - low) for a, b in zip(stops[low], stops[low + 1], strict=True)]
        colours.append((round(mix[0]), round(mix[1]), round(mix[2])))
    return colours


def encode(grid: Tensor) -> bytes:
    r"""Return a PNG with one pixel for each number from 0 to 1; NaN is transparent.

    Args:
        grid: `(rows, columns)`, neither of them 0.

    Example:
        >>> import torch
        >>> encode(torch.zeros(2, 3))[:8]
        b'\x89PNG\r\n\x1a\n'
    """
    rows, columns = grid.shape
    levels = (grid.detach().cpu().double().clamp(0, 1) * _TOP).round().nan_to_num(_BLANK)
    lines = b"".join(b"\0" + bytes(line) for line in levels.int().tolist())  # \0: no filter
    colours = b"".join(bytes(colour) for colour in palette()) + b"\0\0\0"
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, palette
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours),
        (b"tRNS", b"\xff" * _BLANK + b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def data_uri(grid: Tensor) -> str:
    """Return the PNG of a grid as an address that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(encode(grid)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

"""Where in a model a site lies: its kind and its depth, read from its name.

Models repeat their layers, and the names repeat with a number that counts. The name with
its numbers replaced is the kind, the numbers are the position. The number of an expert is neither.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Kind and position of a block.

    Attributes:
        kind: The site's name with `*` for each number, and the slice: `h.*.attn.c_attn [q]`.
        position: The numbers, such as `(3,)` for layer 3; empty where there are none.
    """

    kind: str
    position: tuple[int, ...]

    @property
    def at(self) -> str:
        """The position as text: `3`, `1.0`, or `-`."""
        return ".".join(map(str, self.position)) or "-"


def place_of(site: str, label: str = "") -> Place:
    """Read kind and position from a name.

    Args:
        site: Name of the site.
        label: Of the block: a slice, an expert, both, or nothing.

    Examples:
        >>> place_of("model.layers.3.mlp.up_proj"), place_of("h.0.attn.c_attn", "q").kind
        (Place(kind='model.layers.*.mlp.up_proj', position=(3,)), 'h.*.attn.c_attn [q]')
        >>> place_of("layers.2.experts.7.w1"), place_of("layers.2.experts.up", "expert 7 q").kind
        (Place(kind='layers.*.experts.*.w1', position=(2,)), 'layers.*.experts.up [q]')
    """
    segments = site.split(".")
    numbers = [i for i, segment in enumerate(segments) if segment.isdecimal()]
    position = [int(segments[i]) for i in numbers if i == 0 or segments[i - 1] != "experts"]
    kind = ".".join("*" if segment.isdecimal() else segment for segment in segments)
    words = label.split()
    part = " ".join(words[2:] if words[:1] == ["expert"] else words)
    return Place(f"{kind} [{part}]" if part else kind, tuple(position))


def full_name(site: str, label: str) -> str:
    """Return site and label in one: `h.0.attn.c_attn [q]`."""
    return f"{site} [{label}]" if label else site

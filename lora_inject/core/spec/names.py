"""Dotted names: their canonical form and their parts.

Everything is matched, shown and saved under one name, without the segments of wrappers.
"""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that stand for no module of the user's: of torch's compiler, of FSDP1 and of
activation checkpointing."""


def canonical(name: str) -> str:
    """Return a dotted name without the segments that wrappers put into it.

    Examples:
        >>> canonical("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    if "_orig_mod" in name or "_wrapped_module" in name:
        return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
    return name


def parent(name: str) -> str:
    """Return the name of the module around a name, empty at the top."""
    return name.rpartition(".")[0]


def joined(path: str, key: str) -> str:
    """Return the name of what `path` holds under `key`; the root's name is empty.

    Examples:
        >>> joined("layers.0", "weight"), joined("", "weight")
        ('layers.0.weight', 'weight')
    """
    return f"{path}.{key}" if path else key


def leaf(name: str) -> str:
    """Return the last segment of a name."""
    return name.rpartition(".")[2]


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias by its name: `bias` or `..._bias`."""
    last = leaf(name)
    return last == "bias" or last.endswith("_bias")


def counted(n: int, noun: str) -> str:
    """Return a number and a noun: `1 site`, `2,000 sites`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def quoted(names: Iterable[str]) -> str:
    """Return names in quotes, with commas between."""
    return ", ".join(f"'{name}'" for name in names)

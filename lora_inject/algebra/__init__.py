"""Adapters as values: what sums and truncates stands in front (`li.combine`), other shapes here."""

from lora_inject.algebra.other_shapes import as_dtype, join, rename, split, subset

__all__ = ["as_dtype", "join", "rename", "split", "subset"]

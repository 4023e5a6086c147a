"""Adapters in other programs' files: a module for each format; `exchange` has the table.

A format is a module with three functions: `write(state, path, facts, **options)`, `read(path,
facts, **options)` and `detects(files)`; for `facts` see `model_facts`.
"""

from __future__ import annotations

from lora_inject.formats.exchange import FORMATS, format_of, read_adapter, write_adapter
from lora_inject.formats.format import Files, Format
from lora_inject.formats.model_facts import ModelFacts

__all__ = [
    "FORMATS",
    "Files",
    "Format",
    "ModelFacts",
    "format_of",
    "read_adapter",
    "write_adapter",
]

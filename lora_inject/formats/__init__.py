"""Adapters in other programs' files: one module for each format.

A format is a module with three functions: `write(state, path, facts, **options)`, `read(path,
facts, **options)` and `detects(files)`; for `facts` see `model_facts`. Its `FORMATS` has its row,
by name. The table in `exchange` lists all, so a new format is one file and one row.
"""

from __future__ import annotations

from lora_inject.formats.exchange import (
    DEFAULT,
    FORMATS,
    detected,
    facts_and_options,
    format_of,
    options_of,
    read_adapter,
    write_adapter,
)
from lora_inject.formats.format import Format
from lora_inject.formats.model_facts import ModelFacts

__all__ = [
    "DEFAULT",
    "FORMATS",
    "Format",
    "ModelFacts",
    "detected",
    "facts_and_options",
    "format_of",
    "options_of",
    "read_adapter",
    "write_adapter",
]

"""Adapters as files: one row of a table for each format.

A format is a module with three functions: `write(state, path, facts, **options)`, `read(path,
facts, **options)` and `detects(path)`; for `facts` see `model_facts`. Only the table below lists
all formats, so a new format is one file and one row.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError, check_path, check_type, nearest
from lora_inject.formats import (
    diffusers,
    gguf_file,
    kohya,
    litgpt,
    loralib,
    mlx,
    native,
    peft,
    portable,
    torchtune,
    vllm,
)
from lora_inject.formats.losses import EVERYTHING, NUMBERS, ONE, RANKS, losses
from lora_inject.formats.model_facts import ModelFacts

__all__ = [
    "FORMATS",
    "Format",
    "ModelFacts",
    "detected",
    "losses_of",
    "options_of",
    "read_adapter",
    "register_format",
    "write_adapter",
]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        write: `write(state, path, facts, *, overwrite=False, **options) -> Path`.
        read: `read(path, facts, **options) -> AdapterState`, whose tensors share no memory.
        detects: `detects(path) -> bool`, by content; the first row that returns True reads.
        keeps: What files of the format can express besides the deltas; see `formats.losses`.
    """

    write: Callable[..., Path]
    read: Callable[..., AdapterState]
    detects: Callable[[Path], bool]
    keeps: frozenset[str] = EVERYTHING


FACTS = [field.name for field in fields(ModelFacts)]

FORMATS = {
    # The folder of mlx-lm, which also has an adapter_config.json.
    "mlx": Format(mlx.write, mlx.read, mlx.detects, frozenset({ONE})),
    # Folders of torchtune and of litgpt, which hold pickles.
    "torchtune": Format(torchtune.write, torchtune.read, torchtune.detects, frozenset({ONE})),
    "litgpt": Format(litgpt.write, litgpt.read, litgpt.detects, frozenset({ONE})),
    # A directory of Hugging Face PEFT.
    "peft": Format(peft.write, peft.read, peft.detects),
    # The same with one rank and scale 1, for servers that read little of the config.
    "portable": Format(portable.write, peft.read, portable.detects, frozenset()),
    # A file of llama.cpp.
    "gguf": Format(gguf_file.write, gguf_file.read, gguf_file.detects, frozenset({RANKS})),
    # The same with a pair for each expert.
    "vllm": Format(vllm.write, peft.read, portable.detects, frozenset()),
    # One safetensors file of this package.
    "native": Format(native.write, native.read, native.detects),
    # One file of sd-scripts, LyCORIS, ComfyUI.
    "kohya": Format(kohya.write, kohya.read, kohya.detects, frozenset({NUMBERS})),
    # One file of a pipeline, or the folder that holds it.
    "diffusers": Format(diffusers.write, diffusers.read, diffusers.detects, frozenset({RANKS})),
    # Microsoft's state dict.
    "loralib": Format(loralib.write, loralib.read, loralib.detects, frozenset({"slices", NUMBERS})),
}


def register_format(name: str, row: Format) -> Format:
    """Add a format from outside the package; detection tries it before the built-in ones.

    Args:
        name: The name for `format=`.
        row: Its functions.

    Returns:
        The row.

    Raises:
        FormatError: The name is taken.

    Examples:
        >>> import torch
        >>> def write(state, path, facts, *, overwrite=False):
        ...     torch.save(state, path)
        ...     return path
        >>> def read(path, facts):
        ...     return torch.load(path, weights_only=False)
        >>> row = register_format("torch", Format(write, read, lambda path: path.suffix == ".x"))
        >>> FORMATS.pop("torch") is row
        True
    """
    if name in FORMATS:
        raise FormatError(f"register_format({name!r})", "the name is taken", "Choose another one")
    others = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({name: row, **others})
    return row


def write_adapter(
    state: AdapterState,
    path: str | os.PathLike[str],
    format: str = "peft",  # noqa: A002
    *,
    facts: ModelFacts | None = None,
    **options: Any,
) -> Path:
    """Write an adapter to files, all or nothing.

    Args:
        state: The adapter.
        path: Where to.
        format: Name of a row of `FORMATS`.
        facts: What is known of the model; single facts may be given as options.
        options: `overwrite=True` replaces an existing adapter; the others are the format's own,
            see its `write`.

    Returns:
        The path of the files, symbolic links resolved.

    Raises:
        FormatError: The format does not exist or cannot express the adapter, or the target exists
            and `overwrite` is not set.

    Examples:
        >>> import tempfile, torch
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.site_state import SiteState
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> state = AdapterState({"fc": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     back = read_adapter(write_adapter(state, f"{parent}/sql"))
        >>> back.sites["fc"].scale
        2.0
    """
    asked = f"write adapter to '{path}'"
    check_path("write adapter", path)
    check_type(asked, state, AdapterState, "Give an AdapterState, as adapter_state(model) does")
    row = _row(format, asked)
    facts, own = _split(row.write, facts, options, f"{asked} as '{format}'")
    return row.write(state, Path(path), facts, **own)


def read_adapter(
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: ModelFacts | None = None,
    **options: Any,
) -> AdapterState:
    """Read an adapter from files.

    The values are read into memory, because PEFT saves into the file that is there: a value that
    was read later would be another. `on_disk=True` leaves the values of safetensors in the file
    until they are used, and raises if the file was written to since. The commands use it, and so
    can you for an adapter larger than memory, or if only the numbers are needed. Values that are
    not finite are read, so that `inspect` shows them; loading, merging and converting refuse them.

    Args:
        path: Where from.
        format: Name of a row of `FORMATS`; None detects it from the files.
        facts: What is known of the model; single facts may be given as options.
        options: `on_disk`, and the format's own, see its `read`.

    Returns:
        The adapter.

    Raises:
        FormatError: There is no adapter, or it cannot be read.
    """
    check_path("read adapter", path)
    place, asked = Path(path), f"read adapter '{path}'"
    if format is None:
        format = detected(place)  # noqa: A001
    row = _row(format, asked)
    if "on_disk" not in options_of(row.read):
        options.pop("on_disk", None)  # it saves memory and does not change the result
    facts, own = _split(row.read, facts, options, f"{asked} as '{format}'")
    return row.read(place, facts, **own)


def detected(path: Path) -> str:
    """Return the first format that detects a path as its own; raise if there is none."""
    asked = f"read adapter '{path}'"
    if not path.exists():
        raise FormatError(asked, "there is no such file or directory", "Check the path")
    for name, row in FORMATS.items():
        if row.detects(path):
            return name
    raise FormatError(
        asked,
        "it is not an adapter of a known format",
        f"Give a PEFT directory or a file of one of: {', '.join(FORMATS)}",
    )


def options_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the options that only this format's `read` or `write` has.

    Examples:
        >>> options_of(FORMATS["diffusers"].read)
        ['component', 'on_disk']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def losses_of(state: AdapterState, format: str) -> list[str]:  # noqa: A002
    """Return what an adapter loses in a format, as sentences; empty if nothing.

    Examples:
        >>> losses_of(AdapterState({}, config={"rank": 8}), "portable")
        ['the config is left out']
    """
    return losses(state, _row(format, f"convert to '{format}'").keeps)


def _split(
    function: Callable[..., Any], facts: ModelFacts | None, options: Mapping[str, Any], asked: str
) -> tuple[ModelFacts, dict[str, Any]]:
    """Return the facts with those among the options, and the options that a format has itself."""
    stated = {name: value for name, value in options.items() if name in FACTS}
    own = {name: value for name, value in options.items() if name not in FACTS}
    known = options_of(function)
    for option in own.keys() - known:
        found = f"{option!r} is not an option of this format"
        remedy = f"Its options: {', '.join(known)}; facts of the model: {', '.join(FACTS)}"
        raise FormatError(asked, found, remedy)
    return replace(facts or ModelFacts(), **stated), own


def _row(name: str, asked: str) -> Format:
    if name not in FORMATS:
        raise FormatError(
            asked,
            f"there is no format '{name}'",
            f"Nearest: {', '.join(nearest(name, FORMATS) or FORMATS)}",
        )
    return FORMATS[name]

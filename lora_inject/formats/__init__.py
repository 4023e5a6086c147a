"""Adapters as files: one row of a table for each format.

A format is a module with three functions: `write(state, path, facts, **options)`, `read(path,
facts, **options)` and `detects(path)`; for `facts` see `model_facts`. Only the table below lists
all formats, so a new format is one file and one row. What holds for every format is done here: the
checks of an adapter, writing all or nothing, and saying in errors which adapter was asked for.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_inject.core.adapter import native
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.value_checks import check_state
from lora_inject.core.files.atomic import write_directory, write_file
from lora_inject.errors import FormatError, check_type, nearest, user_path, within
from lora_inject.formats import (
    diffusers,
    gguf_file,
    kohya,
    litgpt,
    loralib,
    mlx,
    peft,
    portable,
    torchtune,
)
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.tensor_layout import file_rank

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


NUMBERS, ONE, RANKS = "numbers", "one", "ranks"
EVERYTHING = frozenset({"config", "fingerprint", "training", "slices", "start", NUMBERS})
"""`config` and `fingerprint` of the state; `training`: dropout, init and compute of each site;
`slices` of fused projections; `start`: the frozen start of pissa and olora; `numbers`: rank, alpha
and scaling of each site; or `one`: those numbers only if all sites agree;
or `ranks`: the rank of each site alone."""


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        write: `write(state, path, facts, **options)`: the content of the file that `path` will be,
            or of each file of the folder, by name. The adapter's shapes and dtypes are checked.
        read: `read(path, facts, **options) -> AdapterState`; its tensors are checked afterwards.
        detects: `detects(path) -> bool`, by content; the first row that returns True reads.
        keeps: What files of the format can express besides the deltas, of `EVERYTHING`.
        endings: The endings that a file's name may have to be written; empty for any.
    """

    write: Callable[..., bytes | Mapping[str, bytes]]
    read: Callable[..., AdapterState]
    detects: Callable[[Path], bool]
    keeps: frozenset[str] = EVERYTHING
    endings: tuple[str, ...] = ()


FACTS = [field.name for field in fields(ModelFacts)]
SAFE = (".safetensors",)
# Files that an older adapter may have and a new one need not, so that they may be replaced.
OLDER_FILES = {"adapter_model.bin", "adapter_model.pt", "adapter_0.pt"}


def _of(module: Any, *keeps: str, endings: tuple[str, ...] = ()) -> Format:
    """Return the row of a format whose files keep less than everything."""
    return Format(module.write, module.read, module.detects, frozenset(keeps), endings)


FORMATS = {
    # The folder of mlx-lm, which also has an adapter_config.json.
    "mlx": _of(mlx, ONE),
    # Folders of torchtune and of litgpt, which hold pickles.
    "torchtune": _of(torchtune, ONE),
    "litgpt": _of(litgpt, ONE),
    # A directory of Hugging Face PEFT.
    "peft": Format(peft.write, peft.read, peft.detects),
    # The same with one rank and scale 1, for servers that read little of the config.
    "portable": Format(portable.write, peft.read, portable.detects, frozenset()),
    # A file of llama.cpp.
    "gguf": _of(gguf_file, RANKS, endings=(".gguf",)),
    # The portable directory with a pair for each expert.
    "vllm": Format(portable.write_experts, peft.read, portable.detects, frozenset()),
    # One safetensors file of this package.
    "native": Format(native.write, native.read, native.detects, endings=SAFE),
    # One file of sd-scripts, LyCORIS, ComfyUI.
    "kohya": _of(kohya, NUMBERS, endings=SAFE),
    # One file of a pipeline, or the folder that holds it.
    "diffusers": _of(diffusers, RANKS),
    # Microsoft's state dict.
    "loralib": _of(loralib, "slices", NUMBERS, endings=(*SAFE, *loralib.PICKLES)),
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
        >>> import pickle
        >>> def write(state, path, facts):
        ...     return pickle.dumps(state)
        >>> def read(path, facts):
        ...     return pickle.loads(path.read_bytes())
        >>> row = register_format("pickle", Format(write, read, lambda path: path.suffix == ".x"))
        >>> FORMATS.pop("pickle") is row
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
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write an adapter to files, all or nothing.

    Args:
        state: The adapter.
        path: Where to.
        format: Name of a row of `FORMATS`.
        facts: What is known of the model; single facts may be given as options.
        overwrite: Replace an existing adapter.
        options: The format's own, see its `write`.

    Returns:
        The path of the files, symbolic links resolved.

    Raises:
        FormatError: The format does not exist or cannot express the adapter, which may hold no NaN
            and no Inf, or the target exists and `overwrite` is not set.

    Examples:
        >>> import tempfile, torch
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> state = AdapterState({"fc": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     back = read_adapter(write_adapter(state, f"{parent}/sql"))
        >>> back.sites["fc"].scale
        2.0
    """
    target = user_path("write adapter", path)
    row = _row(format, f"write adapter to '{path}'")
    with within(f"write {format} adapter to '{path}'"):
        facts, own = _split(row.write, facts, options)
        if row.endings and target.suffix not in row.endings:
            found = f"its name does not end in {' or '.join(row.endings)}"
            raise FormatError("", found, "Rename it")
        check_state(state).check_finite("", FormatError)
        content = row.write(state, target, facts, **own)
        remedy = "Return the bytes of the file, or of each file by its name"
        check_type("what the format wrote", content, (bytes, Mapping), remedy, FormatError)
    if isinstance(content, bytes):
        return write_file(target, content, overwrite=overwrite)
    return write_directory(target, content, overwrite=overwrite, replaceable=OLDER_FILES)


def read_adapter(
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: ModelFacts | None = None,
    **options: Any,
) -> AdapterState:
    """Read an adapter from files.

    Values of safetensors are read when they are used, each time, so an adapter may be larger than
    memory. The file may be moved, deleted or replaced meanwhile. If it was written to in place, as
    PEFT saves, using a value raises a FormatError. The tensors cannot be changed in place;
    `copy.deepcopy` of the value reads all of it into memory. Values that are not finite are read,
    so that `inspect` shows them; loading, merging, combining and writing refuse them.

    Args:
        path: Where from.
        format: Name of a row of `FORMATS`; None detects it from the files.
        facts: What is known of the model; single facts may be given as options.
        options: The format's own, see its `read`.

    Returns:
        The adapter.

    Raises:
        FormatError: There is no adapter, or it cannot be read.
    """
    place = user_path("read adapter", path)
    if format is None:
        format = detected(place)  # noqa: A001
    row = _row(format, f"read adapter '{path}'")
    with within(f"read {format} adapter '{path}'"):
        facts, own = _split(row.read, facts, options)
        return replace(check_state(row.read(place, facts, **own)), source=str(path))


def detected(path: Path) -> str:
    """Return the first format that detects a path as its own; raise if there is none."""
    asked = f"read adapter '{path}'"
    if not path.exists():
        raise FormatError(asked, "there is no such file or directory", "Check the path")
    for name, row in FORMATS.items():
        if row.detects(path):
            return name
    found = "it is not an adapter of a known format"
    remedy = f"Give a PEFT directory or a file of one of: {', '.join(FORMATS)}"
    raise FormatError(asked, found, remedy)


def options_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the options that only this format's `read` or `write` has.

    Examples:
        >>> options_of(FORMATS["diffusers"].read)
        ['component']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def losses_of(state: AdapterState, format: str) -> list[str]:  # noqa: A002
    """Return what an adapter loses in a format, as sentences; empty if nothing.

    Examples:
        >>> losses_of(AdapterState({}, config={"rank": 8}), "portable")
        ['the config is left out']
    """
    keeps = _row(format, f"convert to '{format}'").keeps
    specs = [site.spec for site in state.sites.values()]
    numbers = {
        (file_rank(site.spec, derived=site.A0 is not None), site.scale)
        for site in state.sites.values()
    }
    mixed = len(numbers) > 1 or ONE not in keeps
    folded = mixed and any(scale != 1 for _, scale in numbers) and NUMBERS not in keeps
    padded = len({rank for rank, _ in numbers}) > 1 and not {NUMBERS, RANKS} & keeps
    there = {
        "config": (state.config is not None, "the config is left out"),
        "fingerprint": (
            state.fingerprint is not None,
            "the base's fingerprint is left out: another base of the same shape is not noticed",
        ),
        "training": (
            any(spec.dropout or spec.compute != "base" for spec in specs),
            "dropout and the dtype of the arithmetic are left out",
        ),
        "slices": (
            any(spec.slices for spec in specs),
            "slices of fused projections become pairs of the whole projection, of higher rank",
        ),
        "start": (
            any(site.A0 is not None for site in state.sites.values()),
            "frozen starts become further ranks, which train on like all others",
        ),
        "scales": (folded, "scales are folded into B"),
        RANKS: (padded, "ranks are padded with zeros"),
    }
    return [words for part, (holds, words) in there.items() if holds and part not in keeps]


def _split(
    function: Callable[..., Any], facts: ModelFacts | None, options: Mapping[str, Any]
) -> tuple[ModelFacts, dict[str, Any]]:
    """Return the facts with those among the options, and the options that a format has itself."""
    stated = {name: value for name, value in options.items() if name in FACTS}
    own = {name: value for name, value in options.items() if name not in FACTS}
    known = options_of(function)
    for option in own.keys() - known:
        found = f"{option!r} is not an option of this format"
        its = ", ".join(known) or "none"
        remedy = f"Its options: {its}; facts of the model: {', '.join(FACTS)}"
        raise FormatError("", found, remedy)
    return replace(facts or ModelFacts(), **stated), own


def _row(name: str, asked: str) -> Format:
    if name not in FORMATS:
        near = ", ".join(nearest(name, FORMATS) or FORMATS)
        raise FormatError(asked, f"there is no format '{name}'", f"Nearest: {near}")
    return FORMATS[name]

"""Convert adapter files for other programs, and check them, with the help of the base's files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_inject.adapter.state import AdapterState
from lora_inject.checkpoint.base_class import BaseClass, meta_model
from lora_inject.checkpoint.index import Checkpoint, read_config
from lora_inject.errors import CheckpointError
from lora_inject.formats import FORMATS, detected, losses_of, read_adapter, taken_by, write_adapter
from lora_inject.formats.clients import Finding, findings
from lora_inject.formats.peft import options_for_writing
from lora_inject.storage.strict_json import parse_json


def convert(
    adapter: str | os.PathLike[str] | AdapterState,
    output: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Write an adapter in another format, with the same deltas to float precision.

    Args:
        adapter: Files in any format that can be read, or an `AdapterState`.
        output: Where to write.
        to: Name of the format, a row of `formats.FORMATS`.
        base: Folder of the base, for the names, heads and ties that some formats depend on. For
            models of transformers its config.json is enough.
        reading: Options for reading the adapter.
        tell: Called before writing, with a sentence for each thing that the target cannot express.
        **options: Options for writing: those of the format, and `overwrite=True`.

    Returns:
        The path that was written.

    Raises:
        FormatError: The adapter cannot be read, or the format cannot express it.
        CheckpointError: The base cannot be read.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> import lora_inject as li
        >>> net = li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = li.save_adapter(net, f"{parent}/a")
        ...     made = li.convert(f"{parent}/a", f"{parent}/b", "portable", dtype="float16")
        ...     li.read_adapter(made).sites["0"].scale
        1.0
    """
    known = {} if base is None else facts_of(Path(base))
    if isinstance(adapter, AdapterState):
        state, said = adapter, {}
    else:
        name, path = (reading or {}).get("format"), Path(adapter)
        row = FORMATS.get(name or detected(path))
        known_here = {} if row is None else taken_by(row.read, known)
        state = read_adapter(path, **{**known_here, **(reading or {})})
        said = _said(path)
    lost = losses_of(state, to)
    offered = {k: v for k, v in {**said, **known}.items() if v is not None}
    if tell is not None:
        for words in lost:
            tell(words)
    return write_adapter(state, output, to, **{**taken_by(FORMATS[to].write, offered), **options})


def facts_of(base: Path) -> dict[str, Any]:
    """Return facts from a base's files, as options for formats; see `formats.taken_by`."""
    config = read_config(base)
    if config.get("model_type"):
        asked = f"read the names of '{base}'"
        with contextlib.suppress(CheckpointError):  # no class: read the files
            model = meta_model(config, asked, "give a base of a known class")
            modules = dict(model.named_modules(remove_duplicate=False))
            found = options_for_writing(model, modules, model.state_dict())  # defaults filled in
            with contextlib.suppress(CheckpointError):  # a config alone names no tensors
                found["separate"] = BaseClass(Checkpoint.open(base)).separate
            return found
    try:
        names = list(Checkpoint.open(base).tensors)
    except CheckpointError:
        if not config:
            raise
        return {"config": dict(config)}  # enough for some formats
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return {"tensor_names": names, "module_names": tuple(modules), "config": dict(config) or None}


def _said(path: Path) -> dict[str, Any]:
    """Return the base and the task that a PEFT folder states, for the new files."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return {}
    config = parse_json(file.read_bytes(), f"read '{file}'")
    fields = {"base_model": "base_model_name_or_path", "task_type": "task_type"}
    return {k: v for k, f in fields.items() if isinstance(v := config.get(f), str)}


def check_adapter(
    adapter: str | os.PathLike[str], client: str, *, base: str | os.PathLike[str] | None = None
) -> list[Finding]:
    """Return where a program that loads adapters would refuse or misread one.

    Args:
        adapter: The adapter's files.
        client: `vllm`, `sglang`, `llama.cpp`, `lorax`, `diffusers`, `mlx`, `comfyui` or `peft`.
        base: Folder of the base, to compare names, ties and layers too.

    Returns:
        Findings, each with a remedy. If no finding `stops`, the program takes the adapter.

    Raises:
        FormatError: The program is unknown, or the files are damaged.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import lora_inject as li
        >>> rule = {"rank": 2, "alpha": 3, "scaling": "rslora", "targets": ["0"]}
        >>> net = li.inject(nn.Sequential(nn.Linear(4, 6)), rule)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = li.save_adapter(net, f"{parent}/a")
        ...     [finding.problem for finding in li.check_adapter(f"{parent}/a", "sglang")]
        ["SGLang would apply another scale to '0 (1.5 for 2.121)'"]
    """
    known = {} if base is None else facts_of(Path(base))
    return findings(Path(adapter), client, **taken_by(findings, known))

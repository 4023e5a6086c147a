"""The files of a PEFT directory: required files, and tensors in one file or in several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.formats.checks import one_line
from lora_inject.storage.strict_json import read_json
from lora_inject.storage.tensors import read_names, read_tensors

CONFIG, CARD = "adapter_config.json", "README.md"
MODEL, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_INDEX = f"{MODEL}.index.json"
_WHOLE = "model.safetensors"


def detects(path: Path) -> bool:
    """Whether a path looks like a PEFT adapter, a part of one, or the parent of one."""
    if not path.is_dir():
        return False
    parts = any((path / name).is_file() for name in (CONFIG, MODEL, PICKLE, _INDEX))
    return parts or bool(_adapters_in(path)) or _in_base(path)


def check_files(path: Path) -> None:
    """Refuse a path that is not a directory with a config and tensors."""
    if not path.is_dir():
        found = "it is a file" if path.exists() else "there is no such directory"
        raise FormatError("", found, f"Give the directory that holds {CONFIG}")
    there = any((path / name).is_file() for name in (MODEL, _INDEX))
    inside = _adapters_in(path)
    if not there and _in_base(path):
        found = f"its {_WHOLE} holds the base and an adapter's tensors together"
        remedy = "Load it with the program that saved it and save the adapter alone (in PEFT: "
        remedy += "save_pretrained of the PeftModel, not of the model inside)"
        raise FormatError("", found, remedy)
    if not (path / CONFIG).is_file():
        found, remedy = f"there is no {CONFIG} in it", "Check the path"
        if inside:
            found += f", but in its subfolders {one_line(inside)}"
            remedy = f"Give the subfolder: '{path / inside[0]}'"
        raise FormatError("", found, remedy)
    if not there and (path / PICKLE).is_file():
        found = f"its tensors are in {PICKLE}, a pickle, which can run code when it is read"
        remedy = "Load it with PEFT where you trust it and save it again: save_pretrained writes "
        raise FormatError("", found, f"{remedy}safetensors")
    if not there:
        raise FormatError("", f"there is no {MODEL} in it", "Copy the whole directory")


def read_all(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, of one file or of all that the index names, and the metadata."""
    if (path / MODEL).is_file():
        return read_tensors(path / MODEL)
    index: Any = read_json(path / _INDEX, _INDEX)
    table: Any = index.get("weight_map") if isinstance(index, dict) else None
    names: list[Any] = [*table.values()] if isinstance(table, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
        raise FormatError(_INDEX, "its weight_map is not a table of file names", "Fetch it again")
    tensors: dict[str, Tensor] = {}
    found = ""
    for name in sorted(set(names)):
        held = read_tensors(path / name)[0]
        if strangers := [key for key in held if table.get(key) != name]:
            found = f"'{name}' holds {one_line(strangers)}, which it does not list"
        tensors |= held
    if missing := table.keys() - tensors.keys():
        found = f"its files lack {one_line(sorted(missing))}"
    if found:
        raise FormatError(_INDEX, found, "The files do not belong together")
    return tensors, {}


def _in_base(path: Path) -> bool:
    """Whether a checkpoint's one file has an adapter's tensors among the base's."""
    file = path / _WHOLE
    return file.is_file() and any(".lora_A." in key for key in read_names(file)[0])


def _adapters_in(path: Path) -> list[str]:
    """The names of the subfolders that hold an adapter."""
    return sorted(child.name for child in path.iterdir() if (child / CONFIG).is_file())

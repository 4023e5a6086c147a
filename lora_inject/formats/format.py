"""One format of files: what a row of the table is, and the files that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import is_safetensors, read_names
from lora_inject.errors import FormatError

SAFE = (".safetensors",)
_BESIDE = {
    "adapter_model.safetensors": "adapter_config.json",
    "adapter_model.bin": "adapter_config.json",
    "adapters.safetensors": "adapter_config.json",
}
"""Files of adapters that are folders, and the file beside each."""


class Files:
    """An adapter's path, opened once for all formats that ask; one file of a folder is the folder.

    Attributes:
        path: The file, or the folder.
    """

    def __init__(self, path: Path) -> None:
        beside = _BESIDE.get(path.name)
        one_of_several = beside and path.is_file() and (path.parent / beside).is_file()
        self.path = path.parent if one_of_several else path
        self._headers: dict[str, tuple[list[str], dict[str, str]]] = {}

    def has(self, *names: str) -> bool:
        """Whether it is a folder with one of these files."""
        return any((self.path / name).is_file() for name in names)

    def tensor_names(self, name: str = "") -> list[str]:
        """Return the tensors' names of the safetensors file, or of one in the folder; or none."""
        return self._header(name)[0]

    def metadata(self, name: str = "") -> dict[str, str]:
        """Return the text in the header of such a file."""
        return self._header(name)[1]

    def _header(self, name: str) -> tuple[list[str], dict[str, str]]:
        if name not in self._headers:
            file = self.path / name
            self._headers[name] = read_names(file) if is_safetensors(file) else ([], {})
        return self._headers[name]


def part_of_folder(folder: Path, name: str, remedy: str = "Give the whole folder") -> Path:
    """Return a file of a folder; refuse a folder without it."""
    file = folder / name
    if not file.is_file():
        raise FormatError("", f"there is no {name} in it", remedy)
    return file


@dataclass(frozen=True)
class Format:
    """One row of the table `FORMATS` (`formats.exchange`).

    Attributes:
        write: `write(state, path, facts, **options)`: the content of the file that `path` will be,
            or of each file of the folder, by name. The adapter's shapes and dtypes are checked.
        read: `read(path, facts, **options) -> AdapterState`; its tensors are checked afterwards.
        detects: `detects(files) -> bool`, by content; the first row that returns True reads.
        deltas_only: Whether its files hold an adapter's deltas, and nothing of how it was trained.
        loses: What its files hold nothing of besides, as sentences about an adapter; without it
            nothing.
        endings: The endings that a file's name may have to be written; empty for any.
        takes_facts: Whether `write` and `read` look at the facts about the model.
        client: PEFT, or a program that uses PEFT's layers, if one of them reads its files.
        unsure: `unsure(files, facts, options)`: what detected files do not say, and what to give;
            None if they say all. It is not asked where the format is given.
    """

    write: Callable[..., bytes | Mapping[str, bytes]]
    read: Callable[..., AdapterState]
    detects: Callable[[Files], bool]
    deltas_only: bool = False
    endings: tuple[str, ...] = ()
    takes_facts: bool = True
    client: str = ""
    loses: Callable[[AdapterState], list[str]] = lambda _: []
    unsure: Callable[[Files, Any, Mapping[str, Any]], tuple[str, str] | None] | None = None

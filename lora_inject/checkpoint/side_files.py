"""The small files of a checkpoint: which are copied, and what changes in config.json.

The list names the files to copy, not those to leave out. Weights of other formats, optimizer states
and hidden files are not copied. Code is copied only on request: a merge must not make anybody run
code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 2
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json")
"""Files in which GPTQ and AWQ describe a quantized checkpoint; wrong for plain floats."""

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".yaml", ".yml"}
_SUFFIXES |= {".tiktoken", ".bpe", ".spm", ".vocab"}
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_STARTS = ("adapter_", "optimizer", "pytorch_model", "rng_state")  # of what stays behind
_NOT = ("adapter_config.json", "trainer_state.json", "config.json")


def find_side_files(folder: Path, *, code: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return relative paths of the files to copy, and of code that is not copied.

    `config.json` and weight indexes are neither: they are written separately, last.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(_walk(folder, MAX_DEPTH))}
    scripts = {name for name, path in paths.items() if path.suffix == ".py"}
    taken = (n for n, path in paths.items() if (n in scripts and code) or _belongs(path, n))
    return tuple(taken), () if code else tuple(n for n in paths if n in scripts)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            if depth > 0:
                yield from _walk(path, depth - 1)
        elif path.is_file():
            yield path


def _belongs(path: Path, relative: str) -> bool:
    if relative in _NOT or path.name.endswith(".index.json") or path.name.startswith(_STARTS):
        return False
    return path.suffix in _SUFFIXES or path.name.startswith(_NAMES)


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some values changed and everything else unchanged, in its order.

    A key that inner configs (`text_config`) hold is changed there, too; None removes it.
    """
    edited: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in changes:
            inner = {k: changes.get(k, v) for k, v in value.items()}
            edited[key] = {k: v for k, v in inner.items() if v is not None or k not in changes}
        else:
            edited[key] = value
    for key, value in changes.items():
        if value is None:
            edited.pop(key, None)
        elif key in edited or not _only_inside(config, key):
            edited[key] = value
    return edited


def edit_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """Return the bytes of `config.json` with some values changed; see `changed_config`."""
    edited = changed_config(config, changes)
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def _only_inside(config: Mapping[str, Any], key: str) -> bool:
    """Whether inner configs hold a key that the outer one does not, so that it belongs there."""
    inner = any(key in v for v in config.values() if isinstance(v, dict))
    return inner and key not in config and key != "tie_word_embeddings"

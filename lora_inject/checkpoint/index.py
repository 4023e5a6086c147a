"""A checkpoint folder: its shards, its index, the place of each tensor, and its other files.

The index only repeats what the headers say. Both are read and must agree.

Of the other files a list says which to copy, and the plan names the rest: weights of other formats,
optimizer states. Code is copied only on request: a merge must not make anybody run code. Of one
file, which may have others of other models beside it, nothing comes along but the config.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lora_inject.checkpoint.packed import Packed
from lora_inject.core.adapter.fingerprint import sample_positions
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS, Header, TensorEntry, read_header
from lora_inject.core.files.strict_json import parse_table, read_json
from lora_inject.core.spec.names import leaf, parent
from lora_inject.errors import CheckpointError, user_path
from lora_inject.formats.model_facts import ModelFacts

_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_PART = re.compile(r".+-(\d+)-of-(\d+)\.safetensors")
INDEX_SUFFIX = ".safetensors.index.json"
MAX_DEPTH = 2  # folders inside, of other files
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that describe a quantized checkpoint beside its config; wrong for plain floats."""
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".yaml", ".yml"}
_SUFFIXES |= {".tiktoken", ".bpe", ".spm", ".vocab"}
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_STARTS = ("adapter_", "optimizer", "pytorch_model", "rng_state", "trainer_state")
"""Beginnings of what stays behind whatever it ends with: it is of an adapter, or of a run."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint; `path` is where its bytes are, links resolved."""

    name: str
    path: Path
    header: Header
    mtime_ns: int


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint, single or sharded.

    Attributes:
        folder: The folder, links resolved.
        shards: File name to shard, in the order of the names.
        index_name: File name of the index, None for a single file.
        index: The index as parsed, None for a single file.
        config: `config.json` as parsed, empty if there is none.
        packed: Quantized tensors that are shown dequantized, by name; see `quantized_base`.
        shown: The entries of `packed` as they are shown, without bytes in any file.
        lone: Whether it is one file, and not all that its folder holds.
    """

    folder: Path
    shards: Mapping[str, Shard]
    index_name: str | None
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    packed: Mapping[str, Packed] = field(default_factory=dict)
    shown: Mapping[str, TensorEntry] = field(default_factory=dict)
    lone: bool = False

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers, the index and the config of a checkpoint.

        Args:
            path: The folder, or one `.safetensors` file.

        Raises:
            CheckpointError: There is no safetensors checkpoint, or its headers and index disagree.
        """
        path = user_path("open a checkpoint", path, CheckpointError)
        asked = f"open the checkpoint '{path}'"
        if path.is_file() and path.suffix == ".safetensors":
            folder = path.parent.resolve()
            files = [*_visible(folder, "*.safetensors"), *_visible(folder, "*" + INDEX_SUFFIX)]
            config = read_config(folder) if files == [path.name] else {}  # else whose is it?
            return cls(folder, _read_shards(folder, [path.name]), None, None, config, lone=True)
        if not path.is_dir():
            problem = "it is not a folder" if path.exists() else "there is no such folder"
            remedy = "Give the folder that holds config.json and the .safetensors files"
            raise CheckpointError(asked, problem, remedy)
        folder = path.resolve()
        index_name, names, index = _find_shards(folder, asked)
        shards = _read_shards(folder, names)
        if index is not None:
            _check_index(asked, index["weight_map"], shards)
        return cls(folder, shards, index_name, index, read_config(folder))

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Tensor name to entry, over all shards."""
        stored = {n: e for shard in self.shards.values() for n, e in shard.header.tensors.items()}
        return {n: e for n, e in stored.items() if n not in self.hidden} | dict(self.shown)

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Names of stored tensors that are parts of `packed` ones."""
        return frozenset(e.name for each in self.packed.values() for e in each.parts.values())

    @cached_property
    def shard_of(self) -> Mapping[str, str]:
        """Tensor name to the name of its shard."""
        of = {name: s.name for s in self.shards.values() for name in s.header.tensors}
        return of | {name: of[each.parts["codes"].name] for name, each in self.packed.items()}

    @property
    def usual_dtype(self) -> str:
        """The dtype, by the format's name, that most of its floats have."""
        sizes = dict.fromkeys(FLOATS, 0)
        for entry in self:
            if entry.dtype in sizes:
                sizes[entry.dtype] += entry.n_elements
        return max(sizes, key=lambda dtype: sizes[dtype])

    def in_every_layer(self, name: str) -> bool:
        """Whether a tensor is inside a numbered layer, and all its sisters have one of this name.

        So it is no list's own element, and no sister can lack it because it shares this one.
        """
        within = list(_without_numbers(name))
        is_inside = bool(within) and not parent(name).rpartition(".")[2].isdigit()
        holders, numbers = self._sisters
        return is_inside and all(holders[one] == len(numbers[one[0]]) for one, _ in within)

    @cached_property
    def _sisters(self) -> tuple[Mapping[tuple[str, str], int], Mapping[str, set[str]]]:
        """How many have a tensor, by what stands before and after a number; and all the numbers."""
        holders, numbers = Counter[tuple[str, str]](), defaultdict[str, set[str]](set)
        for one, number in (found for name in self.tensors for found in _without_numbers(name)):
            holders[one] += 1
            numbers[one[0]].add(number)
        return holders, numbers

    def path_of(self, name: str) -> Path:
        """Return the file that a tensor is in."""
        return self.shards[self.shard_of[name]].path

    def sample(self, entry: TensorEntry, moved: Sequence[int] = ()) -> tuple[float, ...]:
        """Return a few values of a float tensor, by which an adapter knows its base."""
        reader = RowReader(self.path_of(entry.name))
        positions = (*sample_positions(entry.shape), *moved)
        values = (reader.rows(entry, 1, at, at + 1) for at in positions)
        return tuple(float(value.float()) for value in values)

    @property
    def facts(self) -> ModelFacts:
        """What the names and the config say of the model, without its class.

        PEFT's files need the order of stacked experts in the model, which a checkpoint's files
        do not keep: transformers' classes have `gate_up_proj` before `down_proj`.
        """
        modules = dict.fromkeys(map(parent, self.tensors))
        names = sorted(self.tensors, key=lambda name: leaf(name) == "down_proj")
        return ModelFacts(tuple(modules), names, config=self.config or None)

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.header.size_bytes for shard in self.shards.values())

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.tensors.values())


def _without_numbers(name: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield, for each number in a name, what stands before and after it, and the number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield (".".join(parts[:i]), ".".join(parts[i + 1 :])), part


def read_config(folder: Path, name: str = "config.json") -> Mapping[str, Any]:
    """Return `config.json` of a folder as parsed, empty if there is none."""
    path = folder / name
    if not os.path.lexists(path):
        return {}
    real = resolve_inside(folder, name)  # a dangling link, a folder and a FIFO are refused there
    return parse_table(real.read_bytes(), f"read '{path}'", CheckpointError)


def _find_shards(folder: Path, asked: str) -> tuple[str | None, set[str], Any]:
    """Return the index's file name, the shards' names, and the index as parsed."""
    indexes, files = _visible(folder, "*" + INDEX_SUFFIX), _visible(folder, "*.safetensors")
    if index_name := _prefer_model(indexes, "model" + INDEX_SUFFIX, asked):
        stem = index_name.removesuffix(INDEX_SUFFIX)
        if stem + ".safetensors" in files:
            problem = f"it holds both '{stem}.safetensors' and '{index_name}'"
            remedy = "Programs differ in which they load; remove the one that is not meant"
            raise CheckpointError(asked, problem, remedy)
        file = resolve_inside(folder, index_name)
        index = read_json(file, f"read '{file.name}'", CheckpointError)
        return index_name, _shards_of(index_name, index), index
    files = [name for name in files if not name.startswith("adapter_model")]
    if name := _prefer_model(files, "model.safetensors", asked):
        if (part := _PART.fullmatch(name)) is not None and int(part[2]) > 1:
            problem = f"it holds '{name}', {int(part[1])} of {int(part[2])} parts, and no index"
            raise CheckpointError(asked, problem, "The download is not complete; fetch it again")
        return None, {name}, None
    if (folder / "adapter_config.json").is_file():
        problem = "it is an adapter, and a model is due here"
        raise CheckpointError(asked, problem, "Give a base; where both are given, it is first")
    remedy = "Convert it first: load it and call save_pretrained, which writes safetensors"
    if revisions := sorted(p.name for p in folder.glob("snapshots/*")):
        remedy = f"It is the hub's cache: give its folder 'snapshots/{revisions[-1]}'"
    raise CheckpointError(asked, "it holds no .safetensors weights", remedy)


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights by an index, as `model`, or in its only file.

    Beside a config alone several adapters may lie.
    """
    files = _visible(folder, "*.safetensors")
    return len(files) == 1 or "model.safetensors" in files or any(folder.glob("*" + INDEX_SUFFIX))


def _visible(folder: Path, pattern: str) -> list[str]:
    """Return the names in a folder that match, but hidden ones."""
    return sorted(path.name for path in folder.glob(pattern) if path.name[0] != ".")


def _prefer_model(names: list[str], preferred: str, asked: str) -> str | None:
    """Return the preferred name, or the only one; variants such as `model.fp16` are others."""
    if preferred in names:
        return preferred
    if len(names) > 1:
        problem = f"it holds several and none is '{preferred}': {', '.join(names[:5])}"
        remedy = "Give the path of the .safetensors file that is meant, or restore the index"
        raise CheckpointError(asked, problem, remedy)
    return names[0] if names else None


def _shards_of(name: str, index: Any) -> set[str]:
    """Return the names of the files that an index names."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        remedy = "The index is damaged; fetch it again"
        raise CheckpointError(f"read '{name}'", "it has no table 'weight_map'", remedy)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            where = f"it puts {tensor[:80]!r} into {str(shard)[:80]!r}"
            problem = f"{where}, which is not the plain name of a .safetensors file"
            remedy = "Do not use this checkpoint: such an index reaches outside its folder"
            raise CheckpointError(f"read '{name}'", problem, remedy)
    return set(weight_map.values())


def resolve_inside(folder: Path, name: str) -> Path:
    """Resolve a plain file name and refuse links to other places.

    A link may point to a file below the folder itself, or into `blobs` of the hub's cache, which
    keeps every file as `snapshots/REVISION/NAME -> ../../blobs/HASH`.
    """
    path = folder / name
    asked, real = f"read '{name}' of '{folder}'", path.resolve()
    if not real.is_file():
        problem = "it is not a regular file" if real.exists() else "there is no such file"
        remedy = "The download is not complete; fetch the checkpoint again"
        raise CheckpointError(asked, problem, remedy)
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(root) for root in roots):
        problem = f"it is a link to '{real}', outside the folder"
        raise CheckpointError(asked, problem, "Copy the file into the folder if it is meant")
    return real


def _read_shards(folder: Path, names: Iterable[str]) -> dict[str, Shard]:
    shards = {}
    for name in sorted(names):
        path = resolve_inside(folder, name)
        mtime_ns = path.stat().st_mtime_ns  # before the header is read
        shards[name] = Shard(name, path, read_header(path), mtime_ns)
    return shards


def _check_index(asked: str, weight_map: Mapping[str, str], shards: Mapping[str, Shard]) -> None:
    held = {(tensor, shard.name) for shard in shards.values() for tensor in shard.header.tensors}
    claimed = set(weight_map.items())
    remedy = "The checkpoint is incomplete or mixed from two; fetch it again"
    for tensor, shard in sorted(held - claimed):
        raise CheckpointError(asked, f"'{tensor}' of '{shard}' is not in the index", remedy)
    for tensor, shard in sorted(claimed - held):
        problem = f"the index puts '{tensor}' into '{shard}', which does not hold it"
        raise CheckpointError(asked, problem, remedy)


# Other files ------------------------------------------------------------------------------------


class SideFiles(NamedTuple):
    """The files of a folder but its own config, by relative paths; a folder's ends with a slash."""

    belong: tuple[str, ...]  # what a checkpoint has beside its weights
    code: tuple[str, ...]
    left: tuple[str, ...]  # all else, weights among them, but what is hidden


def find_side_files(folder: Path) -> SideFiles:
    """Tell which files of a folder belong to any checkpoint in it."""
    belong, code, left = list[str](), list[str](), list[str]()
    for path in _walk(folder, MAX_DEPTH):
        name = path.relative_to(folder).as_posix()
        is_side = path.suffix in _SUFFIXES or path.name.startswith(_NAMES)
        stays = path.name.endswith(".index.json") or path.name.startswith(_STARTS)
        if not path.is_file():
            left.append(f"{name}/")
        elif path.suffix == ".py":
            code.append(name)
        elif name != "config.json":
            (belong if is_side and not stays else left).append(name)
    return SideFiles(tuple(belong), tuple(code), tuple(left))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yield each file that is not hidden, and each folder that is empty or not looked into."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        inside = depth > 0 and path.is_dir() and not path.is_symlink()
        yield from [*_walk(path, depth - 1)] if inside and any(path.iterdir()) else [path]


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some values changed and everything else unchanged, in its order.

    A key that inner configs (`text_config`) hold is changed there, too; None removes it, and of a
    table from old values to new ones only what is old changes.
    """
    edited, inner = _changed(config, changes), set[str]()
    for key, value in edited.items():
        if isinstance(value, dict) and key not in changes:
            inner |= value.keys()
            edited[key] = _changed(value, changes)
    for key, value in changes.items():  # what only inner ones hold belongs there
        is_plain = value is not None and not isinstance(value, dict)
        if key not in config and is_plain and key not in inner - {"tie_word_embeddings"}:
            edited[key] = value
    return edited


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    edited = {}
    for key, old in table.items():
        new = changes.get(key, old)
        if key in changes and isinstance(new, dict) and not isinstance(old, dict):
            new = new.get(old, old)
        if new is not None or key not in changes:
            edited[key] = new
    return edited

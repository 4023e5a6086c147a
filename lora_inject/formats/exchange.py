"""Adapters as files: the table of formats, and what holds for every one of them.

A format is three functions: `write(state, path, facts, **options)`, `read(path, facts, **options)`
and `detects(files)`. What holds for every format is done here: the checks of an adapter, writing
all or nothing, and saying in errors which adapter was asked for.
"""

from __future__ import annotations

import glob
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lora_inject.core.adapter import native
from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import explained, write_directory, write_file
from lora_inject.core.spec.names import nearest
from lora_inject.errors import FormatError, check_type, user_path, within
from lora_inject.formats import gguf, loralib, mlx, pipelines, servers
from lora_inject.formats.format import SAFE, Files, Format
from lora_inject.formats.hub import located
from lora_inject.formats.model_facts import ModelFacts, Stated
from lora_inject.formats.peft import folder
from lora_inject.formats.read_back import check_read_back

DEFAULT = "peft"
"""What is written where no format is named."""

OLDER_FILES = {"adapter_model.bin"}
"""Files that an older adapter may have and a new one need not, so that they may be replaced."""


def _is_native(files: Files) -> bool:
    return native.is_native(files.metadata(), "native")


def _read_as_peft(_files: Files) -> bool:
    return False


FORMATS: dict[str, Format] = {
    # One safetensors file of this package.
    "native": Format(native.write, native.read, _is_native, endings=SAFE, takes_facts=False),
    # The folder of mlx-lm, which also has an adapter_config.json.
    "mlx": Format(mlx.write, mlx.read, mlx.detects, deltas_only=True),
    # A directory of Hugging Face PEFT.
    "peft": Format(folder.write, folder.read, folder.detects, client="PEFT"),
    # The same with one rank and scale 1, for servers that read little of the config; with a pair
    # for each expert; with stacks of experts that share a factor.
    **{
        name: Format(write, folder.read, _read_as_peft, deltas_only=True, client="PEFT")
        for name, write in servers.WRITERS.items()
    },
    # A file of llama.cpp, which is only written.
    "gguf": Format(gguf.write, gguf.read, gguf.detects, True, (".gguf",)),
    # One file of sd-scripts, LyCORIS, ComfyUI.
    "kohya": Format(pipelines.write_kohya, pipelines.read_kohya, pipelines.is_kohya, True, SAFE),
    # One file of a pipeline, or the folder that holds it.
    "diffusers": Format(
        pipelines.write_diffusers,
        pipelines.read_diffusers,
        pipelines.is_of_diffusers,
        True,
        client=pipelines.CLIENT,
        unsure=pipelines.unsure,
    ),
    # Microsoft's state dict.
    "loralib": Format(
        loralib.write,
        loralib.read,
        loralib.detects,
        True,
        (*SAFE, *loralib.PICKLES),
        loses=loralib.loses,
    ),
}
"""Name to row; detection asks those from outside first, then these in this order."""

_BUILT_IN = (*FORMATS,)

_OF_TORCHTUNE = (
    "it is an adapter of torchtune, whose own files are not read",
    "Save it with torchtune's FullModelHFCheckpointer, which writes a PEFT folder, and give that",
)
NOT_READ = {
    "adapter_model.pt": _OF_TORCHTUNE,
    "adapter_0.pt": _OF_TORCHTUNE,
    "lit_model.pth.lora": (
        "it is an adapter of litgpt, whose files are not read",
        "Merge it with `litgpt merge_lora`, and convert that with `litgpt convert_from_litgpt`",
    ),
}
"""By a file of another program: what the adapter is, and what to do with it instead."""


def format_of(name: str, asked: str = "") -> Format:
    """Return the row of a format.

    Args:
        name: Its name.
        asked: What asks, for the error.

    Raises:
        FormatError: There is no such format.

    Examples:
        >>> format_of("native").endings
        ('.safetensors',)
    """
    if name not in FORMATS:
        near = ", ".join(nearest(name, FORMATS) or FORMATS)
        raise FormatError(asked, f"there is no format '{name}'", f"Nearest: {near}")
    return FORMATS[name]


def register_format(name: str, row: Format) -> Format:
    """Add a format from outside the package; detection tries it before the built-in ones.

    What it writes is read back before it stands anywhere, by its `read` with the same facts, and
    with those options of its `write` that its `read` has too. An adapter that comes back as another
    one is a `FormatError` that names the site and the difference. So a `write` that does not know a
    variant or a scaling refuses it.

    Args:
        name: The name for `format=`.
        row: Its functions.

    Returns:
        The row.

    Raises:
        FormatError: The name is taken, or the two are swapped.

    Examples:
        >>> import pickle
        >>> def write(state, path, facts):
        ...     return pickle.dumps(state)
        >>> def read(path, facts):
        ...     return pickle.loads(path.read_bytes())
        >>> def detects(files):
        ...     return files.path.suffix == ".x"
        >>> row = register_format("pickle", Format(write, read, detects))
        >>> FORMATS.pop("pickle") is row
        True
    """
    asked = "register_format"
    check_type(asked, name, str, "Give the name first, the Format second", FormatError)
    check_type(asked, row, Format, "Give a Format: write, read, detects", FormatError)
    if name in FORMATS:
        raise FormatError(f"register_format({name!r})", "the name is taken", "Choose another one")
    FORMATS[name] = row
    return row


def _as_asked() -> list[str]:
    """Return the names in the order of detection: from outside, the last one first, then ours."""
    outside = [name for name in [*FORMATS] if name not in _BUILT_IN]
    return [*reversed(outside), *_BUILT_IN]


def write_adapter(
    state: AdapterState,
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: Stated = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write an adapter to files, all or nothing.

    Args:
        state: The adapter.
        path: Where to; a name without an ending gets the format's own.
        format: Name of a row of `FORMATS`; None for the folder that most programs read.
        facts: What is known of the model (`formats.ModelFacts`), or a function that says it; single
            facts may be given as options.
        overwrite: Replace an existing adapter. A folder has no name for a moment meanwhile.
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
    target, content = content_of(state, path, format, facts=facts, **options)
    if isinstance(content, bytes):
        return write_file(target, content, overwrite=overwrite)
    return write_directory(target, content, overwrite=overwrite, replaceable=OLDER_FILES)


def content_of(
    state: AdapterState,
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: Stated = None,
    **options: Any,
) -> tuple[Path, bytes | Mapping[str, bytes]]:
    """Return what `write_adapter` writes: the path, and the bytes of a file or of each in a folder.

    Raises:
        FormatError: The format does not exist or cannot express the adapter.
    """
    target = user_path("write adapter", path)
    format = format or DEFAULT  # noqa: A001
    row = format_of(format, f"write adapter to '{path}'")
    with within(f"write {format} adapter to '{path}'"):
        known, own = _arguments(row, row.write, facts, options)
        target = completed(target, row)
        _checked(state).check_finite("", FormatError)
        if format != "native":
            state = with_every_expert(state)
        content = row.write(state, target, known, **own)
        remedy = "Return the bytes of the file, or of each file by its name"
        check_type("what the format wrote", content, (bytes, Mapping), remedy, FormatError)
        if format not in _BUILT_IN:
            _refuse_another(state, target.name, content, row, known, own)
    return target, content


def _refuse_another(
    state: AdapterState,
    name: str,
    content: bytes | Mapping[str, bytes],
    row: Format,
    facts: ModelFacts | None,
    options: Mapping[str, Any],
) -> None:
    """Read what a format from outside has written, in a folder for this; refuse another adapter."""
    with tempfile.TemporaryDirectory(prefix="lora_inject_") as folder:
        place = Path(folder, name)
        with explained(place):
            if isinstance(content, Mapping):
                place.mkdir()
            files = content.items() if isinstance(content, Mapping) else [("", content)]
            for part, data in files:
                (place / part).write_bytes(data)
        known = {option: options[option] for option in options_of(row.read) if option in options}
        found = with_every_expert(_checked(row.read(place, facts, **known)))
    check_read_back(state, found, deltas_only=row.deltas_only)


def completed(path: Path, row: Format) -> Path:
    """Return the path of a file with the format's ending, if its name has none.

    Raises:
        FormatError: It has another ending.

    Examples:
        >>> completed(Path("sql"), format_of("native")).name
        'sql.safetensors'
    """
    if not row.endings or path.suffix in row.endings:
        return path
    if path.suffix:
        problem = f"its name does not end in {' or '.join(row.endings)}"
        raise FormatError("", problem, "Rename it, or leave the ending out")
    return path.with_name(path.name + row.endings[0])


def read_adapter(
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: Stated = None,
    **options: Any,
) -> AdapterState:
    """Read an adapter from files.

    Values that are not finite are read, so that `inspect` shows them; loading, merging, combining
    and writing refuse them.

    Args:
        path: Where from; or `user/name` on the Hugging Face hub, if a text is no path that exists.
        format: Name of a row of `FORMATS`; None detects it from the files.
        facts: What is known of the model (`formats.ModelFacts`), or a function that says it; single
            facts may be given as options.
        options: The format's own, see its `read`.

    Returns:
        The adapter.

    Raises:
        FormatError: There is no adapter, or it cannot be read.
    """
    place, is_detected = located(path, "read adapter"), format is None
    format = format or detected(place)  # noqa: A001
    row = format_of(format, f"read adapter '{path}'")
    with within(f"read {format} adapter '{path}'"):
        known, own = _arguments(row, row.read, facts, options)
        files = Files(place)
        if is_detected and row.unsure is not None and (why := row.unsure(files, known, own)):
            raise FormatError("", *why)
        place = place if row.endings else files.path
        return replace(_checked(row.read(place, known, **own)), source=str(path))


def detected(path: Path) -> str:
    """Return the first format that detects a path as its own; raise if there is none."""
    asked, files = f"read adapter '{path}'", Files(user_path("read adapter", path))
    with within(asked):
        for name in _as_asked() if path.exists() and path.name not in NOT_READ else ():
            if FORMATS[name].detects(files):
                return name
    raise FormatError(asked, *_why_none(path, files))


def _why_none(path: Path, files: Files) -> tuple[str, str]:
    """Return what a path is instead, and what to give."""
    if not path.exists():
        beside = sorted(path.parent.glob(f"{glob.escape(path.name)}.*")) if path.name else []
        remedy = f"Give '{beside[0]}'" if len(beside) == 1 else "Check the path"
        if len(path.parts) == 2 and not path.parent.exists():  # as a name of the hub
            remedy += f"; an adapter of the hub is fetched by: hf download {path}"
        return "there is no such file or directory", remedy
    for file, why in NOT_READ.items():
        if files.has(file) or path.name == file:
            return why
    if path.is_dir() and (path / "config.json").is_file():
        problem = "it is a model, and an adapter is due here"
        return problem, "Give an adapter; where both are given, the base is first"
    problem = "it is not an adapter of a known format"
    return problem, f"Give a folder or a file of one of: {', '.join(FORMATS)}"


# Facts of a model that may be given as options.
FACTS = [field.name for field in fields(ModelFacts)]


def options_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the options that only this format's `read` or `write` has.

    Examples:
        >>> def read(path, facts, *, component=None): ...
        >>> options_of(read)
        ['component']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


_CALLED_OTHERWISE = {
    "any_base": 'base="any"',  # the functions on checkpoints and the commands
    "adapter_name": "name=",  # this and the next: PEFT
    "is_trainable": "trainable=True",
}
"""What load_adapter's options are called elsewhere."""


def _arguments(
    row: Format, function: Callable[..., Any], facts: Stated, options: Mapping[str, Any]
) -> tuple[ModelFacts | None, dict[str, Any]]:
    """Return the facts about the model, with those among the options, and the format's options."""
    if not row.takes_facts and not options:
        return None, {}
    known = options_of(function)
    stated = {name: value for name, value in options.items() if name in FACTS}
    own = {name: value for name, value in options.items() if name not in FACTS}
    for option in own.keys() - known:
        its = ", ".join(known) or "none"
        remedy = f"Its options: {its}; facts of the model: {', '.join(FACTS)}"
        if option in _CALLED_OTHERWISE:
            remedy = f"load_adapter takes {_CALLED_OTHERWISE[option]}"
        raise FormatError("", f"{option!r} is not an option of this format", remedy)
    given = facts() if callable(facts) else facts
    return replace(given or ModelFacts(), **stated), own


def _checked(state: AdapterState) -> AdapterState:
    """Return an adapter if its tensors fit what is said of them; raise if they do not."""
    check_type("", state, AdapterState, "Give an AdapterState, as adapter_state(model) does")
    state.check_tensors()
    return state


# Losses -------------------------------------------------------------------------------------------


def losses_of(state: AdapterState, format: str) -> list[str]:  # noqa: A002
    """Return what an adapter loses in a format, as sentences; empty if nothing.

    Examples:
        >>> losses_of(AdapterState({}, config={"rank": 8}), "portable")
        ['the config is left out']
    """
    row = format_of(format, f"convert to '{format}'")
    if not row.deltas_only:
        return []
    sites = state.sites.values()
    losses = {
        "the config is left out": state.config is not None,
        "the base's fingerprint is left out: another base of the same shape is not noticed": (
            state.fingerprint is not None
        ),
        "dropout and the dtype of the arithmetic are left out": any(
            site.spec.dropout or site.spec.compute != "base" for site in sites
        ),
        "frozen starts become further ranks, which train on like all others": any(
            site.A0 is not None for site in sites
        ),
    }
    return [words for words, is_so in losses.items() if is_so] + row.loses(state)

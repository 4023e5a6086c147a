"""Adapters as files: a table of formats, each known by its name and imported when asked for.

A format is three functions: `write(state, path, facts, **options)`, `read(path, facts, **options)`
and `detects(path)`. What holds for every format is done here: the checks of an adapter, writing all
or nothing, and saying in errors which adapter was asked for.

This package's own format needs nothing else. All others lie in the room of formats, which enters
their rows into the table when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.adapter import native
from lora_inject.core.adapter.ill_fitting import check_trained, why_ill_fitting
from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.adapter.site_state import FLOATS, SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.undetected import no_such_format, why_none
from lora_inject.core.files.atomic import write_file
from lora_inject.core.files.atomic_folder import write_directory
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, check_type, user_path, within


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        write: `write(state, path, facts, **options)`: the content of the file that `path` will be,
            or of each file of the folder, by name. The adapter's shapes and dtypes are checked.
        read: `read(path, facts, **options) -> AdapterState`; its tensors are checked afterwards.
        detects: `detects(path) -> bool`, by content; the first row that returns True reads. It
            raises for one file of an adapter whose format is a folder.
        keeps: What its files can express besides the deltas (`formats.lost`); None: everything.
        endings: The endings that a file's name may have to be written; empty for any.
        takes_facts: Whether `write` and `read` look at the facts about the model.
        check_sites: `check_sites(specs, facts)`: raises where files of the format cannot hold such
            sites, whatever their values; asked before training. `facts` as for `write`.
        check_save: `check_save(survey, name)`: raises where a reader of the format would compute
            something else from the file than the live model does.
        check_load: `check_load(survey, state, fitted, asked)`: raises where the adapter of the
            file, as it fits the live model, meant something else where it was made.
    """

    write: Callable[..., bytes | Mapping[str, bytes]]
    read: Callable[..., AdapterState]
    detects: Callable[[Path], bool]
    keeps: frozenset[str] | None = None
    endings: tuple[str, ...] = ()
    takes_facts: bool = True
    check_sites: Callable[[Sequence[SiteSpec], Any], None] | None = None
    check_save: Callable[[Any, str], None] | None = None
    check_load: Callable[[Any, AdapterState, AdapterState, str], None] | None = None


SAFE = (".safetensors",)

FORMATS: dict[str, Format | Callable[[], Format]] = {
    # One safetensors file of this package.
    "native": Format(native.write, native.read, native.detects, endings=SAFE, takes_facts=False),
}
"""Name to row, or to what returns it: `format_of` gives the row."""


def format_of(name: str, asked: str = "") -> Format:
    """Return the row of a format, which is imported if it was not yet.

    Args:
        name: Its name.
        asked: What asks, for the error.

    Raises:
        FormatError: There is no such format.

    Examples:
        >>> format_of("native").endings
        ('.safetensors',)
    """
    known = FORMATS if name in FORMATS else every_format()
    if name not in known:
        raise no_such_format(name, known, asked)
    row = known[name]
    if not isinstance(row, Format):
        row = FORMATS[name] = row()
    return row


def every_format() -> Mapping[str, Format | Callable[[], Format]]:
    """Return the whole table: what lies in the room enters it on import."""
    room("formats")
    return FORMATS


def _in_order() -> Iterator[str]:
    """Yield the names of the table; the room is imported only if what is in it did not do."""
    there = [*FORMATS]
    yield from there
    yield from [name for name in every_format() if name not in there]


def write_adapter(
    state: AdapterState,
    path: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    *,
    facts: Any = None,
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
    format = format or room("formats").DEFAULT  # noqa: A001
    row = format_of(format, f"write adapter to '{path}'")
    with within(f"write {format} adapter to '{path}'"):
        facts, own = _arguments(row, row.write, facts, options)
        target = completed(target, row)
        _checked(state).check_finite("", FormatError)
        if format != "native":
            state = with_every_expert(state)
        content = row.write(state, target, facts, **own)
        remedy = "Return the bytes of the file, or of each file by its name"
        check_type("what the format wrote", content, (bytes, Mapping), remedy, FormatError)
    if isinstance(content, bytes):
        return write_file(target, content, overwrite=overwrite)
    older = room("formats").OLDER_FILES
    return write_directory(target, content, overwrite=overwrite, replaceable=older)


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
    facts: Any = None,
    **options: Any,
) -> AdapterState:
    """Read an adapter from files.

    Values of safetensors are read when they are used, each time, so an adapter may be larger than
    memory. The file may be moved, deleted or replaced meanwhile. If it was written to in place,
    using a value raises a FormatError. The tensors cannot be changed in place; `copy.deepcopy` of
    the value reads all of it into memory. Values that are not finite are read, so that `inspect`
    shows them; loading, merging, combining and writing refuse them.

    Args:
        path: Where from.
        format: Name of a row of `FORMATS`; None detects it from the files.
        facts: What is known of the model (`formats.ModelFacts`), or a function that says it; single
            facts may be given as options.
        options: The format's own, see its `read`.

    Returns:
        The adapter.

    Raises:
        FormatError: There is no adapter, or it cannot be read.
    """
    place = user_path("read adapter", path)
    if format is None:
        format = detected(place)  # noqa: A001
    row = format_of(format, f"read adapter '{path}'")
    with within(f"read {format} adapter '{path}'"):
        facts, own = _arguments(row, row.read, facts, options)
        return replace(_checked(row.read(place, facts, **own)), source=str(path))


def detected(path: Path) -> str:
    """Return the first format that detects a path as its own; raise if there is none."""
    asked = f"read adapter '{path}'"
    for name in _in_order() if path.exists() else ():
        with within(asked):
            if format_of(name).detects(path):
                return name
    raise FormatError(asked, *why_none(path, FORMATS))


def _arguments(
    row: Format, function: Callable[..., Any], facts: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the facts about the model, and the options that the format has itself."""
    if not row.takes_facts and not options:
        return None, {}
    return room("formats").facts_and_options(facts, options, function)  # type: ignore[no-any-return]


def _checked(state: AdapterState) -> AdapterState:
    """Return an adapter if its tensors fit what is said of them; raise if they do not."""
    check_type("", state, AdapterState, "Give an AdapterState, as adapter_state(model) does")
    if state.rows or not all(isinstance(t, Tensor) for t in state.trained.values()):
        check_trained(state.trained, state.rows)
    for site in state.sites.values():
        if not _fits(site):
            raise why_ill_fitting(site)
    return state


def _fits(site: SiteState) -> bool:
    """Whether a site has the tensors that its spec states, A and B of one floating point dtype."""
    spec, tensors = site.spec, site.tensors
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    due = {role: spec.shape_of(role) for role in spec.roles}
    pair = {tensor.dtype for role, tensor in tensors.items() if role not in site.further}
    dtypes = pair.union(tensor.dtype for tensor in site.further.values())
    started = (site.A0 is None) == (site.B0 is None)
    return started and shapes == due and len(pair) == 1 and dtypes <= {*FLOATS}

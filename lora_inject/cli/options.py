"""Arguments and options of several commands: adapters, reading, writing, printing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Option

from lora_inject.checkpoint import Checkpoint, read_weighted
from lora_inject.cli.show import print_json, say, width
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import check_free
from lora_inject.core.spec.names import counted, nearest
from lora_inject.core.spec.tables import ListReport, Report
from lora_inject.errors import CheckpointError, FormatError, LoraInjectError, user_path
from lora_inject.formats.exchange import (
    DEFAULT,
    FORMATS,
    detected,
    format_of,
    options_of,
    read_adapter,
)

Dtype = StrEnum("Dtype", "float32 bfloat16 float16")

AdapterPath = Annotated[Path, Argument(metavar="ADAPTER", help="A PEFT folder or an adapter file.")]
AdapterPaths = Annotated[
    list[Path], Argument(metavar="ADAPTER", help="Adapters: PEFT folders or adapter files.")
]
Weights = Annotated[
    list[float] | None,
    Option("--weight", "-w", help="Weight of an adapter; once for each, in order. (default: 1)"),
]
AnyBase = Annotated[bool, Option(help="Go on although the adapter was made on another base.")]
Overwrite = Annotated[bool, Option(help="Replace an existing adapter.")]


def one_of(names: Collection[str]) -> Callable[[str | None], str | None]:
    """Return a check of an option's value; another one than of `names` is wrong usage."""

    def checked(value: str | None) -> str | None:
        if value is None or value in names:
            return value
        near = nearest(value, names, 1)
        meant = f", did you mean {near[0]}?" if near else "."
        known = ", ".join(name or "''" for name in names)
        raise BadParameter(f"{value!r} is not known{meant} Known are {known}")

    return checked


FORMAT = f"Format to write: {', '.join(FORMATS)}."


def model_folder(path: Path) -> Path:
    """Return a path as it is, or the folder that the hub's local cache has for a name like gpt2.

    The network is never asked. Where the folder `user` is here, `user/name` is a path.
    """
    path = user_path("open a model", path, CheckpointError)
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(path))
    if path.exists() or not is_name or (len(path.parts) > 1 and path.parent.exists()):
        return path
    with suppress(ImportError, ValueError):  # no hub here, or not a name that it can have
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(str(path), "config.json")
        if isinstance(file, str):
            return Path(file).parent
    problem = "there is no such file or folder here, nor a model of this name in the hub's cache"
    remedy = f"Check the path; a model of the hub is fetched by: hf download {path}"
    raise CheckpointError(f"open '{path}'", problem, remedy)


@dataclass(frozen=True)
class Printing:
    """How to print a result."""

    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False

    def print(self, data: Mapping[str, Any], text: str) -> None:
        """Print plain data as JSON, or what says it in words."""
        try:
            print_json(data) if self.as_json else say(text)
        except OSError as error:
            done = "The command has done its work, files included; only this is lost"
            raise LoraInjectError("print the result", str(error.strerror), done) from error


@dataclass(frozen=True)
class Output(Printing):
    """How to print a result."""

    def show(self, result: Report, **more: Any) -> None:
        """Print a result: its plain data and `more` as JSON, or its text."""
        self.print({**result.to_dict(), **more}, result.text(width()))


@dataclass(frozen=True)
class ListOutput(Printing):
    """How to print a result with many sites."""

    everything: Annotated[
        bool, Option("--all", help="List each site instead of each kind of site.")
    ] = False

    def show(self, result: ListReport, **more: Any) -> None:
        """Print a result: its plain data and `more` as JSON, or its text."""
        text = result.text(width(), everything=self.everything)
        self.print({**result.to_dict(), **more}, text)


@dataclass(frozen=True)
class Writing:
    """Where and how to write an adapter."""

    output: Annotated[Path, Option("--output", "-o", help="Where to write the adapter.")]
    adapter_format: Annotated[str, Option("--format", help=FORMAT, callback=one_of(FORMATS))] = (
        DEFAULT
    )
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        """Refuse an output that exists, before anything is computed."""
        check_free(user_path("write adapter", self.output), overwrite=self.overwrite)


@dataclass(frozen=True)
class Keeping:
    """How much of each delta to keep."""

    rank: Annotated[int | None, Option(min=1, help="Rank of every site, at most.")] = None
    energy: Annotated[
        float | None,
        Option(min=0, max=1, help="Share of each delta's squares to keep; the rank follows."),
    ] = None

    def __post_init__(self) -> None:
        """Require one of the two."""
        if self.rank is None and self.energy is None:
            raise BadParameter("say how much to keep: --rank, --energy, or both")


@dataclass(frozen=True)
class ReadOptions:
    """How to read adapters."""

    allow: Annotated[
        list[str] | None,
        Option(
            metavar="FIELD",
            help="PEFT folders: accept this unknown field of adapter_config.json; may be repeated.",
        ),
    ] = None
    component: Annotated[
        str | None,
        Option("--from-component", help="Pipelines: the part to read from a file with several."),
    ] = None

    def options(self, paths: Sequence[Path], known: str | None = None) -> list[dict[str, Any]]:
        """Return for each adapter the given options that its format takes.

        `known` is the format; by default it is detected.
        """
        given = self._given()
        taken: list[dict[str, Any]] = []
        for path in paths:
            try:
                names = options_of(format_of(known or detected(path)).read)
                taken.append({name: given[name] for name in names if name in given})
            except FormatError:  # reading it will report the error
                taken.append({})
        for name in given:
            if not any(name in options for options in taken):
                option = "from-component" if name == "component" else name.replace("_", "-")
                problem = "no adapter has a format with this option"
                raise BadParameter(problem, param_hint=f"--{option}")
        return taken

    def _given(self) -> dict[str, Any]:
        """Return the options that were given, as `read_adapter` takes them."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if value not in (None, [])}

    def read(
        self, paths: Sequence[Path], base: Checkpoint | None = None, **more: Any
    ) -> list[AdapterState]:
        """Read adapters; a base resolves the weights of stacked experts."""
        states = []
        more = {name: value for name, value in more.items() if value is not None}
        for path, options in zip(paths, self.options(paths, more.get("format")), strict=True):
            if base is None:
                states.append(read_adapter(path, **options, **more))
            else:
                states.append(read_weighted(path, base, **options, **more).state)
        return states


def weights_for(adapters: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return a weight for each adapter: 1 by default."""
    if not weights:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        problem = f"{counted(len(weights), 'weight')} for {counted(len(adapters), 'adapter')}"
        raise BadParameter(f"{problem}; give --weight once for each", param_hint="--weight")
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise BadParameter(f"{weight:g} is not a weight", param_hint="--weight")
    return [*weights]


def pairs_from(texts: Iterable[str], option: str, example: str, whole: str = "") -> dict[str, str]:
    """Read pairs such as OLD=NEW; the sides named in `whole` must not be empty."""
    pairs = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or ("old" in whole and not old) or ("new" in whole and not new):
            raise BadParameter(f"{text!r} is not a pair, such as {example}", param_hint=option)
        pairs[old] = new
    return pairs

"""Every error that this package raises on purpose.

A message has three parts, and so does the exception. *What was asked* names the place in
the user's own words, *what was found* is the fact, *what to do* is the way out. There is one base
class and one child for each stage of the work, so that a caller can catch a stage.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


class LoraInjectError(Exception):
    """Base of all errors of this package.

    Args:
        asked: What was asked for, with the name or place in the user's own words.
        found: What was found instead.
        remedy: What to do about it.

    Examples:
        >>> from lora_inject.errors import LoraInjectError
        >>> print(LoraInjectError("rule 1 ('v_prj')", "matched none of 12 names", "Try 'v_proj'"))
        rule 1 ('v_prj'): matched none of 12 names. Try 'v_proj'.
    """

    def __init__(self, asked: str, found: str, remedy: str) -> None:
        super().__init__(asked, found, remedy)
        self.asked = asked
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        end = "" if self.remedy.endswith((".", "?", "!")) else "."
        return f"{self.asked}: {self.found}. {self.remedy}{end}"


class ConfigError(LoraInjectError):
    """The config itself is wrong: unknown key, wrong type, impossible value, unsafe YAML."""


class MatchError(LoraInjectError):
    """A pattern matched nothing, or something that cannot be meant, or `expect` was missed."""


class LayerError(LoraInjectError):
    """A module or a parameter cannot take an adapter the way that was asked."""


class StateError(LoraInjectError):
    """A verb was used at the wrong time: unknown adapter, name in use, merged, not injected."""


class FormatError(LoraInjectError):
    """Adapter files that are incomplete, contradictory, unsafe, or made for another base."""


class CheckpointError(LoraInjectError):
    """A model checkpoint on disk cannot be read, merged or written as asked."""


class ServerError(LoraInjectError):
    """A server does not answer, or does not return what tells an adapter."""


AS_NATIVE = 'For W + delta, as its merge has it, load li.convert(PATH, "a.safetensors", "native")'
"""The remedy where another program computes something else with its own file."""


@contextmanager
def within(asked: str) -> Iterator[None]:
    """Put what was asked for before the place that an error of the body names.

    So a function names only the place that it knows, or "" for all of what its caller was asked.
    A verb and a place are said once: in `read adapter 'sql', read 'sql/model'` the second verb
    goes, in `read adapter 'sql', read 'sql'` all that follows.

    Examples:
        >>> try:
        ...     with within("read adapter 'sql'"), within("site 'q'"):
        ...         raise FormatError("", "its A is missing", "Fetch the file again")
        ... except FormatError as error:
        ...     print(error)
        read adapter 'sql', site 'q': its A is missing. Fetch the file again.
    """
    try:
        yield
    except LoraInjectError as error:
        place = error.asked.removeprefix(f"{asked.partition(' ')[0]} ")
        is_said = not place or asked.endswith(f" {place}")
        error.asked = asked if is_said else f"{asked}, {place}"
        error.args = (error.asked, *error.args[1:])
        raise


def article(word: str) -> str:
    """Return a word with its article: `a dict`, `an int`."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def check_type(
    asked: str,
    value: object,
    kind: type | tuple[type, ...],
    remedy: str,
    error: type[LoraInjectError] = StateError,
) -> None:
    """Raise `error` unless the value is of the kind; True and False are not numbers."""
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "None" if value is None else article(type(value).__name__)
        raise error(asked, f"it is {what}", remedy)


def check_list(
    asked: str, value: object, remedy: str, error: type[LoraInjectError] = StateError
) -> None:
    """Raise `error` unless the value is a list of any kind; a string is one of its letters."""
    check_type(asked, value, list if isinstance(value, str | bytes) else Iterable, remedy, error)


_PATH = "Give a str or a Path"


def user_path(
    asked: str, value: object, error: type[LoraInjectError] = FormatError, remedy: str = _PATH
) -> Path:
    """Return a path that a user gave, with `~` and `~name` as the homes that they are in a shell.

    Every path that a function or a command takes goes through here, so that none makes a folder
    `~`, and none opens what is neither a file nor a folder.

    Examples:
        >>> user_path("save adapter", "~/sql") == Path.home() / "sql"
        True
    """
    asked = f"{asked}, path"
    if hasattr(value, "named_modules") or hasattr(value, "sites"):  # save_adapter(path, model)
        remedy = "Swap the two: it comes first, the path second"
    check_type(asked, value, (str, PathLike), remedy, error)
    text = os.fsdecode(value)  # type: ignore[arg-type]  # of an entry of os.scandir, its path
    if "\0" in text:
        raise error(asked, f"{text!r} has a zero byte", "Correct the path")
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        problem = f"there is no home of '{text[1:].partition(os.sep)[0]}'"
        raise error(asked, problem, f"For a folder of this name, give ./{text}") from None
    try:
        mode = path.stat().st_mode
    except OSError as refused:
        if refused.errno == errno.ELOOP:
            raise error(asked, f"the links of '{text}' form a loop", "Correct it") from None
    else:  # a pipe would be waited for, and a device may have no end
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            problem = f"'{text}' is neither a file nor a folder"
            raise error(asked, problem, "Write what it gives to a file, and give that")
    return path.absolute() if str(path).startswith("~") else path  # a Path drops a leading ./

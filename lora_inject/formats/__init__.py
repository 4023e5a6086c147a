"""Adapters in other programs' files: one module for each format, imported when asked for.

A format is a module with three functions: `write(state, path, facts, **options)`, `read(path,
facts, **options)` and `detects(path)`; for `facts` see `model_facts`. Its `FORMATS` has its row, by
name. The table below lists all, so a new format is one file and one row. What holds for every
format is done in `core.adapter.exchange`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from typing import Any

from lora_inject.core.adapter.exchange import (
    FORMATS,
    Format,
    detected,
    format_of,
    read_adapter,
    write_adapter,
)
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.model_facts import ModelFacts

__all__ = [
    "DEFAULT",
    "FORMATS",
    "Format",
    "ModelFacts",
    "detected",
    "facts_and_options",
    "format_of",
    "options_of",
    "read_adapter",
    "write_adapter",
]

DEFAULT = "peft"
"""What is written where no format is named."""

OLDER_FILES = {"adapter_model.bin", "adapter_model.pt", "adapter_0.pt"}
"""Files that an older adapter may have and a new one need not, so that they may be replaced."""

MODULES = {
    # The folder of mlx-lm, which also has an adapter_config.json.
    "mlx": "mlx",
    # Folders of torchtune and of litgpt, which hold pickles.
    "torchtune": "torchtune",
    "litgpt": "litgpt",
    # A directory of Hugging Face PEFT.
    "peft": "peft",
    # The same with one rank and scale 1, for servers that read little of the config.
    "portable": "portable",
    # A file of llama.cpp.
    "gguf": "gguf_file",
    # The portable directory with a pair for each expert.
    "vllm": "portable",
    # The portable directory with stacks of experts that share a factor.
    "sglang": "shared_experts",
    # One file of sd-scripts, LyCORIS, ComfyUI.
    "kohya": "kohya",
    # One file of a pipeline, or the folder that holds it.
    "diffusers": "diffusers",
    # Microsoft's state dict.
    "loralib": "loralib",
}
"""Format to the module that has its row; detection asks in this order."""


def _row(name: str, module: str) -> Format:
    """Import a format's module and return its row."""
    row: Format = import_module(f"lora_inject.formats.{module}").FORMATS[name]
    return row


FORMATS.update({name: partial(_row, name, module) for name, module in MODULES.items()})
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


def facts_and_options(
    facts: ModelFacts | Callable[[], ModelFacts] | None,
    options: Mapping[str, Any],
    function: Callable[..., Any],
) -> tuple[ModelFacts, dict[str, Any]]:
    """Return the facts with those among the options, and the options of a format's function."""
    known = options_of(function)
    stated = {name: value for name, value in options.items() if name in FACTS}
    own = {name: value for name, value in options.items() if name not in FACTS}
    for option in own.keys() - known:
        problem = f"{option!r} is not an option of this format"
        its = ", ".join(known) or "none"
        remedy = f"Its options: {its}; facts of the model: {', '.join(FACTS)}"
        if option in _CALLED_OTHERWISE:
            remedy = f"load_adapter takes {_CALLED_OTHERWISE[option]}"
        raise FormatError("", problem, remedy)
    given = facts() if callable(facts) else facts
    return replace(given or ModelFacts(), **stated), own


def facts_about(survey: Survey) -> ModelFacts:
    """Return the facts about a live model that files depend on."""
    return ModelFacts.of(survey.model, survey.by_name, survey.weights)


def notes_on_files(survey: Survey, specs: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield what the default format cannot hold of sites, and the call that works."""
    check = format_of(DEFAULT).check_sites
    try:
        if check is not None:
            check(specs, facts_about(survey))
    except FormatError as problem:
        what = ", ".join(filter(None, (problem.asked, problem.found)))
        yield f"save_adapter cannot write this as {DEFAULT!r}: {what}. {problem.remedy}"
    if any(spec.only or spec.share for spec in specs):
        yield (
            f"files of {DEFAULT!r} hold every expert: loaded again, those that are left out train "
            "with zeros, and a shared factor is one for each. save_adapter(model, path, format="
            '"native") keeps both'
        )

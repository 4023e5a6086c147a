"""Saving an adapter of a live model to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.library import loaded_libraries, this_process_writes
from lora_inject.core.model.buffers import check_buffers
from lora_inject.core.model.listing import idle_among, notes_on_adapter
from lora_inject.core.model.probing import take_proof
from lora_inject.core.model.read_off import read_off
from lora_inject.core.model.used import refuse_unused_sites, say_untrained
from lora_inject.core.roots.root import Injected, entries
from lora_inject.errors import FormatError, StateError, user_path, within
from lora_inject.formats.exchange import DEFAULT, completed, format_of, write_adapter
from lora_inject.formats.live_models import facts_about, refuse_misread
from lora_inject.formats.model_facts import ModelFacts


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    name: str = "default",
    *,
    format: str | None = None,  # noqa: A002 - the word that users look for
    unused: Sequence[str] = (),
    probe: Any = None,
    **options: Any,
) -> Path:
    """Write an adapter to files, atomically.

    Of several processes any may call it, or all with the same path: whoever comes second finds
    what it would write. With shards all must call it.

    Args:
        model: The root, or a module that holds it.
        path: Where to; a directory for the default format. A file's name without an ending gets
            the format's own.
        name: The adapter.
        format: A row of `formats.FORMATS`; None for the folder that most programs read. A format
            refuses what its readers would compute wrong; where that is because another module reads
            a layer's weight, it may be known only once the model has run.
        unused: Patterns (as in a config) of sites and trained tensors that may be without use. Else
            what no forward has used is an error once the adapter was trained, unless other members
            of the same ModuleList or ModuleDict were used: experts, layers that are dropped.
        probe: A few short inputs. The file then says what the model computes for them with the
            adapter and without it, for `verify_loaded` and `verify_served`. Rows of token ids: a
            tensor, or lists such as `tokenizer(texts)["input_ids"]`. The model predicts tokens. The
            first 32 of 8 rows are used, and the model runs each about 14 times.
        **options: For the format: `overwrite=True` replaces an adapter that is there; `base_model`,
            `task_type` and others stand over what the model says (`formats.ModelFacts`).

    Returns:
        The path that was written.

    Raises:
        StateError: There is no such adapter, a site of it is inert, a parameter of the base trains
            beside it, buffers of the base (BatchNorm's statistics) moved while it trained, or the
            probe tells nothing.
        FormatError: It holds NaN or Inf, the format cannot express it, or the path cannot be
            written.
    """
    asked = f"save adapter {name!r}"
    folder, format = user_path("save adapter", path), format or DEFAULT  # noqa: A001
    row = format_of(format, asked)
    with within(f"{asked} to '{path}'"):
        target = completed(folder, row)
    survey = Injected(model, asked)
    state, facts = saved_state(survey, name, format, unused)
    if probe is not None:
        options["proof"] = take_proof(survey, name, probe, format)
    if this_process_writes(survey):
        say_untrained(name, state)
        write_adapter(state, target, format, facts=facts, **options)
    for library in loaded_libraries():
        library.after_save(survey)
    survey.root.adapters[name].files = target.absolute()
    return target


def saved_state(
    survey: Injected,
    name: str,
    format: str,  # noqa: A002
    unused: Sequence[str],
    gathered: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[AdapterState, Callable[[], ModelFacts]]:
    """Return an adapter that is to be saved, and a function of the facts that a format asks for.

    `gathered` are whole tensors by their keys in the state dict. Of several processes all raise.

    Raises:
        StateError: It is not all that has trained: sites that no forward has used, or parameters or
            buffers of the base that train or move beside it.
        FormatError: It holds NaN or Inf, or readers of the format would compute something else.
    """
    asked = f"save adapter {name!r}"
    state = read_off(survey, name, gathered)
    row = format_of(format, asked)
    if row.client:
        refuse_misread(survey, name, row.client)
    trained = name in survey.root.trainable
    for holder in survey.holders if trained else ():
        if holder.tensor.requires_grad:
            problem = f"{holder.name!r} trains beside it, and would be in no file"
            remedy = "Inject with its name under `train`, or freeze it: requires_grad_(False)"
            raise StateError(asked, problem, remedy)
    check_buffers(survey, asked)
    state.check_finite(asked, FormatError)
    refuse_unused_sites(survey, name, state, unused, asked)

    def facts() -> ModelFacts:
        idle = idle_among([*entries(survey, name)])
        notes = tuple(notes_on_adapter(survey, name))
        return replace(facts_about(survey), idle=idle, notes=notes)

    return state, facts

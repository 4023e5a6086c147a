"""Fit the trained copies of an adapter, as a value, to a model: loaded where it has any."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.names import joined
from lora_inject.errors import FormatError


def fit_trained(
    state: AdapterState, survey: Survey, buffers: Collection[str], asked: str
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the full copies by the model's names; equal copies of a tied tensor are one tensor.

    1. A tied tensor that the adapter names once, or with two values, is a copy under the names that
       it gives and nowhere else: those who write such files read them so.
    2. Rows of the input embedding are read under all its names, as they are written for all.
    """
    for key in state.trained.keys() & {*buffers}:
        problem = "it is a buffer of the model, and adapters hold parameters only"
        remedy = "Merge it into the base with the program that made it, and start from that model"
        raise FormatError(f"{asked}, trained tensor {key!r}", problem, remedy)
    weights = survey.weights
    rows_of: dict[str, tuple[int, ...]] = {}
    fitted: dict[str, Tensor] = {}
    first: dict[int, list[Tensor]] = {}
    table = _input_table(survey)
    for key, tensor in state.trained.items():
        weight, rows = weights.get(key), state.rows.get(key)
        for reason in _reasons_against_copy(key, tensor, rows, weight):
            raise FormatError(f"{asked}, trained tensor {key!r}", *reason)
        name = survey.at(key).name  # a module with two names is one module
        same = first.setdefault(id(weight), [])
        held = next((t for t in same if torch.equal(t, tensor)), None)
        if held is None:
            same.append(tensor)
        fitted[name] = tensor if held is None else held
        if rows is not None:
            tied = survey.names_of(name) if name == table else ()
            further = [n for n in tied if n not in state.trained]
            fitted.update(dict.fromkeys(further, fitted[name]))
            rows_of.update(dict.fromkeys((name, *further), rows))
    return fitted, rows_of


def _input_table(survey: Survey) -> str | None:
    """Return the name of the weight of a model's input embedding, None if it states none."""
    get = getattr(survey.model, "get_input_embeddings", None)
    try:
        path = survey.paths.get(id(get())) if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return None if path is None else joined(path, "weight")


def _reasons_against_copy(
    key: str, tensor: Tensor, rows: tuple[int, ...] | None, weight: Tensor | None
) -> Iterator[tuple[str, str]]:
    """Yield why a tensor is not a copy of a model's tensor, or of its rows, and what to do."""
    leave = "Load the adapter onto the model that it was made for, or leave this tensor out with "
    leave += f"leave_out=[{key!r}]"
    if weight is None:
        yield "the model has no such parameter", leave
        return
    there, here = tuple(tensor.shape), tuple(weight.shape)
    if rows is None:
        if there != here:
            yield f"it has shape {there} in the file and {here} here", leave
    elif len(here) != 2 or max(rows) >= here[0] or here[1:] != there[1:]:
        problem = f"it holds rows up to {max(rows)}, of {there[1:]} values, and the model's has "
        remedy = "Resize the vocabulary first: model.resize_token_embeddings(n)"
        yield f"{problem}the shape {here}", remedy

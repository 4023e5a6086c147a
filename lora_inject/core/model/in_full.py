"""Tensors of the base that train in full, or rows of them: where their copies go, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry, attribute
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import Below
from lora_inject.core.spec.patterns import matching
from lora_inject.errors import LayerError


def places_of_copies(
    survey: Survey, name: str, copies: Mapping[str, tuple[int, ...] | None]
) -> Iterator[Carried]:
    """Yield the place of each copied tensor."""
    for copy, rows in copies.items():
        _, module, param = holder = survey.at(copy)
        whole = holder.tensor.shape
        shape = tuple(whole) if rows is None else (len(rows), *whole[1:])
        entry = Entry(name, None, param, {"T": attribute("T", name, param)}, shape, rows)
        yield Carried(survey.paths[id(module)], module, entry)


def reasons_against_copy(place: Carried) -> Iterator[tuple[str, str]]:
    """Yield why a tensor cannot have a copy that trains, and what to do."""
    if is_quantized(place.weight):
        problem = f"it is quantized ({type(place.weight).__name__}): no copy of it can train"
        remedy = "Adapt the layer with a rule (targets) instead, or load the base unquantized"
        yield problem, remedy
    yield from _reasons_in_full(place.module)


def check_statistics(survey: Survey, patterns: Sequence[str], names: Inventory) -> None:
    """Raise if one of the modules that are to train in full has a layer with statistics inside."""
    modules = names.modules
    for i, pattern in enumerate(patterns):
        asked = f"train {i + 1} ('{pattern}')"
        named = matching(pattern, modules, asked=asked)
        below = Below(named)
        for name, module in survey.by_name.items() if named else ():
            for reason in _reasons_in_full(module) if name in below else ():
                raise LayerError(f"{asked}, {name!r}", *reason)


def _reasons_in_full(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield why a layer that moves statistics, which are buffers, cannot train in full."""
    if isinstance(getattr(module, "running_mean", None), Tensor):
        problem = (
            f"its {type(module).__name__} moves running_mean and running_var as well while it "
        )
        problem += (
            "trains: those are the base's buffers, which an adapter neither holds nor restores"
        )
        remedy = "Leave it out, or give the layer track_running_stats=False and no running_mean"
        yield problem, remedy

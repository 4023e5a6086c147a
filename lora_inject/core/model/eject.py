"""Remove adapters from a model, exactly."""

from __future__ import annotations

from collections.abc import Set
from typing import TypeVar

from torch import nn

from lora_inject.core.functional.inside import forget_graphs
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.class_swap import narrow, unswap
from lora_inject.core.layers.packed_weights import end_training
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.selection import alive
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import (
    ROOT,
    ROOT_MODULES,
    Root,
    adapted_modules,
    check_names,
    reach,
    records_of,
    refuse_merged,
    roots_of,
    structure_changed,
    whole_adapter,
)
from lora_inject.core.model.guards import after, before

M = TypeVar("M", bound=nn.Module)


def eject(model: M, name: str | None = None) -> M:
    """Remove one adapter, or all, from a model.

    Objects, classes, keys, their order, values and `requires_grad` flags are what they were before
    the first inject, also on layers that were replaced since. Ejecting all adapters of a merged
    model leaves the merged weights.

    Args:
        model: The root, or any module that holds roots.
        name: The adapter; all of them by default.

    Returns:
        The same object.

    Raises:
        StateError: There is no such adapter, it is merged together with others, or only a part of
            it is in this model.
        LayerError: `fully_shard` has sharded it.
    """
    survey = Survey(model)
    known = reach(survey.model, survey).names
    check_names(known, [] if name is None else [name], "eject")
    inside = {name for record in roots_of(survey).values() for name in record.configs}
    gone = {name} if name is not None else inside or known
    for each in gone - inside:
        whole_adapter(survey, each, "eject")
    records = {id(m): (m, record) for each in gone for m, record in records_of(survey, each)}
    for _, record in records.values():
        record.selection.check_settled("eject", others=True)
        if name is not None or not gone >= record.configs.keys():
            refuse_merged(f"ejecting {min(gone)!r}", record.selection)
    surveys = [(survey if m is survey.model else Survey(m), r) for m, r in records.values()]
    walked = [survey, *(one for one, _ in surveys)]
    for one in walked:
        before("eject", one, gone)
    modules = {id(m): m for one in walked for _, m in one.modules}
    modules |= {id(m): m for _, r in surveys for each in gone for m in r.carrying.get(each, ())}
    values = [value for _, record in surveys for value in (record, record.selection)]
    flags = [holder.tensor for one, _ in surveys for holder in one.holders]
    with all_or_nothing(modules.values(), values, flags):
        for _, module, _ in adapted_modules(survey) if not records else ():
            for each in gone:  # from a copy of one layer, which has no root
                _detach(module, each)
        for one, record in reversed(surveys):
            _take_off(one, record, gone & record.configs.keys())
        structure_changed()
        after("eject", modules.values())
        if not any(reach(one.model).names for one in walked):
            end_training(modules.values())
    return model


def _take_off(survey: Survey, record: Root, gone: Set[str]) -> None:
    """Remove adapters from one root; without adapters its record is removed, too."""
    for name in gone:
        for layer in record.carrying.pop(name):
            _detach(layer, name)
        del record.configs[name]
        record.files.pop(name, None)
        record.slots.discard(name)
        record.trainable.discard(name)
    record.selection.forget(gone)
    setting = record.selection.setting
    left = {name: weight for name, weight in setting.names.items() if name not in gone}
    if left != setting.names or record.selection.merged:
        record.selection.replace(Mix(left))
    if not record.configs:
        del survey.model.__dict__[ROOT]
        _unfreeze(survey, record)
        forget_graphs()


def _detach(module: nn.Module, name: str) -> None:
    """Remove an adapter from one module; with the last one its class is restored."""
    if (attached := attached_to(module)) is None:
        return
    for entry in attached.remove(name):
        for flat in entry.names.values():
            module._parameters.pop(flat, None)
    if attached.forward or attached.reads:
        narrow(module)
    else:
        unswap(module)


def _unfreeze(survey: Survey, record: Root) -> None:
    """Restore the flags of base parameters; another root that holds one restores it instead.

    Layers that were moved keep their flags; a layer that replaced another gets that layer's flag.
    """
    others = [(m.__dict__[ROOT], m) for m in alive(ROOT_MODULES) if ROOT in m.__dict__]
    held = {
        id(holder.tensor): (other, holder)
        for other, model in others
        if other.selection is record.selection
        for holder in Survey(model).holders
    }
    for name, (_, module, key) in record.required_grad.items():
        here = survey.by_name.get(name.rpartition(".")[0])
        moved = here is None or id(module) in survey.paths
        for at in (module,) if moved else (module, here):
            parameter = at._parameters.get(key)  # type: ignore[union-attr]
            if parameter is None:
                continue
            if id(parameter) in held:
                other, holder = held[id(parameter)]
                other.required_grad[holder.name] = holder
            else:
                parameter.requires_grad_(True)

"""Remove adapters from a model, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TypeVar

from torch import nn

from lora_inject.core.functional.torch_inside import forget_graphs
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.class_swap import narrow, unswap
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.packed_weights import end_training
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.model.ties import refuse_untold
from lora_inject.core.roots.carried import (
    ROOT,
    Root,
    alone,
    check_names,
    check_unmerged,
    known_roots,
    names_at,
    reach,
    records_of,
    structure_changed,
    whole_adapter,
)
from lora_inject.core.roots.several_roots import held_in_common

M = TypeVar("M", bound=nn.Module)
_Root = tuple[Survey, Root]


@alone
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
        LayerError: `fully_shard` has sharded it; or a merge has untied what no config says is tied,
            and the model's class may tie again.
    """
    survey = Survey(model)
    gone = _names_to_eject(survey, name)
    roots = _roots_with(survey, gone)
    for _, record in roots:
        _check_free(record, gone, every=name is None)
    walked = [survey, *(one for one, _ in roots)]
    for one in walked:
        for library in loaded_libraries():
            library.before_eject(one, gone)
    modules = _modules_of(walked, roots, gone)
    values = [value for _, record in roots for value in (record, record.selection)]
    flags = [tensor for one, _ in roots for tensor in one.tensors]
    with all_or_nothing(modules, values, flags):
        _detach(modules, gone)
        for one, record in roots:
            _take_off(one, record, gone & record.configs.keys())
        structure_changed()
        for library in loaded_libraries():
            library.after_eject(modules)
        if not any(reach(one.model).names for one in walked):
            end_training(modules)
    return model


def _names_to_eject(survey: Survey, name: str | None) -> Set[str]:
    """Return the adapters that go: one, or all that the roots inside have, or all that are there.

    What no root inside has must be whole in this model: it is a part of a root, or a copy of one.
    """
    known = reach(survey.model, survey).names
    check_names(known, [] if name is None else [name], "eject")
    inside = names_at(survey)
    gone = {name} if name is not None else inside or known
    for each in gone - inside:
        whole_adapter(survey, each, "eject")
    return gone


def _check_free(record: Root, gone: Set[str], *, every: bool) -> None:
    """Check that a root can lose adapters now: merged ones only all together."""
    record.selection.check_settled("eject", others=True)
    if not every or not gone >= record.configs.keys():
        check_unmerged(f"ejecting {min(gone)!r}", record.selection)
    if record.before_merge is not None and record.before_merge.untied:
        refuse_untold(record.before_merge.untied, "eject")


def _roots_with(survey: Survey, gone: Set[str]) -> list[_Root]:
    """Return the roots that hold adapters, each once."""
    records = {id(m): (m, record) for each in gone for m, record in records_of(survey, each)}
    return [(survey if m is survey.model else Survey(m), r) for m, r in records.values()]


def _modules_of(
    walked: Iterable[Survey], roots: Iterable[_Root], gone: Set[str]
) -> list[nn.Module]:
    """Return the modules of all models, and those that adapters were put on and that are gone."""
    modules = {id(module): module for one in walked for _, module in one.modules}
    for _, record in roots:
        for name in gone:
            modules |= {id(module): module for module in record.carrying.get(name, ())}
    return list(modules.values())


def _take_off(survey: Survey, record: Root, gone: Set[str]) -> None:
    """Forget adapters in the record of one root, which goes with its last one."""
    for name in gone:
        del record.carrying[name], record.configs[name]
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


def _detach(modules: Iterable[nn.Module], gone: Set[str]) -> None:
    """Remove adapters from modules; one that loses its last gets its own class back."""
    for module in modules:
        if (attached := attached_to(module)) is None:
            continue
        removed = [entry for name in gone for entry in attached.remove(name)]
        for entry in removed:
            for flat in entry.names.values():
                module._parameters.pop(flat, None)
        if removed and not (attached.forward or attached.reads):
            unswap(module)
        elif removed:
            narrow(module)


def _unfreeze(survey: Survey, record: Root) -> None:
    """Restore the flags of base parameters; another root that holds one restores it instead.

    1. A layer gets its own flags back, wherever in the model it was moved to.
    2. Where it was replaced, so does what stands in its place.
    """
    held: dict[int, tuple[Root, Holder]] = {}
    if any(other.selection is record.selection for _, other in known_roots()):
        held = held_in_common(record)
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

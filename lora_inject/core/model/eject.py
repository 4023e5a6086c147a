"""Remove adapters from a model, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TypeVar

from torch import nn

from lora_inject.core.functional.torch_inside import forget_graphs
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.library import end_training, loaded_libraries
from lora_inject.core.layers.selection import Mix
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.swap import narrow, unswap
from lora_inject.core.model.buffers import forget_buffers
from lora_inject.core.model.gradients import unwatch
from lora_inject.core.model.ties import refuse_untold
from lora_inject.core.model.training import give_flags_back
from lora_inject.core.roots.root import (
    ROOT,
    Root,
    alone,
    check_names,
    check_unmerged,
    find_root,
    is_left_over,
)

M = TypeVar("M", bound=nn.Module)


@alone
def eject(model: M, name: str | None = None) -> M:
    """Remove one adapter, or all, from a model.

    Objects, classes, keys, their order, values and `requires_grad` flags are what they were before
    the first inject, also on layers that were replaced since; what it freezes loses its `grad`. So
    are buffers that training has
    moved, such as the statistics of BatchNorm. Ejecting all adapters of a merged model leaves the
    merged weights, and buffers as they are.

    Args:
        model: The root, or a module that holds it.
        name: The adapter; all of them by default.

    Returns:
        The same object.

    Raises:
        StateError: There is no such adapter, or it is merged together with others.
        LayerError: `fully_shard` has sharded it; or a merge has untied what no config says is tied,
            and the model's class may tie again.
    """
    if is_left_over(model):
        modules = [*model.modules()]
        with all_or_nothing(modules):
            _detach(modules, None if name is None else {name})
            if not any(attached_to(module) for module in modules):
                forget_buffers(modules, put_back=True)
        return model
    found = find_root(model, "eject", whole=False)
    if found is None:
        check_names(None, [] if name is None else [name], "eject")
        return model
    module, root = found
    gone = {*root.adapters} if name is None else check_names(root, [name], "eject")
    root.selection.check_settled("eject", others=True)
    if gone != {*root.adapters} or name is not None:
        check_unmerged(f"ejecting {min(gone)!r}", root)
    if root.before_merge is not None and root.before_merge.untied:
        refuse_untold(root.before_merge.untied, "eject")
    survey = Survey(module)
    for library in loaded_libraries():
        library.before_eject(survey, gone)
    carrying = [each for one in gone for each in root.adapters[one].modules]
    modules = [*dict.fromkeys((*(m for _, m in survey.modules), *carrying))]
    merged = bool(root.selection.merged)
    with all_or_nothing(modules, (root, root.selection)):
        _detach(modules, gone)
        _forget(module, root, gone)
        for library in loaded_libraries():
            library.after_eject(modules)
        if not root.adapters:
            end_training(modules)
            forget_buffers(modules, put_back=not merged)
            unwatch(modules)
    return model


def _forget(module: nn.Module, root: Root, gone: Set[str]) -> None:
    """Forget adapters in the record of a root, which goes with its last one."""
    for name in gone:
        del root.adapters[name]
    root.trainable = root.trainable - gone
    root.n_changes += 1
    root.selection.forget(gone)
    setting = root.selection.setting
    left = {name: weight for name, weight in setting.names.items() if name not in gone}
    if left != setting.names or root.selection.merged:
        root.selection.replace(Mix(left))
    if not root.adapters:
        del module.__dict__[ROOT]
        give_flags_back(root)
        forget_graphs()


def _detach(modules: Iterable[nn.Module], gone: Set[str] | None) -> None:
    """Remove adapters, or all, from modules; one that loses its last gets its own class back."""
    for module in modules:
        if (attached := attached_to(module)) is None:
            continue
        names = {entry.adapter for entry in attached.entries()} if gone is None else gone
        removed = [entry for name in names for entry in attached.remove(name)]
        for entry in removed:
            for flat in entry.names.values():
                module._parameters.pop(flat, None)
        if removed and not (attached.forward or attached.reads):
            unswap(module)
        elif removed:
            narrow(module)

"""Training: which adapters of a model do, their tensors, and groups of these for an optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.functional.torch_inside import forget_graphs
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import begin_training, loaded_libraries
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import is_quantized
from lora_inject.core.model.buffers import note_buffers
from lora_inject.core.model.gradients import check_live_inputs, watch
from lora_inject.core.roots.root import (
    Injected,
    Root,
    alone,
    check_names,
    check_unmerged,
    entries,
    find_root,
)
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError, check_type

M = TypeVar("M", bound=nn.Module)
LOG = logging.getLogger("lora_inject")


@alone
def train_only(model: M, names: str | Iterable[str] | None) -> M:
    """Say which adapters require gradients; all others, and the base, do not.

    What it freezes loses its `grad`, which an optimizer that holds it would step by.

    Args:
        model: The model.
        names: One adapter, several, or None for none.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, or the model is merged.
        LayerError: A quantized layer hands no gradient to its input; or the model was wrapped in
            DistributedDataParallel while one of these did not train.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = train_only(net, "sql")
        >>> [key for key, parameter in net.named_parameters() if parameter.requires_grad]
        ['0.lora_A__sql', '0.lora_B__sql']
    """
    listed = [names] if isinstance(names, str) else [] if names is None else names
    check_type("train_only", listed, Iterable, "Give a name, several, or None")
    survey = Injected(model, "train_only")
    wanted = check_names(survey.root, listed, "train_only")
    check_unmerged("train_only", survey.root)
    if wanted:
        paths = (path for path, _, entry in entries(survey) if entry.adapter in wanted)
        check_live_inputs(survey, f"train_only {min(wanted)!r}", paths)
    asked = f"train_only {', '.join(map(repr, sorted(wanted)))}"
    flags = [(p, entry.adapter in wanted) for _, entry, _, p in trainable_tensors(survey)]
    flags += [(parameter, False) for parameter in survey.tensors]
    say_fixed_biases((e.spec for _, _, e in entries(survey) if e.adapter in wanted), asked)
    training = [parameter for parameter, trains in flags if trains]
    for library in loaded_libraries():
        library.before_train(survey, training, asked)
    with all_or_nothing((module for _, module in survey.modules), (survey.root,)):
        note_flags(survey, survey.root)
        changed = any(parameter.requires_grad != trains for parameter, trains in flags)
        for parameter, trains in flags:
            parameter.requires_grad_(trains)
        if wanted:
            begin_training(module for _, module in survey.modules)
            note_buffers(module for _, module in survey.modules)
            watch(module for _, module in survey.modules)
        survey.root.trainable |= wanted
    forget_gradients(parameter for parameter, trains in flags if not trains)
    if changed:
        forget_graphs()
    return model


def say_fixed_biases(specs: Iterable[SiteSpec | None], asked: str) -> None:
    """Log that a bias of B, which PEFT's files may hold, is kept as it is: here none trains."""
    if names := [spec.name for spec in specs if spec is not None and spec.lora_bias]:
        LOG.warning(
            "%s: the biases of B (lora_bias) keep the file's values and do not train, as of %s",
            asked,
            one_line(names),
        )


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of one adapter, or of all.

    Args:
        model: The model.
        name: The adapter. By default all of them, and then the keys begin with `NAME:` where there
            is more than one.

    Returns:
        `SITE.lora_A`, `SITE.lora_B` and the names of trained base tensors, to the Parameters, each
        once: the copy of a tied tensor under its first name. `torch.func` needs the names of
        `model.named_parameters()`. Ask again after `.to()` or sharding: those may put new
        Parameters in place.

    Raises:
        StateError: There is no such adapter.
    """
    found = find_root(model, "adapter_parameters")
    root = None if found is None else found[1]
    check_names(root, [] if name is None else [name], "adapter_parameters of")
    if root is None:
        return {}
    several = name is None and len(root.adapters) > 1
    tensors = trainable_tensors(Injected(model, "adapter_parameters"), name)
    return {f"{entry.adapter}:{key}" if several else key: p for key, entry, _, p in tensors}


def parameter_groups(
    model: nn.Module, lr: float | Mapping[str, float], b_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return optimizer groups over the trainable adapters.

    Args:
        model: The model.
        lr: Learning rate of A and of trained base tensors: one number, or one for each trainable
            adapter by its name.
        b_lr_ratio: Learning rate of B over that of A; 16 is what LoRA+ (arXiv:2402.12354) advises.

    Returns:
        Groups with `params`, `lr` and a `name`, for any torch optimizer: `lora_A`, `lora_B` and
        `lora_T`, or `NAME:lora_A` and so on where `lr` is given by adapter. Empty groups are left
        out.

    Raises:
        StateError: No adapter is trainable, `lr` does not name just those that are, a rate is
            negative or not a number, or the ratio is 0.
        LayerError: A quantized layer hands no gradient to its input.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> [(g["name"], g["lr"]) for g in parameter_groups(net, {"sql": 0.1}, b_lr_ratio=16)]
        [('sql:lora_A', 0.1), ('sql:lora_B', 1.6)]
    """
    survey = Injected(model, "parameter_groups")
    groups = _groups(survey, by_adapter=isinstance(lr, Mapping))
    if not groups:
        problem = "no adapter of the model is trainable"
        raise StateError("parameter_groups", problem, "Call train_only(model, name)")
    paths = modules_that_train(survey)
    check_live_inputs(survey, "parameter_groups", paths, watched=True)
    rates = lr if isinstance(lr, Mapping) else {"": lr}
    _check_rates(rates, b_lr_ratio, {adapter for adapter, _ in groups})
    return [
        {
            "params": parameters,
            "lr": rates[adapter] * (b_lr_ratio if role == "B" else 1.0),
            "name": f"{adapter}:lora_{role}" if adapter else f"lora_{role}",
        }
        for (adapter, role), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _groups(survey: Survey, *, by_adapter: bool) -> dict[tuple[str, str], list[nn.Parameter]]:
    """Return what trains by adapter ("" for all together) and role."""
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for _, entry, role, parameter in trainable_tensors(survey):
        if parameter.requires_grad:
            groups.setdefault((entry.adapter if by_adapter else "", role), []).append(parameter)
    return groups


def _check_rates(rates: Mapping[str, Any], ratio: Any, trainable: set[str]) -> None:
    """Check learning rates by adapter, and the ratio of B's: positive numbers, for each adapter."""
    for rate, what in [(ratio, "b_lr_ratio"), *((rate, "lr") for rate in rates.values())]:
        asked = f"parameter_groups, {what}"
        remedy = "Give a positive number, such as 1e-3"
        check_type(asked, rate, (Real, Tensor), remedy)
        # A rate of 0 is asked for in words; a ratio of 0 would leave B, and so the update, at 0.
        if not (0 < rate < math.inf or (what == "lr" and rate == 0)):
            raise StateError(asked, f"it is {rate}", remedy)
    if wrong := rates.keys() ^ trainable:
        asked = f"parameter_groups, learning rate of {min(wrong)!r}"
        problem = f"the trainable adapters are {sorted(trainable)}"
        raise StateError(asked, problem, "Give one for each of them and no other")


def trainable_tensors(
    survey: Survey, name: str | None = None
) -> Iterator[tuple[str, Entry, str, nn.Parameter]]:
    """Yield `(key, entry, role, Parameter)` of what may train of one adapter, or of all.

    Each Parameter comes once, the copy of a tied tensor under its first name: an optimizer would
    step one that it is given twice twice.
    """
    for library in loaded_libraries():
        library.before_read(survey)
    given: set[nn.Parameter] = set()
    for path, module, entry in entries(survey, name):
        site = path if entry.spec is None else entry.spec.name
        for role, parameter in entry.trainable(module).items():
            if parameter not in given:
                given.add(parameter)
                key = joined(path, entry.param) if role == "T" else f"{site}.lora_{role}"
                yield key, entry, role, parameter


def is_fresh(survey: Survey) -> bool:
    """Return whether nobody trains a base yet: all of it requires gradients, and nothing has one.

    That is how a model is made and loaded. Whoever then takes it for frozen, as after `inject`,
    would train the base beside an adapter that stays as it is, and be told by no error.
    """
    plain = [tensor for tensor in survey.tensors if not is_quantized(tensor)]
    return all(t.requires_grad for t in plain) and all(t.grad is None for t in plain)


def note_flags(survey: Survey, root: Root) -> None:
    """Note which base parameters require a gradient, a tied one at each place, if nobody has yet.

    It is called before the base is frozen: `eject` gives these flags back.
    """
    if root.flags is None:
        held = zip(survey.holders, survey.tensors, strict=True)
        root.flags = [(module, key, tensor.requires_grad) for (_, module, key), tensor in held]


def give_flags_back(root: Root) -> None:
    """Let base parameters require gradients as they did before the first adapter that trained."""
    for module, key, flag in root.flags or ():
        held: Any = module._parameters  # of a scripted module it has no get
        if key not in held:
            continue
        parameter = held[key]
        if parameter is not None and parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None


def modules_that_train(survey: Injected) -> list[str]:
    """Return the names of the modules of the adapters that train."""
    return [path for path, _, entry in entries(survey) if entry.adapter in survey.root.trainable]


def forget_gradients(frozen: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of parameters that were frozen.

    An optimizer steps whatever has a gradient, whether or not it requires one.
    """
    for parameter in frozen:
        parameter.grad = None

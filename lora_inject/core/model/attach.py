"""Put an adapter onto a model, all or nothing. Injecting and loading both do it here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.class_swap import swap
from lora_inject.core.layers.kinds import mixin_of
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.packed_weights import begin_training
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.starting import moved
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.trainable import forget_gradients
from lora_inject.core.roots.carried import Root, lock_of, reach, structure_changed
from lora_inject.core.roots.roots import become_root, check_new_adapter, records_with, selection_for
from lora_inject.core.roots.several_roots import check_free_name, check_mixable, training_in


def survey_for(model: nn.Module, name: str) -> Survey:
    """Return a survey of a model that can take a new adapter of that name now."""
    survey = Survey(model)
    asked = f"adapter {name!r}"
    for library in loaded_libraries():
        library.before_attach(survey, asked)
    check_new_adapter(survey, name)
    return survey


def attach(
    survey: Survey,
    name: str,
    wanted: Sequence[Carried],
    tensors: Callable[[Carried], Mapping[str, Tensor]],
    tied: Callable[[Carried], Hashable],
    config: Mapping[str, Any] | None,
    *,
    activate: bool | None = True,
    train: bool = True,
    last: Callable[[], None] = lambda: None,
) -> None:
    """Put a new adapter onto a model, all or nothing, at the places that `places` returned.

    Another thread may have changed the model since; none does now.

    1. The Parameters are made: `tensors` gives those of a place by role. Trained copies for which
       `tied` is equal are one Parameter.
    2. The model becomes the adapter's root; its base is frozen. With `train` the adapter becomes
       the only one that trains, of all models that share its selection.
    3. Each module is swapped, and gets its Parameters.
    4. With `activate` the adapter takes part: alone if it trains, else beside what is active. With
       None it does if no other of this model is active.
    5. `last` may refuse it all.
    """
    with lock_of(survey.model):
        check_free_name(survey, name)
        parameters = _parameters(wanted, tensors, tied, train=train)
        selection = selection_for(survey, wanted, f"adapter {name!r}")
        active = reach(survey.model, survey).names & selection.setting.names.keys()
        takes_part = not active if activate is None else activate
        if not takes_part and name in selection.setting.names:
            check_mixable(wanted, selection.setting.names)
        modules = [module for _, module in survey.modules]
        records = records_with(selection)
        with all_or_nothing(modules, (selection, *records), _may_train(survey, records)) as trained:
            root = become_root(survey, selection)
            root.configs[name] = config
            root.carrying[name] = list(
                {id(place.module): place.module for place in wanted}.values()
            )
            _freeze(survey, root)
            if train:
                _stop_training(trained, records)
                root.trainable = {name}
            selection.add((name,))
            _put_all(wanted, parameters, selection)
            structure_changed()
            for library in loaded_libraries():
                library.after_attach(modules, root.carrying[name])
            if train:
                begin_training(modules)
            if takes_part:
                beside = {} if train else selection.setting.names
                selection.replace(Mix({**beside, name: 1.0}))
            for library in loaded_libraries():
                library.after_load(survey, name)
            last()
        forget_gradients(survey.tensors)
        forget_gradients(trained if train else ())


def _parameters(
    wanted: Sequence[Carried],
    tensors: Callable[[Carried], Mapping[str, Tensor]],
    tied: Callable[[Carried], Hashable],
    *,
    train: bool,
) -> list[dict[str, nn.Parameter]]:
    """Return the new Parameters of each place by role; those of tied copies are the same."""
    made: dict[Hashable, dict[str, nn.Parameter]] = {}
    keys = [tied(place) if place.entry.spec is None else id(place) for place in wanted]
    with torch.inference_mode(False):  # tensors that are made in it could not train
        for key, place in zip(keys, wanted, strict=True):
            if not made.get(key):
                made[key] = {
                    role: nn.Parameter(tensor, train and place.entry.trains(role))
                    for role, tensor in tensors(place).items()
                }
    return [made[key] for key in keys]


def _may_train(survey: Survey, records: Sequence[Root]) -> Iterator[nn.Parameter]:
    """Yield what may require a gradient now: the base, and the adapters that records say train."""
    yield from survey.tensors
    if records:
        yield from training_in(records)


def _stop_training(trained: Iterable[nn.Parameter], records: Iterable[Root]) -> None:
    """Let nothing train that did."""
    for parameter in trained:
        parameter.requires_grad_(False)
    for record in records:
        record.trainable = set()


def _put_all(
    wanted: Iterable[Carried],
    parameters: Sequence[Mapping[str, nn.Parameter]],
    selection: Selection,
) -> None:
    """Put each entry on its module."""
    for place, held in zip(wanted, parameters, strict=True):
        _put(place, held, selection)
    for device in {tensor.device for held in parameters for tensor in held.values()}:
        selection.extend_to(device)


def _put(place: Carried, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
    """Swap the class of a module if it has none of ours yet, and add an entry to it."""
    entry, module = place.entry, place.module
    reads = () if entry.on_output else (entry.param,)
    attached = swap(module, selection, mixin_of(entry), reads)
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
    attached.add(entry)
    if next(iter(parameters.values())).is_meta:
        moved(module, emptied=False)


def _freeze(survey: Survey, root: Root) -> None:
    """Freeze every base parameter and remember which ones were not, by all names of a tied one."""
    held = zip(survey.holders, survey.tensors, strict=True)
    unfrozen = [(holder, tensor) for holder, tensor in held if tensor.requires_grad]
    for holder, tensor in unfrozen:
        root.required_grad[holder.name] = holder
        tensor.requires_grad_(False)

"""Put an adapter onto a model, all or nothing: inject, load, install and reserve end here.

`put_config` (`model.inject`) puts on what a config asks for, `put_state` what a value holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.layers.adapted import WeightUpdate
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.library import begin_training, loaded_libraries
from lora_inject.core.layers.selection import Mix, Selection
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.layers.swap import swap
from lora_inject.core.model.buffers import note_buffers
from lora_inject.core.model.gradients import watch
from lora_inject.core.model.places import places
from lora_inject.core.model.training import forget_gradients, is_fresh, note_flags
from lora_inject.core.roots.root import (
    ROOT,
    Adapter,
    Root,
    become_root,
    check_new_adapter,
    lock_of,
)
from lora_inject.core.spec.names import joined

Values = Callable[[Carried], Mapping[str, Tensor]]
"""Gives the tensors of an entry by role; two entries that are one trained copy get the same."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Run the body, or a function, while Python does not look for garbage among its objects.

    A verb makes dozens of small objects for each site and keeps them. To look through all of them
    again and again took half as long as the rest of `inject` on 20,000 sites.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def survey_for(model: nn.Module) -> Survey:
    """Return a survey of a model that is to get a new adapter."""
    survey = Survey(model)
    for library in loaded_libraries():
        library.before_read(survey)
    return survey


def check_takes_adapter(survey: Survey, name: str, *, trains: bool) -> None:
    """Raise if a model can take no new adapter of that name now."""
    for library in loaded_libraries():
        library.before_attach(survey, f"adapter {name!r}", trains=trains)
    check_new_adapter(survey, name)


def put(
    survey: Survey,
    name: str,
    wanted: Sequence[Carried],
    values: Values,
    config: Mapping[str, Any] | None,
    *,
    train: bool = True,
    alone: bool = True,
    last: Callable[[], None] = lambda: None,
) -> Adapter:
    """Put a new adapter onto a model at the places that `places` returned; return its record.

    Another thread may have changed the model since; none does now.

    1. The model becomes the adapter's root.
    2. Each module is swapped, and gets its Parameters.
    3. An adapter that trains freezes the base. If it is `alone`, it becomes the only one that is
       active and trains; else it changes neither for the others.
    4. An adapter that does not train becomes active if no other is. It changes no flag and no
       gradient of what somebody trains; a base that nobody trains is frozen.
    5. `last` may refuse it all.
    """
    with lock_of(survey.model):
        check_new_adapter(survey, name, wanted)
        for library in loaded_libraries():
            library.before_load(survey, name, wanted)
        parameters = _parameters(wanted, values, train=train)
        modules = [module for _, module in survey.modules]
        before: Root | None = survey.model.__dict__.get(ROOT)
        kept = () if before is None else (before, before.selection)
        freezes = train or (before is None and is_fresh(survey))
        may_change = _may_train(survey, before if train and alone else None) if freezes else ()
        with all_or_nothing(modules, kept, may_change) as trained:
            root = become_root(survey.model)
            gained = any(map(attrgetter("entry.gained"), wanted))
            carrying = {id(place.module): place.module for place in wanted}
            adapter = Adapter(name, config, [*carrying.values()], gained)
            root.adapters[name] = adapter
            root.n_changes += 1
            root.seen = 0
            if freezes:
                note_flags(survey, root)
            for parameter in trained:
                parameter.requires_grad_(False)
            if train and alone:
                root.trainable = set()
            root.selection.add((name,))
            _put_all(wanted, parameters, root.selection)
            if train:
                root.trainable |= {name}
                begin_training(modules)
                note_buffers(modules)
            if alone if train else not root.selection.setting.names:
                root.selection.replace(Mix({name: 1.0}))
            for library in loaded_libraries():
                library.after_load(survey, name)
            last()
            if train:
                watch(modules)
        if freezes:
            forget_gradients((*survey.tensors, *trained))
    return adapter


def _parameters(
    wanted: Iterable[Carried], values: Values, *, train: bool
) -> list[dict[str, nn.Parameter]]:
    """Return the new Parameters of each place by role; those of tied copies are the same."""
    listed = []
    copies: dict[Tensor, dict[str, nn.Parameter]] = {}
    # Tensors that are made in inference mode could not train.
    with torch.inference_mode(False), torch.no_grad():
        for place in wanted:
            tensors = values(place)
            made = copies.get(tensors["T"]) if "T" in tensors else None
            if made is None:
                made = {
                    role: nn.Parameter(tensor, train and place.entry.trains(role))
                    for role, tensor in tensors.items()
                }
            if "T" in tensors:
                copies[tensors["T"]] = made
            listed.append(made)
    return listed


def _may_train(survey: Survey, root: Root | None) -> Iterator[nn.Parameter]:
    """Yield what may require a gradient now: the base, and the adapters that the root says train.

    To ask every tensor of every adapter would be quadratic in a model that collects adapters.
    """
    yield from survey.tensors
    for adapter in [] if root is None else [root.adapters[name] for name in root.trainable]:
        for module in adapter.modules:
            attached = attached_to(module)
            for entry in () if attached is None else attached.entries(adapter.name):
                yield from entry.trainable(module).values()


def _put_all(
    wanted: Iterable[Carried],
    parameters: Sequence[Mapping[str, nn.Parameter]],
    selection: Selection,
) -> None:
    """Swap the class of each module that has none of ours yet, and add its entry to it."""
    for place, held in zip(wanted, parameters, strict=True):
        entry, module = place.entry, place.module
        if entry.on_output:
            attached = swap(module, selection, KINDS[entry.spec.kind], ())  # type: ignore[union-attr]
        else:
            attached = swap(module, selection, WeightUpdate, (entry.param,))
        for role, flat in entry.names.items():
            module._parameters[flat] = held[role]
        attached.add(entry)
    for device in {tensor.device for held in parameters for tensor in held.values()}:
        selection.extend_to(device)


# A value -------------------------------------------------------------------------------------


def put_state(
    survey: Survey,
    state: AdapterState,
    name: str,
    *,
    owned: bool = False,
    trainable: bool = False,
) -> Adapter:
    """Put a fitted adapter on; it becomes active if it trains, or no other is active.

    Of an `owned` value, which nobody else holds, the tensors are taken as they are: a load takes
    half as long as with a copy of each.
    """
    specs = [site.spec for site in state.sites.values()]
    wanted = places(survey, name, specs, {key: state.rows.get(key) for key in state.trained})
    for place in wanted:
        place.entry.layers = state.layers
    tensors = _by_name(state)
    copies: dict[Tensor, Tensor] = {}  # one that stands under several names is one
    taken: set[int] = set()

    def held(tensor: Tensor, weight: Tensor) -> Tensor:
        address = tensor.data_ptr()
        as_it_is = owned and address not in taken and _is_as_trained(tensor, weight)
        taken.add(address)
        if as_it_is:
            return tensor
        dtype = master_dtype(weight.dtype)
        copied = tensor.detach().to(device=weight.device, dtype=dtype, copy=True)
        return copied.contiguous()

    def given(place: Carried) -> Mapping[str, Tensor]:
        mine, weight = tensors[place.name], place.weight
        if "T" not in place.entry.names:
            return {role: held(mine[role], weight) for role in place.entry.names}
        if mine["T"] not in copies:
            copies[mine["T"]] = held(mine["T"], weight)
        return {"T": copies[mine["T"]]}

    return put(survey, name, wanted, given, state.config, train=trainable)


def _is_as_trained(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor over a weight is as those of training, with memory of its own."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    fits = tensor.dtype == master_dtype(weight.dtype) and tensor.device == weight.device
    # Of inference mode it could not train; with other strides it computes other bits.
    return alone and fits and not tensor.is_inference() and tensor.is_contiguous()


def _by_name(state: AdapterState) -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of each entry by role, under the name of its site or base tensor."""
    tensors: dict[str, Mapping[str, Tensor]] = {n: site.tensors for n, site in state.sites.items()}
    biased = [name for name, site in state.sites.items() if site.spec.lora_bias]
    tensors |= {joined(name, "bias"): tensors[name] for name in biased}
    return tensors | {key: {"T": tensor} for key, tensor in state.trained.items()}

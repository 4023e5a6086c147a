"""Loading: an adapter from files onto a live model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from os import PathLike
from os.path import lexists
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.attach import attach, survey_for
from lora_inject.core.model.base import Base
from lora_inject.core.model.fit_state import Part, fit
from lora_inject.core.model.places import places
from lora_inject.core.model.stages import put_on_by_all
from lora_inject.core.model.trainable import check_live_inputs
from lora_inject.core.roots.carried import note_files
from lora_inject.core.spec.names import joined
from lora_inject.errors import user_path
from lora_inject.formats.exchange import detected, read_adapter
from lora_inject.formats.hub import on_disk
from lora_inject.formats.live_models import facts_about, refuse_first_places

M = TypeVar("M", bound=nn.Module)


def load_adapter(
    model: M,
    path: str | PathLike[str],
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    leave_new: bool = False,
    trainable: bool = False,
    format: str | None = None,  # noqa: A002
    revision: str | None = None,
    group: Any = None,
    **options: Any,
) -> M:
    """Read an adapter from files or from the hub, and put it onto a model, all of it or nothing.

    It becomes active only where no adapter of the model is active, and it is not trainable until
    `train_only(model, name)` says so; with `trainable` it becomes the only active and the only
    trainable one, as after `inject`. After `fully_shard` every process must call it, and the
    adapter is sharded with its layers.

    Args:
        model: The model that it was made for.
        path: What `save_adapter` or another program wrote, or `user/name` on the Hugging Face hub
            if there is no such path. Only safetensors and the config are downloaded.
        name: Its name on this model.
        leave_out: Patterns (as in a config) of trained tensors and sites to let go, or of modules
            around them, for instance a head of another task. Each must match something.
        base: `same`: the base must be the one that the adapter was made on, as far as its
            fingerprint tells, in whatever dtype, or quantized in the same way. `quantized`: what
            cannot be compared is let through, as of a base that is quantized only here, or was only
            where the adapter was made. `any`: no comparison. Tensors that the adapter does not
            touch are compared as well: an MLP, or a head that it does not hold.
        leave_new: Let weights differ that no checkpoint of this model had: a new head or pooler,
            which nothing uses.
        trainable: Go on training it: make it the only active and the only trainable adapter.
        format: A row of `formats.FORMATS`; by default it is detected from the files.
        revision: Branch, tag or commit of a repository; by default the head of its main branch.
        group: Processes of which each has other layers of the model; see `inject`. Each takes what
            it has layers for. All raise, or none.
        **options: For the format.

    Returns:
        The same object.

    Raises:
        FormatError: Files that are incomplete or unsafe, tensors that do not fit the model, or
            another base. Nothing was changed.
        StateError: The name is in use, or the model is merged.
        LayerError: It is to be `trainable`, and a quantized layer hands no gradient to its input.
    """
    place = user_path("load adapter", path)
    asked = f"load {str(path)!r}"
    fit_to = partial(fit, leave_out=leave_out, base=base, leave_new=leave_new, asked=asked)

    def fitted(part: Part | None = None) -> tuple[Survey, Path, AdapterState]:
        survey = survey_for(model, name)
        if trainable:
            check_live_inputs(survey, asked)
        files = place
        if revision is not None or not lexists(place):
            files = on_disk(place, path, revision, asked)
        format_name = format or detected(files)
        state = read_adapter(files, format_name, facts=lambda: facts_about(survey), **options)
        here = fit_to(survey, state, part=part)
        if format_name == "peft" and state.fingerprint is None:  # PEFT made it
            refuse_first_places(survey, (site.spec for site in here.sites.values()), asked)
        return survey, files, here

    def put_on(
        survey: Survey, files: Path, state: AdapterState, last: Callable[[], None] = lambda: None
    ) -> None:
        put_on_model(survey, state, name, _Owned(), trainable=trainable, last=last)
        note_files(survey, name, files)

    if group is not None:
        put_on_by_all(group, asked, fitted, put_on)
    else:
        put_on(*fitted())
    return model


def put_on_model(
    survey: Survey,
    state: AdapterState,
    name: str,
    taken: Callable[[Tensor, Tensor], Tensor],
    *,
    trainable: bool = False,
    last: Callable[[], None] = lambda: None,
) -> None:
    """Put a fitted adapter on; it becomes active if it trains, or no other is active on this model.

    A model that shares layers with it may have active ones: these stay so.
    """
    specs = [site.spec for site in state.sites.values()]
    wanted = places(survey, name, specs, {key: state.rows.get(key) for key in state.trained})
    tensors = _by_name(state)

    def given(place: Carried) -> Mapping[str, Tensor]:
        mine, weight = tensors[place.name], place.weight
        return {role: taken(mine[role], weight) for role in place.entry.names}

    def tied(place: Carried) -> Hashable:
        return id(tensors[place.name][next(iter(place.entry.names))])

    for library in loaded_libraries():
        library.before_load(survey, name, wanted, tied)
    put = partial(attach, survey, name, wanted, given, tied, state.config, last=last)
    put(activate=trainable or None, train=trainable)


def _by_name(state: AdapterState) -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of each entry by role, under the name of its site or base tensor."""
    tensors: dict[str, Mapping[str, Tensor]] = {n: site.tensors for n, site in state.sites.items()}
    biased = [name for name, site in state.sites.items() if site.spec.lora_bias]
    tensors |= {joined(name, "bias"): tensors[name] for name in biased}
    return tensors | {key: {"T": tensor} for key, tensor in state.trained.items()}


def copied(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor as an adapter over `weight` holds it, in memory of its own."""
    dtype = master_dtype(weight.dtype)
    return tensor.detach().to(device=weight.device, dtype=dtype, copy=True).contiguous()


class _Owned:
    """Takes tensors that nobody else holds as they are, unless two of them share memory.

    A load takes half as long as with a copy of each tensor.
    """

    def __init__(self) -> None:
        self.taken: set[int] = set()

    def __call__(self, tensor: Tensor, weight: Tensor) -> Tensor:
        address = tensor.data_ptr()
        alone = address not in self.taken and tensor.untyped_storage().nbytes() == tensor.nbytes
        self.taken.add(address)
        fits = tensor.dtype == master_dtype(weight.dtype) and tensor.device == weight.device
        fits = fits and not tensor.is_inference()  # which could not train
        fits = fits and tensor.is_contiguous()  # as those of training: other strides, other bits
        return tensor if alone and fits else copied(tensor, weight)

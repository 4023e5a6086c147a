"""Loading: an adapter from files, or as a value, onto a live model."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from os.path import lexists
from typing import Any, TypeVar

from torch import nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.model.base import Base
from lora_inject.core.model.fit_state import fit
from lora_inject.core.model.gradients import check_live_inputs
from lora_inject.core.model.put import check_takes_adapter, put_state, survey_for, uncollected
from lora_inject.core.model.training import say_fixed_biases
from lora_inject.core.spec.names import parent
from lora_inject.errors import check_type, user_path, within
from lora_inject.formats.exchange import read_adapter
from lora_inject.formats.hub import on_disk
from lora_inject.formats.live_models import facts_about

M = TypeVar("M", bound=nn.Module)


@uncollected()
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
    **options: Any,
) -> M:
    """Read an adapter from files or from the hub, and put it onto a model, all of it or nothing.

    It becomes active only where no adapter of the model is active, and it is not trainable until
    `train_only(model, name)` says so: what you train meanwhile keeps its `requires_grad` and its
    `grad`, and a base that nobody trains yet is frozen. With `trainable` it becomes the only active
    and the only trainable one, and the base is frozen, as after `inject`. After `fully_shard` every
    process must call it, and the adapter is sharded with its layers.

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
        **options: For the format.

    Returns:
        The same object.

    Raises:
        FormatError: Files that are incomplete or unsafe, tensors that do not fit the model, or
            another base. Nothing was changed.
        StateError: The name is in use, or the model is merged.
        LayerError: It is to be `trainable`, and a quantized layer hands no gradient to its input.
    """
    asked = f"load {str(path)!r}"
    survey = survey_for(model)
    check_takes_adapter(survey, name, trains=trainable)
    files = user_path("load adapter", path)
    if revision is not None or not lexists(files):
        files = on_disk(files, path, revision, asked)
    state = read_adapter(files, format, facts=lambda: facts_about(survey), **options)
    fitted = fit(survey, state, leave_out, base, leave_new=leave_new, asked=asked)
    if trainable:
        names = (*(site.spec.weight for site in fitted.sites.values()), *fitted.trained)
        check_live_inputs(survey, asked, map(parent, names))
        say_fixed_biases((site.spec for site in fitted.sites.values()), asked)
    adapter = put_state(survey, fitted, name, owned=True, trainable=trainable)
    adapter.files = files.absolute()
    return model


@uncollected()
def install(
    model: M,
    state: AdapterState,
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    leave_new: bool = False,
) -> M:
    """Put an adapter, as a value, onto a model; see `load_adapter`.

    Args:
        model: The model.
        state: The adapter; its tensors are copied.
        name: Its name on this model.
        leave_out: Patterns of trained tensors and sites to let go.
        base: How sure to be of the base.
        leave_new: Whether weights may differ that no checkpoint of this model had.

    Returns:
        The same object.

    Raises:
        FormatError: It does not fit the model. Nothing was changed.
        StateError: The name is in use, or the model is merged.
    """
    check_type("install", state, AdapterState, "Give an AdapterState; load_adapter reads files")
    with within("install"):
        state.check_tensors()
    survey = survey_for(model)
    check_takes_adapter(survey, name, trains=False)
    fitted = fit(survey, state, leave_out, base, leave_new=leave_new, asked="install")
    put_state(survey, fitted, name)
    return model

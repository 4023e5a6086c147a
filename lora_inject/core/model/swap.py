"""New values into an adapter that is on a model, in place.

Whoever serves many adapters of one shape, or takes one from a training run every few minutes,
writes the next one's values into the Parameters that are there. All checks come before the first
write.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence, Set
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.starting import copy_into
from lora_inject.core.model.base import Base
from lora_inject.core.model.fit_state import fit
from lora_inject.core.model.read_off import values_on
from lora_inject.core.model.slots import placed
from lora_inject.core.roots.root import Injected, adapted_modules, alone, check_unmerged, entries
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.sites import meaning
from lora_inject.errors import FormatError, LayerError, within
from lora_inject.formats.exchange import read_adapter
from lora_inject.formats.hub import located
from lora_inject.formats.live_models import facts_about

M = TypeVar("M", bound=nn.Module)
PLAIN = (nn.Parameter, Tensor)

_BESIDE = "Load it under another name and activate that"
_SLOT = ", or swap it into what reserve(model, name, rank=...) has made"


@alone
def swap_adapter(
    model: M,
    source: AdapterState | str | PathLike[str],
    name: str = "default",
    *,
    base: Base = "same",
    format: str | None = None,  # noqa: A002 - the word that users look for
    **options: Any,
) -> M:
    """Write another adapter's values into one that is on the model, all of them or none.

    Where the model is sharded, every process must call it with the same values, and writes its
    part. The Parameters stay the objects they are, so optimizers keep hold of them and a compiled
    model is not compiled again. What the slot is stays, too: whether it is active and trainable,
    its dropout, its init, its `compute`, and which experts it has. What `reserve` has made takes
    other ranks, scales and fewer sites. Gradients and the optimizer's moments are not touched.
    A backward through a checkpoint whose forward ran before is a StateError, as it would compute
    with the new values. A forward that runs on another thread meanwhile may compute with both.

    Args:
        model: The root, or a module that holds it.
        source: The adapter as a value, or the path of its files, or `user/name` on the hub.
        name: The adapter on the model whose values are replaced.
        base: How sure to be of the base; see `load_adapter`.
        format: For files: a row of `formats.FORMATS`; by default it is detected from the files.
        **options: For the format.

    Returns:
        The same object.

    Raises:
        FormatError: The two adapters differ in a site, a rank, a scale, slices or trained tensors,
            or it was made on another base. Nothing was changed.
        StateError: There is no such adapter, or the model is merged.
        LayerError: The slot is on the meta device.

    Examples:
        >>> from lora_inject.core.model.read_off import adapter_state
        >>> from lora_inject.core.model.inject import inject
        >>> from lora_inject.core.model.training import adapter_parameters
        >>> net = nn.Sequential(nn.Linear(4, 6))
        >>> for name in ("slot", "next"):
        ...     _ = inject(net, {"rank": 2, "targets": ["0"]}, name)
        >>> A = adapter_parameters(net, "slot")["0.lora_A"]
        >>> _ = swap_adapter(net, adapter_state(net, "next"), "slot")
        >>> torch.equal(A, adapter_parameters(net, "next")["0.lora_A"])
        True
    """
    asked = f"swap adapter {name!r}"
    survey = Injected(model, asked)
    slot, _ = values_on(survey, name, asked)
    adapter = survey.root.adapters[name]
    check_unmerged(asked, survey.root)
    state, whose, files = source, asked, None
    if isinstance(state, AdapterState):
        with within(asked):
            state.check_tensors()
    else:
        files, whose = located(state, asked), f"{asked} for {str(source)!r}"
        state = read_adapter(files, format, facts=lambda: facts_about(survey), **options)
    state = fit(survey, state, (), base, leave_new=False, asked=whose)
    _check_same("site", slot.sites.keys(), state.sites.keys(), asked, fewer=adapter.is_slot)
    if adapter.is_slot:
        with within(asked):
            pairs = placed(slot, state)
    else:
        pairs = [*_paired(slot, state, asked)]
    _check_fit(pairs, asked)
    survey.root.selection.note(name)
    _write(survey, name, [tensor for tensor, _ in pairs], [value for _, value in pairs])
    for _, _, entry in entries(survey, name):
        entry.layers = state.layers
    adapter.config, adapter.files = state.config, None if files is None else files.absolute()
    return model


def _write(survey: Injected, name: str, into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write all values into an adapter's Parameters, or none of them."""
    if not all(type(tensor) in PLAIN for tensor in into):
        before = [parameter.detach().clone() for parameter in into]
        try:
            copy_into(into, values)
        except BaseException:
            copy_into(into, before)
            raise
    else:
        # One call of torch, which nothing interrupts, and in which nothing asks for memory.
        alike = [v.to(tensor) for tensor, v in zip(into, values, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_([*into], alike)
    for _, _, attached in adapted_modules(survey):
        if attached.garbage:  # a new attribute would have a compiled graph made again
            attached.garbage -= {entry.mark for entry in attached.entries(name)}


def _paired(slot: AdapterState, state: AdapterState, asked: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the slot's tensors, each with its new value."""
    _check_same("trained tensor", slot.trained.keys(), state.trained.keys(), asked)
    first: dict[int, Tensor] = {}  # the copy of a tied tensor has several names
    for name, parameter in slot.trained.items():
        value = state.trained[name]
        problem = ""
        if state.rows.get(name) != slot.rows.get(name):
            problem = "it holds other rows than the adapter on the model"
        elif first.setdefault(id(parameter), value) is not value:
            problem = "it has another value than under its other name, and both are one copy here"
        if problem:
            raise FormatError(f"{asked}, trained tensor {name!r}", problem, _BESIDE)
        yield parameter, value
    for key, held in slot.sites.items():
        new = state.sites[key]
        _check_alike(new, held, asked)
        yield from ((tensor, new.tensors[role]) for role, tensor in held.tensors.items())


def _check_same(
    what: str, here: Set[str], there: Set[str], asked: str, *, fewer: bool = False
) -> None:
    """Check that the adapter to be swapped in, `there`, has what the slot has, and no more."""
    for name in sorted(there - here if fewer else here ^ there)[:1]:
        problem = "the adapter on the model has it, and the one to be swapped in has not"
        if name in there:
            close = ", ".join(map(repr, nearest(name, here))) or "none"
            problem = f"the adapter on the model has no such {what} (nearest: {close})"
        raise FormatError(f"{asked}, {what} {name!r}", problem, _BESIDE)


def _check_alike(site: SiteState, held: SiteState, asked: str) -> None:
    """Check that a site is the slot's in all that values alone cannot change."""
    new, old = site.spec, held.spec
    remedy = _BESIDE
    if (new.variant, new.lora_bias) != (old.variant, old.lora_bias):
        kinds = [s.variant + " with lora_bias" * s.lora_bias for s in (new, old)]
        problem = f"its variant is {kinds[0]}, and {kinds[1]} on the model"
    elif site.tensors.keys() != held.tensors.keys():
        problem = "one of the two adapters starts from W (pissa, olora), and the other does not"
    elif new.rank != old.rank:
        problem = f"its rank is {new.rank}, and {old.rank} on the model"
        remedy += _SLOT
    elif not math.isclose(new.scale, old.scale):
        problem = f"its scale is {new.scale:g}, and {old.scale:g} on the model"
        remedy += _SLOT
    elif meaning(new) != meaning(old):
        problem = "it adapts other parts of the weight than the one on the model"
    else:
        return
    raise FormatError(f"{asked}, site {old.name!r}", problem, remedy)


def _check_fit(pairs: Collection[tuple[Tensor, Tensor]], asked: str) -> None:
    """Check that a copy cannot fail halfway."""
    if any(value.is_meta for _, value in pairs):
        raise FormatError(asked, "its tensors are on the meta device", "Load their values first")
    for parameter, value in pairs:
        # Some shards are plain Parameters of another shape, found below.
        known = type(parameter) in PLAIN or hasattr(parameter, "full_tensor")
        if not known or parameter.is_meta:
            raise LayerError(
                asked,
                "the adapter on the model is on the meta device, or its tensors have an unknown "
                "class",
                "Swap after the model has values",
            )
        plain = type(value) in PLAIN and type(parameter) in PLAIN and value.numel() > 0
        if plain and value.data_ptr() == parameter.data_ptr():
            problem = "its tensors are those of the adapter on the model, whose values they have"
            remedy = "To come back to values keep a copy: copy.deepcopy(adapter_state(model, name))"
            raise FormatError(asked, problem, remedy)
        if value.shape != parameter.shape:
            shapes = tuple(value.shape), tuple(parameter.shape)
            problem = "a tensor has shape {}, and {} on the model".format(*shapes)
            raise FormatError(asked, problem, "Swap in an adapter that was made for this model")

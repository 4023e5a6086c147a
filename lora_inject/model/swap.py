"""New values into an adapter that is on a model, in place.

An adapter on a model is a slot for values. Whoever serves many adapters of one shape, or
takes one from a training run every few minutes, writes the next one's values into the Parameters
that are there: nothing is mounted, no Parameter is replaced, no optimizer loses what it holds, and
a compiled model is not compiled again. Every check comes before the first write.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.adapter.state import AdapterState, Fingerprint, SiteState
from lora_inject.errors import FormatError, LayerError, nearest
from lora_inject.formats import read_adapter
from lora_inject.layers.attached import Entry
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import Root, reach, records_of, refuse_merged, whole_adapter
from lora_inject.model.fit_state import Base, check_base, check_base_copies
from lora_inject.model.save import base_weights, fingerprint
from lora_inject.spec.names import joined
from lora_inject.spec.sites import SiteSpec

M = TypeVar("M", bound=nn.Module)
_Place = tuple[str, nn.Module, Entry]

_BESIDE = "Load it under another name and activate that"


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

    The Parameters stay the objects they are, so optimizers keep hold of them and a compiled model
    is not compiled again. What the slot is stays, too: whether it is active and trainable, its
    dropout, its init and its `compute`. Gradients and the optimizer's moments are not touched.

    Args:
        model: The root, or any module that holds roots.
        source: The adapter as a value, or the path of its files.
        name: The adapter on the model whose values are replaced.
        base: How sure to be of the base; see `load_adapter`. The base is sampled once and again
            after one of its weights was replaced or written.
        format: For files: a row of `formats.FORMATS`; by default it is told from the files.
        **options: For the format.

    Returns:
        The same object.

    Raises:
        FormatError: The two adapters differ in a site, a rank, a scale, slices or trained tensors,
            or it was made on another base. Nothing was changed.
        StateError: There is no such adapter, or the model is merged.
        LayerError: The slot is sharded or on the meta device.

    Examples:
        >>> from lora_inject.model.save import adapter_state
        >>> from lora_inject.model.inject import inject
        >>> from lora_inject.model.train import adapter_parameters
        >>> net = nn.Sequential(nn.Linear(4, 6))
        >>> for name in ("slot", "next"):
        ...     _ = inject(net, {"rank": 2, "targets": ["0"]}, name)
        >>> A = adapter_parameters(net, "slot")["0.lora_A"]
        >>> _ = swap_adapter(net, adapter_state(net, "next"), "slot")
        >>> torch.equal(A, adapter_parameters(net, "next")["0.lora_A"])
        True
    """
    asked = f"swap adapter {name!r}"
    survey = Survey(model)
    slot = whole_adapter(survey, name, "swap_adapter of")
    for selection in reach(model, survey).selections:
        refuse_merged(selection, asked)
    state = source if isinstance(source, AdapterState) else read_adapter(source, format, **options)
    into, values, weights = _paired(slot, state, asked)
    roots = [record for _, record in records_of(survey, name)]
    if state.fingerprint is not None and base != "any":
        check_base(state.fingerprint, _sampled(weights, roots[0]), base, asked)
    if state.base_copies:
        check_base_copies(state, base_weights(survey), asked)
    with torch.no_grad():
        torch._foreach_copy_(into, values)
    for root in roots:
        if name in root.configs:
            root.configs[name] = state.config
    return model


def _paired(
    slot: list[_Place], state: AdapterState, asked: str
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Return the slot's Parameters, their new values, and the frozen weights of its sites.

    The weights have the names that the state knows them by.
    """
    into: list[Tensor] = []
    values: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    n_sites = 0
    for _, module, entry in slot:
        spec = entry.spec
        if spec is None:
            continue
        site = state.sites.get(spec.name) or _by_alias(spec, state, asked)
        new, names, parameters = site.spec, entry.names, module._parameters
        if new.form != spec.form or (site.A0 is None) == ("A0" in names):
            _check_alike(site, spec, names, asked)
        into += (parameters[names["A"]], parameters[names["B"]])  # type: ignore[arg-type]
        values += (site.A, site.B)
        if site.A0 is not None and site.B0 is not None:
            into += (parameters[names["A0"]], parameters[names["B0"]])  # type: ignore[arg-type]
            values += (site.A0, site.B0)
        weights[new.weight] = parameters[entry.param]  # type: ignore[assignment]
        n_sites += 1
    if n_sites < len(state.sites):
        known = {n for *_, e in slot if e.spec for n in (e.spec.name, *e.spec.aliases)}
        _check_none_left("site", state.sites.keys() - known, known, asked)
    for parameter, value in _trained(slot, state, asked):
        into.append(parameter)
        values.append(value)
    _check_fit(into, values, asked)
    return into, values, weights


def _by_alias(spec: SiteSpec, state: AdapterState, asked: str) -> SiteState:
    """Return the state's site of a module that has several names."""
    for alias in spec.aliases:
        if alias in state.sites:
            return state.sites[alias]
    raise _lacks("site", spec.name, asked)


def _trained(
    slot: list[_Place], state: AdapterState, asked: str
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the slot's full copies and their new values; one of a tied tensor has several names."""
    copies = {
        joined(path, entry.param): module._parameters[entry.names["T"]]
        for path, module, entry in slot
        if entry.spec is None
    }
    _check_none_left("trained tensor", state.trained.keys() - copies.keys(), copies, asked)
    first: dict[int, Tensor] = {}
    for name, parameter in copies.items():
        value = state.trained.get(name)
        if value is None or parameter is None:
            raise _lacks("trained tensor", name, asked)
        if id(parameter) not in first:
            yield parameter, value
        elif not torch.equal(value, first[id(parameter)]):
            found = "it has another value than under its other name, and both are one copy here"
            raise FormatError(f"{asked}, trained tensor {name!r}", found, _BESIDE)
        first.setdefault(id(parameter), value)


def _lacks(what: str, name: str, asked: str) -> FormatError:
    return FormatError(
        f"{asked}, {what} {name!r}",
        "the adapter on the model has it, and the one to be swapped in has not",
        _BESIDE,
    )


def _check_none_left(what: str, left: Collection[str], known: Iterable[str], asked: str) -> None:
    if left:
        name = min(left)
        close = ", ".join(map(repr, nearest(name, known))) or "none"
        found = f"the adapter on the model has no such {what} (nearest: {close})"
        raise FormatError(f"{asked}, {what} {name!r}", found, _BESIDE)


def _check_alike(site: SiteState, old: SiteSpec, roles: Collection[str], asked: str) -> None:
    """Check that a site is the slot's in all that values alone cannot change."""
    new = site.spec
    if (site.A0 is None) == ("A0" in roles):
        found = "one of the two adapters starts from W (pissa, olora), and the other does not"
    elif new.rank != old.rank:
        found = f"its rank is {new.rank}, and {old.rank} on the model"
    elif not math.isclose(new.scale, old.scale):
        found = f"its scale is {new.scale:g}, and {old.scale:g} on the model"
    elif new.form[2:] != old.form[2:]:
        found = "it adapts other parts of the weight than the one on the model"
    else:
        return
    raise FormatError(f"{asked}, site {old.name!r}", found, _BESIDE)


def _check_fit(into: list[Tensor], values: list[Tensor], asked: str) -> None:
    """Check that a copy cannot fail halfway."""
    if any(value.is_meta for value in values):
        raise FormatError(asked, "its tensors are on the meta device", "Load their values first")
    if set(map(type, into)) - {nn.Parameter} or any(parameter.is_meta for parameter in into):
        raise LayerError(
            asked,
            "the adapter on the model is sharded or on the meta device",
            "Swap before the model is sharded, and after it has values",
        )
    there, here = [value.shape for value in values], [parameter.shape for parameter in into]
    if there != here:
        wrong = next(pair for pair in zip(there, here, strict=True) if pair[0] != pair[1])
        found = f"a tensor has shape {tuple(wrong[0])}, and {tuple(wrong[1])} on the model"
        raise FormatError(asked, found, "Swap in an adapter that was made for this model")


def _sampled(weights: Mapping[str, Tensor], root: Root) -> Fingerprint:
    """Return the fingerprint of weights, kept until one of them is replaced or written."""
    held = list(weights.values())
    if any(weight.is_inference() for weight in held):
        return fingerprint(weights)  # such tensors do not tell when they are written
    kept: _Sampled | None = root.sampled
    if kept is None or kept.names != list(weights) or not kept.holds(held):
        kept = root.sampled = _Sampled(weights)
    return kept.fingerprint


class _Sampled:
    """A fingerprint, and the weights that it was taken of as they were."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.fingerprint = fingerprint(weights)
        self.names = list(weights)
        self.seen = [(weakref.ref(w), w._version, _address(w)) for w in weights.values()]

    def holds(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, and nobody has written to them."""
        return all(
            seen() is weight and version == weight._version and address == _address(weight)
            for weight, (seen, version, address) in zip(weights, self.seen, strict=True)
        )


def _address(weight: Tensor) -> int:
    return weight.data_ptr() if type(weight) is nn.Parameter else 0

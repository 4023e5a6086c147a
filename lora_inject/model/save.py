"""Between a live model and the adapter as a value: save and load.

An `AdapterState` is read off a model or put onto one as a whole. Loading goes by the
names and shapes of the adapter's own tensors, never by patterns from a file, and checks everything,
the base's fingerprint included, before the model changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.adapter.state import AdapterState, Fingerprint, SiteState
from lora_inject.errors import FormatError, LayerError, nearest
from lora_inject.formats import FORMATS, read_adapter, write_adapter
from lora_inject.formats.checks import FLOATS
from lora_inject.formats.fingerprint import compare, samples, unverifiable
from lora_inject.formats.older_names import in_names_of
from lora_inject.formats.peft import options_for_reading, options_for_writing
from lora_inject.functional import master_dtype
from lora_inject.layers.attached import Entry
from lora_inject.layers.candidates import inventory
from lora_inject.layers.kinds import KINDS
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import (
    check_names,
    check_new_name,
    entries,
    reach,
    refuse_merged,
    roots_of,
)
from lora_inject.model.inject import attach
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import joined, matching
from lora_inject.spec.plan import Trained
from lora_inject.spec.sites import SiteSpec

M = TypeVar("M", bound=nn.Module)
Base = Literal["same", "quantised", "any"]


def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """Read an adapter off a model, as a value.

    Args:
        model: The root, or any module that holds roots.
        name: The adapter.

    Returns:
        Its state. The tensors are detached and share memory with the model's.

    Raises:
        StateError: There is no such adapter, or the model is merged.

    Example:
        >>> from lora_inject.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> site = adapter_state(net).sites["0"]
        >>> tuple(site.A.shape), tuple(site.B.shape), site.scale
        ((2, 4), (6, 2), 8.0)
    """
    found = reach(model)
    check_names(found.names, [name], "adapter_state of")
    for selection in found.selections:
        # The fingerprint is to be that of the base, which the weights are not now.
        refuse_merged(selection, f"saving adapter {name!r}")
    sites: dict[str, SiteState] = {}
    trained: dict[str, Tensor] = {}
    copies: set[int] = set()
    weights: dict[str, Tensor] = {}
    survey = Survey(model)
    for path, module, entry in entries(survey, name):
        if entry.spec is None:
            copy = id(entry.tensor(module, "T"))
            if copy not in copies:  # a tied tensor goes by its first name, as in an inventory
                trained[joined(path, entry.param)] = _detached(module, entry, "T")
                copies.add(copy)
            continue
        spec = entry.spec
        sites[spec.name] = SiteState(
            spec,
            *(_detached(module, entry, role) for role in ("A", "B", "A0", "B0")),
        )
        raw = module._parameters[entry.param]
        assert raw is not None
        weights[spec.weight] = raw
    configs = [root.configs[name] for root in roots_of(survey).values() if name in root.configs]
    config = configs[0] if configs else None
    return AdapterState(sites, trained, config, fingerprint(weights))


def _detached(module: nn.Module, entry: Entry, role: str) -> Any:
    if role not in entry.names:
        return None
    tensor = entry.tensor(module, role).detach()
    # FSDP2 holds a shard of it; an adapter is small enough to be gathered.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """Sample weights, so that another base of the same shape can be told.

    Args:
        weights: Name to tensor. Quantised, sharded and meta tensors are named but not sampled.

    Returns:
        The fingerprint.
    """
    plain = {
        name: weight
        for name, weight in weights.items()
        if weight.dtype in FLOATS and not weight.is_meta and type(weight) in (nn.Parameter, Tensor)
    }
    return Fingerprint(
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        samples=samples(plain),
        quantised=tuple(name for name in weights if name not in plain),
    )


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    name: str = "default",
    format: str = "peft",  # noqa: A002 - the word that users look for
    **options: Any,
) -> Path:
    """Write an adapter to files, atomically.

    Args:
        model: The root, or any module that holds roots.
        path: Where to; a directory for PEFT's format.
        name: The adapter.
        format: A row of `formats.FORMATS`.
        **options: For the format.

    Returns:
        The path.

    Raises:
        StateError: There is no such adapter.
        FormatError: The format cannot express it, or the path cannot be written.
    """
    state = adapter_state(model, name)
    if format == "peft":
        for key, value in peft_view(Survey(model)).items():
            options.setdefault(key, value)
    write_adapter(state, path, format=format, **options)
    return Path(path)


def peft_view(survey: Survey) -> dict[str, Any]:
    """Return what PEFT would see of the model, and its format therefore must know."""
    return options_for_writing(survey.model, survey.by_name, base_weights(survey))


def load_adapter(
    model: M,
    path: str | PathLike[str],
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    format: str | None = None,  # noqa: A002
    **options: Any,
) -> M:
    """Read an adapter from files and put it onto a model, all of it or nothing.

    It becomes active only where no adapter is active, and it is not trainable until
    `train_only(model, name)` says so.

    Args:
        model: The model that it was made for.
        path: What `save_adapter` or PEFT wrote.
        name: Its name on this model.
        leave_out: Patterns (as in a config) of trained tensors and sites to let go, for instance a
            head of another task. Each must match something.
        base: `same`: the base must be the one that the adapter was made on, as far as its
            fingerprint tells, in whatever dtype. `quantised`: values that cannot be compared
            because the base is quantised are let through. `any`: no comparison.
        format: A row of `formats.FORMATS`; by default it is told from the files.
        **options: For the format.

    Returns:
        The same object.

    Raises:
        FormatError: Files that are incomplete or unsafe, tensors that do not fit the model, or
            another base. Nothing was changed.
        StateError: The name is in use, or the model is merged.
    """
    asked = f"load {str(path)!r}"
    survey = Survey(model)
    if format == "peft" or (format is None and FORMATS["peft"].detects(Path(path))):
        options = options_for_reading(survey.by_name, base_weights(survey)) | options
    state = read_adapter(path, format=format, **options)
    _install(survey, state, name, leave_out, base, asked, _Owned())
    return model


def install(
    model: M,
    state: AdapterState,
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    asked: str = "install",
) -> M:
    """Put an adapter, as a value, onto a model; see `load_adapter`.

    Args:
        model: The model.
        state: The adapter; its tensors are copied.
        name: Its name on this model.
        leave_out: Patterns of trained tensors and sites to let go.
        base: How sure to be of the base.
        asked: What was asked, for messages.

    Returns:
        The same object.

    Raises:
        FormatError: It does not fit the model. Nothing was changed.
        StateError: The name is in use, or the model is merged.
    """
    _install(Survey(model), state, name, leave_out, base, asked, _copied)
    return model


def _install(
    survey: Survey,
    state: AdapterState,
    name: str,
    leave_out: Sequence[str],
    base: Base,
    asked: str,
    taken: Callable[[Tensor, Tensor], Tensor],
) -> None:
    there = reach(survey.model, survey)
    check_new_name(there, name)
    found, weights = inventory(survey), base_weights(survey)
    state = in_names_of(survey.model, _without(state, leave_out, asked), weights)
    names = _Names(found)
    fitted = {s.spec.name: _fit(s.spec, names, asked) for s in state.sites.values()}
    copies = {key: _fit_trained(key, t, found, asked) for key, t in state.trained.items()}
    _check_tied_copies(copies, state, asked)
    trained = {copy.name: copy for copy in copies.values()}
    if state.fingerprint is not None and base != "any":
        new = {state.sites[key].spec.weight: spec.weight for key, spec in fitted.items()}
        here = fingerprint({old: weights[name] for old, name in new.items()})
        check_base(state.fingerprint, here, base, asked)
    check_base_copies(state, weights, asked)
    sources = {spec.name: key for key, spec in fitted.items()}
    sources |= {copy.name: key for key, copy in copies.items()}

    def tensors(target: SiteSpec | Trained, weight: Tensor) -> dict[str, Tensor]:
        key = sources[target.name]
        held = _tensors(state.sites[key]) if key in state.sites else {"T": state.trained[key]}
        return {role: taken(tensor, weight) for role, tensor in held.items()}

    active = any(selection.state.active for selection in there.selections)
    attach(
        survey,
        name,
        fitted.values(),
        trained.values(),
        tensors,
        state.config,
        activate=not active,
        train=False,
    )


def _copied(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor as an adapter over `weight` holds it, in memory of its own."""
    dtype = master_dtype(weight.dtype)
    return tensor.detach().to(device=weight.device, dtype=dtype, copy=True)


class _Owned:
    """Takes tensors that nobody else holds as they are, unless two of them share memory."""

    def __init__(self) -> None:
        self.taken: set[int] = set()

    def __call__(self, tensor: Tensor, weight: Tensor) -> Tensor:
        address = tensor.data_ptr()
        alone = address not in self.taken and tensor.untyped_storage().nbytes() == tensor.nbytes
        self.taken.add(address)
        fits = tensor.dtype == master_dtype(weight.dtype) and tensor.device == weight.device
        return tensor if alone and fits else _copied(tensor, weight)


def _tensors(site: SiteState) -> dict[str, Tensor]:
    """Return the tensors of a site by their role."""
    if site.A0 is None or site.B0 is None:
        return {"A": site.A, "B": site.B}
    return {"A": site.A, "B": site.B, "A0": site.A0, "B0": site.B0}


def _without(state: AdapterState, patterns: Iterable[str], asked: str) -> AdapterState:
    """Leave out what the caller's patterns name; each must name something."""
    gone: set[str] = set()
    for pattern in patterns:
        label = f"{asked}, leave_out {pattern!r}"
        hits = matching(pattern, (*state.sites, *state.trained), asked=label, error=FormatError)
        if not hits:
            close = nearest(pattern, [*state.trained, *state.sites])
            raise FormatError(
                label,
                "it matches nothing in the adapter",
                f"Nearest: {', '.join(map(repr, close)) or 'none'}",
            )
        gone.update(hits)
    return dataclasses.replace(
        state,
        sites={key: site for key, site in state.sites.items() if key not in gone},
        trained={key: t for key, t in state.trained.items() if key not in gone},
    )


def _fit(spec: SiteSpec, names: _Names, asked: str) -> SiteSpec:
    """Return a site's spec as this model holds it."""
    candidate = names.find(spec)
    if spec.kind not in names.kinds:
        raise FormatError(
            f"{asked}, site {spec.name!r}",
            f"its kind of layer, {spec.kind!r}, is not registered here",
            "Import the module that calls register_kind for it first",
        )
    if candidate is None:
        close = ", ".join(map(repr, nearest(spec.name, names.names))) or "none"
        raise FormatError(
            f"{asked}, site {spec.name!r}",
            "the model has no such module",
            f"Nearest: {close}. Load the adapter onto the model that it was made for",
        )
    if candidate.refusal is not None:
        raise LayerError(f"{asked}, site {spec.name!r}", *candidate.refusal)
    there = (spec.in_features, spec.out_features, spec.experts)
    here = (candidate.in_features, candidate.out_features, candidate.experts)
    if spec.kind == "parameter" and spec.transposed != candidate.transposed:
        here = (candidate.out_features, candidate.in_features, candidate.experts)
    same = spec.kind == "parameter" and spec.weight_shape == candidate.weight_shape
    if there != here and not same:  # a parameter's layout may group its axes in its own way
        raise FormatError(
            f"{asked}, site {spec.name!r}",
            f"it maps {there[0]} to {there[1]} features in the file, {here[0]} to {here[1]} here",
            "Load the adapter onto the model that it was made for",
        )
    transposed = spec.transposed if spec.kind == "parameter" else candidate.transposed
    if (
        (spec.kind, spec.weight_shape, spec.transposed, spec.update, spec.rule)
        == (candidate.kind, candidate.weight_shape, transposed, candidate.update, None)
    ):  # fmt: skip
        where = (candidate.name, candidate.weight, candidate.aliases)
        return spec if (spec.name, spec.weight, spec.aliases) == where else spec.at(*where)
    return dataclasses.replace(
        spec,
        name=candidate.name,
        kind=candidate.kind,
        weight_shape=candidate.weight_shape,
        transposed=transposed,
        weight=candidate.weight,
        update=candidate.update,
        aliases=candidate.aliases,
        rule=None,
    )


class _Names:
    """The candidates of a model by every name that an adapter may know them by."""

    def __init__(self, found: Inventory) -> None:
        self.names = [candidate.name for candidate in found.candidates]
        self.kinds = {row.kind for row in KINDS} | {"parameter"}
        self._sites: dict[str, Candidate] = {}
        self._weights: dict[str, Candidate] = {}
        for candidate in found.candidates:
            for name in (candidate.name, *candidate.aliases):
                self._sites.setdefault(name, candidate)
            self._weights.setdefault(candidate.weight, candidate)

    def find(self, spec: SiteSpec) -> Candidate | None:
        found = self._sites.get(spec.name)
        if found is None and spec.kind == "parameter" and spec.name in self._weights:
            return self._weights[spec.name].as_parameter(spec.name)
        return found


def _fit_trained(key: str, tensor: Tensor, found: Inventory, asked: str) -> Trained:
    name = found.aliases.get(key, key)
    shape = found.parameters.get(name)
    if shape == tuple(tensor.shape):
        return Trained(name=name, shape=shape, why="train")
    if shape is None:
        what = "the model has no such parameter"
    else:
        what = f"it has shape {tuple(tensor.shape)} in the file and {shape} here"
    raise FormatError(
        f"{asked}, trained tensor {key!r}",
        what,
        "Load the adapter onto the model that it was made for, or leave this tensor out with "
        f"leave_out=[{key!r}]",
    )


def _check_tied_copies(copies: Mapping[str, Trained], state: AdapterState, asked: str) -> None:
    """Refuse two different copies of what is one tensor here."""
    first: dict[str, str] = {}
    for key, copy in copies.items():
        other = first.setdefault(copy.name, key)
        if other != key and not torch.equal(state.trained[other], state.trained[key]):
            raise FormatError(
                f"{asked}, trained tensor {key!r}",
                f"it is not the adapter's {other!r}, and both are one tensor in this model",
                "Load it onto a model that does not tie the two",
            )


def base_weights(survey: Survey) -> dict[str, Tensor]:
    """Return the base's parameters under each of their names."""
    return {
        joined(path, key): parameter
        for path, module in survey.named
        for key, parameter in survey.own[id(module)].items()
    }


def check_base(saved: Fingerprint, here: Fingerprint, base: Base, asked: str) -> None:
    """Refuse another base than the one that an adapter was made on.

    Args:
        saved: Of the base that it was made on.
        here: Of this one, at the adapter's sites and under the same names.
        base: How sure to be; see `load_adapter`.
        asked: What was asked, for messages.

    Raises:
        FormatError: It is another one, or that cannot be told.
    """
    if (saved.shapes, saved.samples) == (here.shapes, here.samples) and not here.quantised:
        return
    shapes = {key: shape for key, shape in saved.shapes.items() if key in here.shapes}
    if unknown := unverifiable(Fingerprint(shapes, saved.samples, saved.quantised), here):
        if base != "quantised":
            raise FormatError(
                asked,
                f"the base cannot be compared at {len(unknown)} sites, of which {unknown[0]!r}: "
                "its weight is quantised, sharded or on the meta device, here or where it was made",
                'Pass base="quantised" where it is the right base',
            )
        shapes = {key: shape for key, shape in shapes.items() if key not in unknown}
    differences = compare(Fingerprint(shapes, saved.samples), here)
    if differences:
        key, what = next(iter(differences.items()))
        raise FormatError(
            asked,
            f"the adapter was made on another base: {key!r} {what} ({len(differences)} of "
            f"{len(shapes)} sites differ)",
            'Load it onto its own base, or pass base="any"',
        )


def check_base_copies(state: AdapterState, weights: Mapping[str, Tensor], asked: str) -> None:
    """PEFT stores whole base embeddings beside an adapter; one that differs would be lost."""
    for key, copy in state.base_copies.items():
        weight = weights.get(key)
        same = weight is not None and weight.shape == copy.shape
        if not same or not torch.equal(weight.detach().cpu().to(copy.dtype), copy):  # type: ignore[union-attr]
            raise FormatError(
                f"{asked}, {key!r}",
                "the file carries a copy of this base tensor that is not the model's",
                "Load the adapter onto the base that it was made on (was the vocabulary resized?)",
            )

"""Where every tensor of an adapter belongs in a checkpoint.

The names are the checkpoint's own, or renamed as the user says, or as the checkpoint's class says.
Nothing is ever left over: what finds no place is listed, with the reason and the nearest name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lora_inject.adapter.state import SiteState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.place import Orientation, Placed, place_site
from lora_inject.checkpoint.quantized import why_not
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError, nearest
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.safetensors_file import TensorEntry

MAX_SHOWN = 8

Rule = Callable[[str], str]
"""Gives the checkpoint's name of a tensor that the adapter names."""


@dataclass
class Fit:
    """How one adapter lies on a checkpoint under one rule.

    Attributes:
        rule: How names were read.
        label: The same in words.
        placed: Site name to where its update goes.
        trained: Output tensor name to the base's tensor (None: the base has none) and the value.
        copies: Output tensor name to the base's tensor and the adapter's copy of it.
        added: Output tensor name to the base's tensor and what is added.
        rows: Output tensor name to the base's tensor, indices of rows and their values.
        left: What found no place, with the reason.
    """

    rule: Rule
    label: str
    placed: dict[str, list[Placed]] = field(default_factory=dict)
    trained: dict[str, tuple[TensorEntry | None, Tensor]] = field(default_factory=dict)
    copies: dict[str, tuple[TensorEntry, Tensor]] = field(default_factory=dict)
    added: dict[str, tuple[TensorEntry, Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[TensorEntry, tuple[int, ...], Tensor]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)


def weight_name(spec: SiteSpec) -> str:
    """Return the state dict key of a site's weight."""
    if spec.weight:
        return spec.weight
    return spec.name if spec.kind == "parameter" else f"{spec.name}.weight"


def choose(
    adapter: WeightedAdapter,
    checkpoint: Checkpoint,
    options: MergeOptions | None = None,
    of: BaseClass | None = None,
) -> Fit:
    """Find the place of every tensor of an adapter, or refuse it.

    Of the options `allow_new`, `rename` and `tie` are read; `of` is the class of the base, where it
    is known already.
    """
    options = options or MergeOptions()
    of = of or BaseClass(checkpoint, options.tie)
    label = "names as told" if options.rename else "names as they are"
    best, refusal = _try(_told(options.rename), label, adapter, of, options), None
    if best.left and not options.rename and of.known:
        try:
            best = min(best, _try(of, of.label, adapter, of, options), key=lambda f: len(f.left))
        except CheckpointError as error:
            refusal = error  # it explains itself only where nothing fits
    if best.left:
        raise _nothing_fits(best, adapter, checkpoint) from refusal
    return best


def _told(rename: Mapping[str, str]) -> Rule:
    """Return the rule that replaces the longest of some beginnings."""
    longest_first = sorted(rename, key=len, reverse=True)

    def renamed(name: str) -> str:
        old = next((old for old in longest_first if name.startswith(old)), None)
        return name if old is None else rename[old] + name[len(old) :]

    return renamed


def _nothing_fits(best: Fit, adapter: WeightedAdapter, checkpoint: Checkpoint) -> CheckpointError:
    asked = f"merge {adapter.label} into '{checkpoint.folder}'"
    if quantized := why_not(checkpoint, [name for name, _ in best.left]):
        return CheckpointError(asked, *quantized)
    shown = "; ".join(
        reason if name in reason else f"'{name}': {reason}"
        for name, reason in best.left[:MAX_SHOWN]
    )
    more = f"; and {len(best.left) - MAX_SHOWN} more" if len(best.left) > MAX_SHOWN else ""
    close = nearest(best.rule(best.left[0][0]), checkpoint.tensors)
    near = f"Nearest names in the checkpoint: {', '.join(map(repr, close))}. " if close else ""
    state = adapter.state
    tables = (state.sites, state.trained, state.base_copies, adapter.added, adapter.rows)
    return CheckpointError(
        asked,
        f"{len(best.left)} of {sum(map(len, tables))} tensors have no place in it ({shown}{more})",
        f"{near}Use the checkpoint that the adapter was trained on, or say how its names differ: "
        "--rename OLD=NEW. Nothing was written",
    )


def _try(
    rule: Rule, label: str, adapter: WeightedAdapter, of: BaseClass, options: MergeOptions
) -> Fit:
    way = Orientation(of)
    fit = _place_all(rule, label, adapter, way, options)
    if way.contradicted is not None:  # square sites that came before it were judged without it
        fit = _place_all(rule, label, adapter, way, options)
    return fit


def _place_all(
    rule: Rule, label: str, adapter: WeightedAdapter, way: Orientation, options: MergeOptions
) -> Fit:
    fit, tensors = Fit(rule, label), way.of.checkpoint.tensors
    for site_name, state in adapter.state.sites.items():
        places = _place(rule(weight_name(state.spec)), state, adapter, way)
        if isinstance(places, str):
            fit.left.append((weight_name(state.spec), places))
        else:
            fit.placed[site_name] = places
    full = [(name, value, options.allow_new) for name, value in adapter.state.trained.items()]
    full += [(name, value, False) for name, value in adapter.state.base_copies.items()]
    for original, value, allow_new in full:
        name = rule(original)
        entry, absent = _find(name, way.of)
        reason = _misfit(name, entry, value, absent, allow_new=allow_new)
        if reason is not None:
            fit.left.append((original, reason))
        elif original in adapter.state.trained:
            fit.trained[name] = (entry, value)
        elif entry is not None:
            fit.copies[name] = (entry, value)
    _place_extras(fit, adapter, tensors)
    return fit


def _place(
    name: str, state: SiteState, adapter: WeightedAdapter, way: Orientation
) -> list[Placed] | str:
    """Return where one site goes, or the reason why it goes nowhere."""
    entry, absent = _find(name, way.of)
    entry = _grown(adapter, state.spec, entry) or entry
    try:
        return place_site(state, adapter.weight, name, entry, way) or absent
    except CheckpointError:
        return absent


def _find(name: str, of: BaseClass) -> tuple[TensorEntry | None, str]:
    """Return the tensor of a name, or the one that it is tied to; else why there is none."""
    tensors, absent = of.checkpoint.tensors, f"'{name}' is not in the checkpoint"
    if name in tensors:
        return tensors[name], ""
    try:
        source = of.source_of(name)
    except CheckpointError as error:
        return None, f"{absent} (could not {error.asked}: {error.found})"
    return (None if source is None else tensors[source]), absent


def _place_extras(fit: Fit, adapter: WeightedAdapter, tensors: Mapping[str, TensorEntry]) -> None:
    """Place what variants of LoRA carry beside A and B."""
    for original, value in adapter.added.items():
        name = fit.rule(original)
        entry = tensors.get(name)
        reason = _misfit(name, entry, value, f"'{name}' is not in the checkpoint", allow_new=False)
        if reason is not None:
            fit.left.append((original, reason))
        elif entry is not None:
            fit.added[name] = (entry, value)
    for original, (indices, value) in adapter.rows.items():
        name = fit.rule(original)
        entry = tensors.get(name)
        if entry is None:
            fit.left.append((original, f"'{name}' is not in the checkpoint"))
        elif len(entry.shape) != 2 or tuple(value.shape) != (len(indices), entry.shape[1]):
            found = f"{list(value.shape)} for {len(indices)} rows of {list(entry.shape)}"
            fit.left.append((original, f"'{name}': the adapter's rows are {found}"))
        elif not all(0 <= index < entry.shape[0] for index in indices):
            fit.left.append((original, f"'{name}' has only {entry.shape[0]} rows"))
        else:
            fit.rows[name] = (entry, indices, value)


def _grown(
    adapter: WeightedAdapter, spec: SiteSpec, entry: TensorEntry | None
) -> TensorEntry | None:
    """Return a tensor as large as the adapter's own copy of it, where the vocabulary grew."""
    copy = adapter.state.base_copies.get(weight_name(spec))
    if copy is None or entry is None or not _grew(entry, copy):
        return None
    return replace(entry, shape=tuple(copy.shape))


def _grew(entry: TensorEntry, value: Tensor) -> bool:
    return (
        value.dim() == 2
        and len(entry.shape) == 2
        and value.shape[1] == entry.shape[1]
        and value.shape[0] > entry.shape[0]
    )


def _misfit(
    name: str, entry: TensorEntry | None, value: Tensor, absent: str, *, allow_new: bool
) -> str | None:
    """Return why a full tensor has no place, None where it has one."""
    if entry is None:
        return None if allow_new else absent
    if tuple(value.shape) == entry.shape or _grew(entry, value):
        return None
    return f"'{name}' has the shape {list(entry.shape)}, the adapter's is {list(value.shape)}"

"""Choosing the one name rule under which a whole adapter fits a checkpoint.

A rule fits when every tensor of the adapter finds its place by name and by shape. Names
that are exactly the checkpoint's need no rule; otherwise exactly one must fit. Nothing is ever
left over: what finds no place is listed, with the reason and the nearest name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_inject.checkpoint.class_names import TableRule, class_rule
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.parts import Part
from lora_inject.checkpoint.place import Orientation, Placed, place_site
from lora_inject.checkpoint.quantised import why_not
from lora_inject.checkpoint.tied import is_head, source_of_tied
from lora_inject.checkpoint.translate import NameRule, candidate_rules
from lora_inject.errors import CheckpointError, nearest
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.safetensors_file import TensorEntry

MAX_SHOWN = 8


@dataclass
class Fit:
    """How one adapter lies on a checkpoint under one rule.

    Attributes:
        rule: The rule.
        placed: Site name to where its update goes.
        trained: Output tensor name to the base's tensor (None: the base has none) and the value.
        copies: Output tensor name to the base's tensor and the adapter's copy of it.
        added: Output tensor name to the base's tensor and what is added.
        rows: Output tensor name to the base's tensor, indices of rows and their values.
        left: What found no place, with the reason.
    """

    rule: NameRule | TableRule
    placed: dict[str, list[Placed]] = field(default_factory=dict)
    trained: dict[str, tuple[TensorEntry | None, Tensor]] = field(default_factory=dict)
    copies: dict[str, tuple[TensorEntry, Tensor]] = field(default_factory=dict)
    added: dict[str, tuple[TensorEntry, Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[TensorEntry, tuple[int, ...], Tensor]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def outcome(self) -> frozenset[str]:
        """The tensors that it touches."""
        placed = {p.tensor for places in self.placed.values() for p in places}
        return frozenset(placed | self.trained.keys() | self.added.keys() | self.rows.keys())


def weight_name(spec: SiteSpec) -> str:
    """Return the state dict key of a site's weight."""
    if spec.weight:
        return spec.weight
    return spec.name if spec.kind == "parameter" else f"{spec.name}.weight"


def choose(part: Part, checkpoint: Checkpoint, *, allow_new: bool = False) -> Fit:
    """Find the rule under which every tensor of an adapter has its place.

    Args:
        part: The adapter.
        checkpoint: The base.
        allow_new: Whether trained tensors that the base lacks may be added to it.

    Raises:
        CheckpointError: No rule fits, or several do, or the base is quantised.
    """
    state = part.state
    names = [weight_name(site.spec) for site in state.sites.values()]
    names += [*state.trained, *state.base_copies, *part.added, *part.rows]
    asked = f"merge {part.label} into '{checkpoint.folder}'"
    fits = []
    for rule in candidate_rules(names, checkpoint.tensors):
        fit = _try(rule, part, checkpoint, allow_new=allow_new)
        if not fit.left and rule.exact:
            return fit
        fits.append(fit)
    whole = [fit for fit in fits if not fit.left]
    if len({fit.outcome for fit in whole}) > 1:
        raise CheckpointError(
            asked,
            "its names fit in several ways: " + "; ".join(fit.rule.label for fit in whole[:4]),
            "Rename the adapter's tensors to the checkpoint's own names",
        )
    if whole:
        return whole[0]
    of_class = class_rule(checkpoint)  # slow to ask, so only now
    if of_class is not None:
        fit = _try(of_class, part, checkpoint, allow_new=allow_new)
        if not fit.left:
            return fit
        fits.append(fit)
    best = min(fits, key=lambda fit: len(fit.left))
    raise _nothing_fits(asked, best, len(names), checkpoint)


def _nothing_fits(asked: str, best: Fit, n_names: int, checkpoint: Checkpoint) -> CheckpointError:
    shown = "; ".join(
        reason if name in reason else f"'{name}': {reason}"
        for name, reason in best.left[:MAX_SHOWN]
    )
    more = f"; and {len(best.left) - MAX_SHOWN} more" if len(best.left) > MAX_SHOWN else ""
    quantised = why_not(checkpoint, [name for name, _ in best.left])
    if quantised is not None:
        return CheckpointError(asked, quantised.found, quantised.remedy)
    close = nearest(best.rule(best.left[0][0]) or best.left[0][0], checkpoint.tensors)
    near = f"Nearest names in the checkpoint: {', '.join(map(repr, close))}. " if close else ""
    return CheckpointError(
        asked,
        f"{len(best.left)} of {n_names} tensors have no place in it ({shown}{more})",
        f"{near}Use the checkpoint that the adapter was trained on; nothing was written",
    )


def _try(rule: NameRule | TableRule, part: Part, checkpoint: Checkpoint, *, allow_new: bool) -> Fit:
    way = Orientation(checkpoint.config)
    fit = _place_all(rule, part, checkpoint, way, allow_new=allow_new)
    if way.contradicted is not None:  # square sites that came before it were judged without it
        fit = _place_all(rule, part, checkpoint, way, allow_new=allow_new)
    return fit


def _place_all(
    rule: NameRule | TableRule,
    part: Part,
    checkpoint: Checkpoint,
    way: Orientation,
    *,
    allow_new: bool,
) -> Fit:
    fit, tensors = Fit(rule), checkpoint.tensors
    for site_name, state in part.state.sites.items():
        name = _renamed(rule, weight_name(state.spec))
        tied = None if name in tensors else source_of_tied(checkpoint, name)
        grown = _grown(part, state.spec, name, tensors.get(name, tied))
        places = place_site(state, part.weight, name, grown or tensors, tied, way)
        if isinstance(places, str):
            fit.left.append((weight_name(state.spec), _of_head(places, name, tied)))
        else:
            fit.placed[site_name] = places
    for original, value in part.state.trained.items():
        name = _renamed(rule, original)
        entry = tensors.get(name) or source_of_tied(checkpoint, name)
        reason = _misfit(name, entry, value, allow_new=allow_new)
        if reason is None:
            fit.trained[name] = (entry, value)
        else:
            fit.left.append((original, reason))
    for original, value in part.state.base_copies.items():
        name = _renamed(rule, original)
        entry = tensors.get(name) or source_of_tied(checkpoint, name)
        reason = _misfit(name, entry, value, allow_new=False)
        if reason is None and entry is not None:
            fit.copies[name] = (entry, value)
        else:
            fit.left.append((original, reason or f"'{name}' is not in the checkpoint"))
    _place_extras(fit, part, tensors)
    return fit


def _place_extras(fit: Fit, part: Part, tensors: Mapping[str, TensorEntry]) -> None:
    """Place what variants of LoRA carry beside A and B."""
    for site, magnitude in part.magnitudes.items():
        spec = part.state.sites[site].spec
        if spec.experts is not None or magnitude.numel() != spec.out_features:
            found = f"its magnitude has {magnitude.numel()} values for {spec.out_features} outputs"
            fit.left.append((site, found))
    for original, value in part.added.items():
        name = _renamed(fit.rule, original)
        entry = tensors.get(name)
        reason = _misfit(name, entry, value, allow_new=False)
        if entry is None or reason is not None:
            fit.left.append((original, reason or ""))
        else:
            fit.added[name] = (entry, value)
    for original, (indices, value) in part.rows.items():
        name = _renamed(fit.rule, original)
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


def _renamed(rule: NameRule | TableRule, name: str) -> str:
    return rule(name) or name


def _of_head(reason: str, name: str, tied: TensorEntry | None) -> str:
    """Say of an absent head that no tie explains its absence."""
    if tied is None and is_head(name) and reason.endswith("not in the checkpoint"):
        return f"{reason}, and there is no one embedding that it could safely be untied from"
    return reason


def _grown(
    part: Part, spec: SiteSpec, name: str, entry: TensorEntry | None
) -> Mapping[str, TensorEntry] | None:
    """Return the tensor as large as the adapter's own copy of it, where the vocabulary grew."""
    copy = part.state.base_copies.get(weight_name(spec))
    if copy is None or entry is None or not _grew(entry, copy):
        return None
    shape = tuple(copy.shape)
    return {name: TensorEntry(entry.name, entry.dtype, shape, entry.start, entry.stop)}


def _grew(entry: TensorEntry, value: Tensor) -> bool:
    return (
        value.dim() == 2
        and len(entry.shape) == 2
        and value.shape[1] == entry.shape[1]
        and value.shape[0] > entry.shape[0]
    )


def _misfit(name: str, entry: TensorEntry | None, value: Tensor, *, allow_new: bool) -> str | None:
    """Return why a full tensor has no place, None where it has one."""
    if entry is None:
        return None if allow_new else f"'{name}' is not in the checkpoint"
    if tuple(value.shape) == entry.shape or _grew(entry, value):
        return None
    return f"'{name}' has the shape {list(entry.shape)}, the adapter's is {list(value.shape)}"

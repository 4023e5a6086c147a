"""Read an adapter from a live model, as a value, and save it."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.exchange import (
    completed,
    default_format,
    format_of,
    why_not_as,
    write_adapter,
)
from lora_inject.core.adapter.fingerprint import (
    N_SAMPLES,
    Fingerprint,
    Moved,
    packing,
    samples,
    values_at,
)
from lora_inject.core.adapter.moved import moved_positions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.value_checks import FLOATS
from lora_inject.core.files.disk import replace_file
from lora_inject.core.files.together import write_together
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import described
from lora_inject.core.model.carried import (
    Carried,
    adapted_modules,
    entries,
    idle_among,
    reach,
    refuse_merged,
    roots_of,
    whole_adapter,
)
from lora_inject.core.model.guards import after, before, this_process_writes
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, StateError, user_path, within

LOG = logging.getLogger("lora_inject")

LATEST = "LATEST"
"""File with the name of an adapter's newest version."""


def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """Read an adapter from a model, as a value.

    Args:
        model: The root, or any module that holds roots.
        name: The adapter.

    Returns:
        Its state. The tensors are detached and share memory with the model's.

    Raises:
        StateError: There is no such adapter, a layer that carries it was replaced, the model is
            merged, or this process holds only a shard of a tensor.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> site = adapter_state(net).sites["0"]
        >>> tuple(site.A.shape), tuple(site.B.shape), site.scale
        ((2, 4), (6, 2), 8.0)
    """
    return read_off(Survey(model), name)


def values_on(
    survey: Survey,
    name: str,
    asked: str,
    taken: Callable[[Tensor, str, Entry, str], Tensor] = lambda held, *_: held,
) -> tuple[AdapterState, dict[str, Tensor]]:
    """Return an adapter on a model, without a fingerprint, and the frozen weights of its sites.

    `taken` says what stands in it for a Parameter, given the name of the module, the entry and the
    role.
    """
    before("read", survey)
    found: list[tuple[SiteSpec, dict[str, Tensor]]] = []
    biases: dict[str, dict[str, Tensor]] = {}  # of B, by the name of the module
    trained: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, ...]] = {}
    weights: dict[str, Tensor] = {}
    for item in whole_adapter(survey, name, asked):
        path, module, entry = item
        held = entry.tensors(module).items()
        tensors = {role: taken(tensor, path, entry, role) for role, tensor in held}
        if entry.spec is not None:
            found.append((entry.spec, tensors))
            weights[entry.spec.weight] = item.weight
        elif entry.scale is not None:
            biases[path] = tensors
        else:
            trained[item.name] = tensors["T"]
            if entry.rows is not None:
                rows[item.name] = entry.rows
    sites = {
        spec.name: SiteState.of(spec, tensors | biases.get(spec.name, {}))
        for spec, tensors in found
    }
    records = roots_of(survey).values()
    config = next((root.configs[name] for root in records if name in root.configs), None)
    return AdapterState(sites, trained, config, rows=rows), weights


def read_off(
    survey: Survey, name: str, gathered: Mapping[str, Tensor] = MappingProxyType({})
) -> AdapterState:
    """Read an adapter from a model; see `adapter_state`.

    `gathered` are whole tensors by their keys in the state dict, for those that are sharded.
    """
    whole: dict[int, Tensor] = {}  # a tied copy is gathered once, and stands under all its names

    def taken(held: Tensor, path: str, entry: Entry, role: str) -> Tensor:
        if id(held) not in whole:
            there = gathered.get(joined(path, entry.names[role]), held)
            whole[id(held)] = _whole(there, entry, role)
        return whole[id(held)]

    state, weights = values_on(survey, name, "adapter_state of", taken)
    for _, _, attached in adapted_modules(survey):
        attached.refuse_garbage(attached.entries(name), "reading")
    # The fingerprint is to be that of the base, which merged weights are not.
    refuse_merged(f"saving adapter {name!r}", *reach(survey.model, survey).selections)
    moved = {s.spec.weight: moved_positions(s, N_SAMPLES) for s in state.sites.values()}
    others = untouched(base_weights(survey), state)
    return replace(state, fingerprint=fingerprint(weights, others, moved))


def _whole(tensor: Tensor, entry: Entry, role: str) -> Tensor:
    """Return a tensor of an adapter, gathered where FSDP2 holds a shard of it."""
    spec, tensor = entry.spec, tensor.detach()
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    shape = entry.shape_of(role)
    if tuple(tensor.shape) != shape:
        raise StateError(
            f"adapter_state of {entry.adapter!r}",
            f"{role} of {spec.name if spec else entry.param!r} has shape {tuple(tensor.shape)} "
            f"instead of {shape}: this process holds a shard of it",
            "Call it within FullyShardedDataParallel.summon_full_params(model), or "
            "deepspeed.zero.GatheredParameters(list(model.parameters()))",
        )
    return tensor


def untouched(
    weights: Mapping[str, Tensor], state: AdapterState, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the floating point tensors of a base that an adapter neither adapts nor replaces.

    Only those of `names` if they are given. What the adapter replaces cannot identify a base: a new
    head has other values in every run.
    """
    own = {*state.trained, *(site.spec.weight for site in state.sites.values())}
    wanted = weights if names is None else names
    return {
        name: weights[name]
        for name in wanted
        if name in weights and name not in own and weights[name].dtype in FLOATS
    }


def fingerprint(
    adapted: Mapping[str, Tensor],
    others: Mapping[str, Tensor] = MappingProxyType({}),
    moved: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Fingerprint:
    """Sample weights by name, so that another base of the same shape can be told.

    Adapted tensors that are quantized are described (`adapter.fingerprint.packing`), meta tensors
    left out. `moved` are positions to sample as well.
    """
    weights = {**adapted, **others}
    floats = {name: weight for name, weight in weights.items() if weight.dtype in FLOATS}
    shards = {name: weight for name, weight in floats.items() if hasattr(weight, "full_tensor")}
    plain = {
        name: weight
        for name, weight in floats.items()
        if not weight.is_meta and type(weight) in (nn.Parameter, Tensor)
    }
    known = samples(plain)
    if shards:
        known |= room("sharding").samples_of_shards(shards)
    return Fingerprint(
        shapes={n: tuple(w.shape) for n, w in weights.items() if n in adapted or n in known},
        samples=known,
        quantized={
            name: packing(weight, described)
            for name, weight in adapted.items()
            if name not in known
        },
        moved={
            name: Moved(positions, values_at(plain[name], positions))
            for name, positions in moved.items()
            if positions and name in plain and max(positions) < plain[name].numel()
        },
    )


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    name: str = "default",
    *,
    format: str | None = None,  # noqa: A002 - the word that users look for
    version: int | None = None,
    keep: int | None = None,
    unused: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Write an adapter to files, atomically.

    Of several processes any may call it, or all with the same path: whoever comes second finds
    what it would write. With shards all must call it.

    Args:
        model: The root, or any module that holds roots.
        path: Where to; a directory for the default format. A file's name without an ending gets
            the format's own.
        name: The adapter.
        format: A row of `formats.FORMATS`; None for the folder that most programs read. A format
            refuses what its readers would compute wrong; where that is because another module reads
            a layer's weight, it may be known only once the model has run.
        version: Write to `path/VERSION`, then replace the file `path/LATEST`, which has the name of
            the newest version: for servers that follow a training run.
        keep: With `version`: the number of newest versions to keep; by default all.
        unused: Patterns (as in a config) of sites and trained tensors that may be without use. Else
            what no forward has used is an error once the adapter was trained, unless other members
            of the same ModuleList or ModuleDict were used: experts, layers that are dropped.
        **options: For the format: `overwrite=True` replaces an adapter that is there; `base_model`,
            `task_type` and others stand over what the model says (`formats.ModelFacts`).

    Returns:
        The path that was written.

    Raises:
        StateError: There is no such adapter, or a site of it is inert.
        FormatError: It holds NaN or Inf, the format cannot express it, or the path cannot be
            written.
    """
    folder = user_path("save adapter", path)
    survey = Survey(model)
    format = format or default_format()  # noqa: A001
    target = _target(folder, format, version, f"save adapter {name!r}")
    state, facts = read_off(survey, name), facts_for(survey, format, name)
    refuse_useless(survey, name, state, unused)
    if this_process_writes(survey):
        _say_if_untrained(state, name)
        if version is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        write_together(
            target, lambda at: write_adapter(state, at, format=format, facts=facts, **options)
        )
        if version is not None:
            replace_file(folder / LATEST, f"{version}\n".encode())
            remove_old_versions(folder, version, keep)
    after("save", survey)
    return target


def _target(path: Path, format: str, version: int | None, asked: str) -> Path:  # noqa: A002
    """Return where files of a format are written for a path."""
    row = format_of(format, asked)
    if version is None:
        with within(f"{asked} to '{path}'"):
            return completed(path, row)
    if row.endings:
        found = f"versions are folders, and {format!r} is one file"
        raise FormatError(f"{asked}, version {version}", found, "Leave version out")
    return path / str(version)


def refuse_useless(survey: Survey, name: str, state: AdapterState, unused: Sequence[str]) -> None:
    """Raise if an adapter holds NaN or Inf, or was trained and has sites that no forward has used.

    `state` is the adapter as it was read from the model. Of several processes all raise.
    """
    state.check_finite(f"save adapter {name!r}", FormatError)

    def changed(item: Carried) -> bool:
        if item.entry.spec is not None:
            return not state.sites[item.name].is_zero
        held = item.entry.held(item.module).detach()
        if hasattr(held, "full_tensor"):  # a comparison would have to be made by all processes
            return True
        return not torch.equal(held, item.entry.start(item.weight).to(held.dtype))

    room("reached").refuse_unused(survey, name, changed, unused, f"save adapter {name!r}")


def _say_if_untrained(state: AdapterState, name: str) -> None:
    """Log that an adapter adds nothing yet: right at a first step, a lost run at the last."""
    if state.sites and not state.trained and all(site.is_zero for site in state.sites.values()):
        LOG.warning(
            "save adapter %r: its update is 0 at each of its sites (%d), as before training. "
            "If it was trained, the optimizer did not have its tensors: make the optimizer after "
            "inject, from adapter_parameters(model).values()",
            name,
            len(state.sites),
        )


def push(
    model: nn.Module,
    repo: str,
    name: str = "default",
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload adapter",
    token: str | None = None,
    **options: Any,
) -> str | None:
    """Upload an adapter with its card as one commit: what `save_adapter` writes.

    `load_adapter(model, repo)`, PEFT and vLLM read it there.

    Args:
        model: The root, or any module that holds roots.
        repo: `user/name`; created if missing.
        name: The adapter.
        revision: A branch; created if missing.
        private: Whether a new repository is private.
        message: The message of the commit.
        token: The token; by default that of the login.
        **options: Options of `save_adapter` for PEFT's format, such as `trained_on`.

    Returns:
        The URL of the commit. Of several processes with shards one uploads; the others return None.

    Raises:
        StateError: There is no such adapter.
        FormatError: PEFT's format cannot express it, or the hub refuses or cannot be reached.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> push(net, "adapter")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lora_inject.errors.FormatError: push to 'adapter': it is not the id of a repository. ...
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "adapter")
        save_adapter(model, folder, name, published_as=repo, **options)
        if not this_process_writes(Survey(model)):
            return None
        how: dict[str, Any] = {"revision": revision, "private": private, "token": token}
        url: str = room("hub").upload(folder, repo, message=message, **how)
        return url


def remove_old_versions(folder: Path, newest: int, keep: int | None) -> None:
    """Remove the oldest versions of an adapter; each is renamed first."""
    if keep is None:
        return
    versions = sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())
    for version in [v for v in versions if v != newest][: max(0, len(versions) - max(1, keep))]:
        doomed = folder / f".{version}.{secrets.token_hex(6)}.tmp"
        with suppress(FileNotFoundError):  # another process was first
            (folder / str(version)).rename(doomed)
            shutil.rmtree(doomed)


def facts_for(survey: Survey, format: str, name: str) -> Callable[[], Any]:  # noqa: A002
    """Return a function of the facts that a format may ask for.

    Raises:
        FormatError: There is no such format, or its readers would compute something else.
    """
    row = format_of(format, f"save adapter {name!r}")
    if row.check_save is not None:
        row.check_save(survey, name)
    return lambda: replace(model_facts(survey), idle=idle_among([*entries(survey, name)]))


def notes_on_files(survey: Survey, specs: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield what the default format cannot hold of sites, and the call that works."""
    note = why_not_as(default_format(), specs, lambda: model_facts(survey))
    if note:
        yield note


def model_facts(survey: Survey) -> Any:
    """Return the facts about a live model that files depend on, a `formats.ModelFacts`."""
    return room("formats").ModelFacts.of(survey.model, survey.by_name, base_weights(survey))


def adapter_tensors(survey: Survey) -> dict[str, Tensor]:
    """Return the tensors of all adapters, frozen starts included, by their keys in the state dict.

    The keys include the names of wrappers inside the model.
    """
    before("read", survey)
    carried = adapted_modules(survey)
    ours = {id(m._parameters[name]) for _, m, attached in carried for name in attached.flat}
    state = survey.model.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in state.items() if id(tensor) in ours}


def base_weights(survey: Survey) -> dict[str, Tensor]:
    """Return the base's parameters under each of their names."""
    return {
        joined(path, key): parameter
        for path, module in survey.named
        for key, parameter in survey.own[id(module)].items()
    }

"""What a merge is given: adapters, each with a mixing weight, and the options; both are checked.

A PEFT file of stacked experts does not say which of a module's parameters a pair belongs to; their
order in the model does. It does not say their orientation either; the model's class does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from numbers import Real
from typing import Any

from torch import Tensor

from lora_inject.algebra.values import called
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.quantized_base import FORMAT_DTYPES
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_table
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import CheckpointError, check_list, check_type, within
from lora_inject.formats.exchange import read_adapter
from lora_inject.formats.hub import located


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter to merge.

    Attributes:
        state: The adapter.
        weight: Mixing weight: the base gets `weight` times its delta.
        label: Its name in messages, such as its path; by default its place among those to merge.
    """

    state: AdapterState
    weight: float = 1.0
    label: str = ""


Given = WeightedAdapter | AdapterState | str | os.PathLike[str]
"""An adapter as a caller may give it: with a weight, as a value, or by its path."""


def weighted_adapters(several: Iterable[Given], base: Checkpoint) -> list[WeightedAdapter]:
    """Return adapters with their weights, 1 by default, and their labels."""
    check_list("merge, adapters", several, "Give a list of them", CheckpointError)
    adapters = [_weighted(given, base) for given in several]
    names = called([one.state for one in adapters])
    both = zip(adapters, names, strict=True)
    return [replace(one, label=one.label or name) for one, name in both]


def _weighted(given: Given, base: Checkpoint) -> WeightedAdapter:
    if isinstance(given, WeightedAdapter):
        return given
    if isinstance(given, AdapterState):
        with within("merge an adapter"):
            given.check_tensors(CheckpointError)
        return WeightedAdapter(given)
    return read_weighted(given, base)


def read_weighted(
    path: str | os.PathLike[str], base: Checkpoint, weight: float = 1.0, **options: Any
) -> WeightedAdapter:
    """Read an adapter from files, for merging into a base.

    Args:
        path: The adapter, in any format of `formats`.
        base: What it will be merged into.
        weight: Mixing weight.
        options: Of the format's `read`.

    Returns:
        The adapter, labeled with its path.

    Raises:
        FormatError: The adapter cannot be read correctly.
    """
    path = located(path, "read adapter")
    facts = base.facts
    config_file = path / "adapter_config.json"
    if config_file.is_file():
        asked = f"read adapter '{path}', {config_file.name}"
        if parse_table(config_file.read_bytes(), asked).get("target_parameters"):
            # Building a class is slow.
            facts = BaseClass(base).facts(bare=True)
    state = read_adapter(path, facts=facts, **options)
    return WeightedAdapter(state, weight, str(path))


def _tensors_of(adapter: WeightedAdapter) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter with its name."""
    state = adapter.state
    for name, site in state.sites.items():
        yield from ((f"{name} {role}", tensor) for role, tensor in site.tensors.items())
    yield from state.trained.items()
    yield from state.base_copies.items()


def names_of_site(spec: SiteSpec) -> list[str]:
    """Return the names that files may give to a site's weight; layers of several names have more.

    Layers of GPTQ, AWQ and HQQ pack it as another; a raw parameter keeps its name, whatever it is.
    """
    weight = spec.weight
    if spec.kind != "parameter":
        weight = re.sub(r"(^|\.)(qweight|W_q)$", r"\1weight", weight)
    end = weight.removeprefix(spec.name)
    return [weight, *(alias + end for alias in spec.aliases)]


def renamed(name: str, rename: Mapping[str, str]) -> str:
    """Return a name with another beginning, of the longest that is told."""
    old = max((old for old in rename if name.startswith(old)), key=len, default=None)
    return name if old is None else rename[old] + name[len(old) :]


def check_rename(adapters: Iterable[WeightedAdapter], rename: Iterable[str]) -> None:
    """Refuse a beginning that no name of the adapters has.

    Raises:
        CheckpointError: There is one.
    """
    states = [adapter.state for adapter in adapters]
    names = {
        name for state in states for s in state.sites.values() for name in names_of_site(s.spec)
    }
    for state in states:
        names |= {*state.trained, *state.base_copies, *state.rows}
    for old in rename:
        if not any(name.startswith(old) for name in names):
            near = ", ".join(map(repr, nearest(old, names))) or "none"
            problem = f"no name of the adapters begins with '{old}'"
            raise CheckpointError(f"rename '{old}'", problem, f"Nearest names: {near}")


def check_adapters(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse what cannot be merged: nothing, an adapter twice, one of weight 0, of NaN or Inf."""
    if not adapters:
        raise CheckpointError("merge", "no adapter was given", "Name at least one")
    for adapter in adapters:
        _check_values(adapter)
    for one, other in combinations(adapters, 2):
        if _updates(one.state) == _updates(other.state):
            problem = "they are the same adapter, which would count twice"
            remedy = "Give it once, with the weight that is meant"
            raise CheckpointError(f"merge {one.label} and {other.label}", problem, remedy)


def _updates(state: AdapterState) -> AdapterState:
    """Return an adapter without what only says where it is from: a converted copy is the same."""
    return replace(state, config=None, fingerprint=None, base_copies={})


def _check_values(adapter: WeightedAdapter) -> None:
    asked, remedy = f"merge {adapter.label}", "Give a finite weight other than zero"
    check_type(f"{asked}, weight", adapter.weight, Real, remedy, CheckpointError)
    if not math.isfinite(adapter.weight) or adapter.weight == 0:
        raise CheckpointError(asked, f"its weight is {adapter.weight}", remedy)
    if not (adapter.state.sites or adapter.state.trained):
        remedy = "It is not a trained adapter; check the path"
        raise CheckpointError(asked, "it holds no tensors", remedy)
    for name, tensor in _tensors_of(adapter):
        if tensor.is_meta:
            problem = f"'{name}' is on the meta device"
            raise CheckpointError(asked, problem, "Load the adapter's values first")
        if not all_finite(tensor):
            remedy = "Its training diverged; take an earlier checkpoint of the adapter"
            raise CheckpointError(asked, f"'{name}' holds NaN or Inf", remedy)


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16` to write every float tensor so; None keeps each
            tensor's own.
        min_kept: Least share of every delta that must be left after rounding, in [0, 1]; if less is
            left, the merge fails before anything is visible. None: any.
        verify: Before publishing, compute every merged tensor again and compare every other byte.
        copy_code: Copy the base's `*.py` files.
        allow_new: Add trained tensors that the base lacks (a new classifier) instead of refusing.
        dequantize: `bfloat16`, `float16` or `float32`: write every quantized tensor of the base as
            plain floats, and a config without quantization.
        requantize: Quantize merged weights of a quantized base again, in their own format.
        any_base: Merge although the adapter's fingerprint says that it was made on another base.
        workers: Threads that compute; None: one for each core, at most four.
        rename: Beginnings of the adapters' names to what they begin with in the base, where they
            differ and the base's class does not say so.
        tie: Name of a tensor that the base's files lack to the stored tensor that it equals; empty
            if nothing is tied. None asks the base's class if an update may concern a tie.
    """

    dtype: str | None = None
    min_kept: float | None = None
    verify: bool = False
    copy_code: bool = False
    allow_new: bool = False
    dequantize: str | None = None
    requantize: bool = False
    any_base: bool = False
    workers: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    tie: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for option in ("dtype", "dequantize"):
            if (said := getattr(self, option)) is not None:  # an enum's member becomes plain text
                object.__setattr__(self, option, said := str(said))
            if said not in {None, *FORMAT_DTYPES}:
                remedy = f"Use {', '.join(FORMAT_DTYPES)}"
                raise CheckpointError(f"write {option} {said!r}", "it is not known", remedy)
        if self.requantize and self.dequantize is not None:
            problem = "both dequantize and requantize are given"
            raise CheckpointError("merge", problem, "Choose one of them")
        if self.min_kept is not None:
            asked = f"keep at least {self.min_kept} of every delta"
            remedy = "Give a number from 0 to 1, such as 0.98"
            check_type(asked, self.min_kept, Real, remedy, CheckpointError)
            if not 0 <= self.min_kept <= 1:
                raise CheckpointError(asked, "it is not a share", remedy)
        if self.workers is not None and self.workers < 1:
            raise CheckpointError(f"{self.workers} workers", "it is below 1", "Give 1 or more")

    @property
    def n_threads(self) -> int:
        """Number of threads that compute."""
        return self.workers or min(4, os.cpu_count() or 1)

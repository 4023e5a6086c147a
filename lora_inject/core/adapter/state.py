"""The adapter as a value: tensors and numbers, apart from any model.

Reading off a live model, loading, writing to files and folding into a checkpoint all take or make
an `AdapterState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter.fingerprint import Fingerprint
from lora_inject.core.adapter.site_state import Comparable, SiteState
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.spec.names import counted, show
from lora_inject.core.spec.tables import Shown
from lora_inject.errors import FormatError, LoraInjectError, StateError


@dataclass(frozen=True, eq=False, repr=False)
class AdapterState(Comparable, Shown):
    """An adapter as a value. It can be compared, copied and pickled.

    The functions of the package (`combine`, `truncate`, `diff`, `algebra.rename`, ...) compute with
    it. Values are equal if their contents are: specs, config, fingerprint, and tensors with their
    dtypes. They cannot be hashed, since tensors are mutable.

    Examples:
        >>> import torch
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> a = AdapterState({"fc": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> a
        AdapterState(1 site, rank 2, 0 trained tensors, 20 parameters)

    Attributes:
        sites: Site name to its state, in the order of the model.
        trained: Full trained copies by the name of the base's tensor (`classifier.weight`).
        config: The config it was made from, as plain data, or None if it is not known.
        fingerprint: Values that identify the base, or None if it is not known.
        base_copies: Tensors of the base that the file holds with the adapter, by the base's
            name: some programs store a whole embedding. They are not part of the adapter: loading
            compares them with the base, and refuses others.
        rows: For a trained tensor of which only some rows are held: their indices in the base.
        source: The files that it was read from, for messages; not part of its value.
        layers: The program that made its files, if the layers of that program add the update to
            their output: in some places that is not W + delta, and there a model refuses it. Not
            part of its value.
    """

    sites: Mapping[str, SiteState]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: str = field(default="", compare=False)
    layers: str = field(default="", compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle read-only mappings as dicts, since Python cannot do either."""
        values = (getattr(self, f.name) for f in fields(self))
        return AdapterState, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __str__(self) -> str:
        """Show the size, not the contents."""
        ranks = [site.spec.rank for site in self.sites.values()] or [0]
        low, high = min(ranks), max(ranks)
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        n_parameters = sum(site.spec.n_parameters for site in self.sites.values())
        n_parameters += sum(tensor.numel() for tensor in self.trained.values())
        counts = counted(len(self.sites), "site"), counted(len(self.trained), "trained tensor")
        return f"AdapterState({counts[0]}, {rank}, {counts[1]}, {n_parameters:,} parameters)"

    def check_tensors(self, error: type[LoraInjectError] = FormatError) -> None:
        """Refuse tensors that do not fit what is said of them, by raising `error`."""
        for name, tensor in self.trained.items():
            if not isinstance(tensor, Tensor):
                raise error("", f"'{name}' is not a tensor", "Pass tensors only")
        for name, rows in self.rows.items():
            copy = self.trained.get(name)
            where = f"trained tensor '{name}'"
            if copy is None or copy.dim() != 2 or len(copy) != len(rows) or not rows:
                problem = f"it has {len(rows)} row numbers for a tensor of other rows"
                raise error(where, problem, "Give one for each row")
            if len(set(rows)) < len(rows) or not all(type(n) is int and n >= 0 for n in rows):
                raise error(where, f"its rows are {show(rows)}", "Number each row once, from 0")
        for name, site in self.sites.items():
            if name != site.spec.name:
                problem = f"its spec has the name '{site.spec.name[:200]}'"
                raise error(f"site '{name[:200]}'", problem, "Rename sites by algebra.rename")
            site.check_tensors(error)

    def check_finite(self, asked: str, error: type[LoraInjectError] = StateError) -> None:
        """Refuse values that are NaN or infinite, or on the meta device, by raising `error`.

        A model with one of them returns NaN.
        """
        held = [tensor for site in self.sites.values() for tensor in site.tensors.values()]
        held += self.trained.values()
        if not any(tensor.is_meta for tensor in held) and all_finite(*held):
            return
        tensors = [
            (name, f"{role} of site", tensor)
            for name, site in self.sites.items()
            for role, tensor in site.tensors.items()
        ]
        tensors += [(name, "trained tensor", tensor) for name, tensor in self.trained.items()]
        for name, what, tensor in tensors:
            where = f"{asked}, {what} {name!r}" if asked else f"{what} {name!r}"
            if tensor.is_meta:
                problem = "it is on the meta device and has no values"
                raise error(where, problem, "Load its values first")
            if n := int((~torch.isfinite(tensor)).sum()):
                problem = f"it holds {n:,} NaN or infinite values"
                remedy = "Its training diverged; take an earlier checkpoint of the adapter"
                raise error(where, problem, remedy)

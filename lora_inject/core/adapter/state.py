"""The adapter as a value: tensors and numbers, apart from any model.

Reading off a live model, loading, writing to files and folding into a checkpoint all take or make
an `AdapterState`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_inject.core.adapter.fingerprint import Fingerprint
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.shown import Shown
from lora_inject.errors import LoraInjectError, StateError

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class AdapterState(Shown):
    """An adapter as a value. It can be compared, copied, pickled and computed with.

    `a * 0.5`, `-a`, `a + b` and `a - b` scale and add updates of W exactly: ranks are concatenated,
    and a frozen start (pissa, olora) becomes further ranks where sites are added. Results are new
    values that share tensors with the old ones, without a config. Values are equal if their
    contents are. They cannot be hashed, since tensors are mutable.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> a = AdapterState({"fc": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> a + a * 0.5
        AdapterState(1 site, rank 4, 0 trained tensors, 40 parameters)
        >>> round((a + a).distance(a * 2), 12), round(a.cosine(-a), 12)
        (0.0, -1.0)

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
    """

    sites: Mapping[str, SiteState]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    def __eq__(self, other: object) -> bool:
        """Compare by content: specs, config, fingerprint, and tensors with their dtypes."""
        if not isinstance(other, AdapterState):
            return NotImplemented
        from lora_inject.core.adapter.equality import same

        parts = (f.name for f in fields(self) if f.compare)
        return all(same(getattr(self, name), getattr(other, name)) for name in parts)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle read-only mappings as dicts, since Python cannot do either."""
        values = (getattr(self, f.name) for f in fields(self))
        return AdapterState, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __str__(self) -> str:
        """Show the size, not the contents."""
        from lora_inject.core.adapter.state_size import size_in_words

        return size_in_words(self.sites, self.trained)

    def check_finite(self, asked: str, error: type[LoraInjectError] = StateError) -> None:
        """Refuse values that are NaN or infinite, or on the meta device, by raising `error`.

        A model with one of them returns NaN.
        """
        tensors = [tensor for site in self.sites.values() for tensor in site.tensors.values()]
        tensors += self.trained.values()
        if not all_finite(*tensors) or any(tensor.is_meta for tensor in tensors):
            from lora_inject.core.adapter.not_finite import first_without_values

            raise first_without_values(self.sites, self.trained, asked, error)

    # Arithmetic ---------------------------------------------------------------------------------

    def __mul__(self, weight: float) -> AdapterState:
        """Scale the update; of A and B only the sign of B can change."""
        return _computed("scaled", self, weight)

    __rmul__ = __mul__

    def __neg__(self) -> AdapterState:
        """Return the update with the opposite sign."""
        return self * -1.0

    def __add__(self, other: AdapterState) -> AdapterState:
        """Add two updates of one base."""
        return _computed("weighted_sum", [self, other], [1.0, 1.0], "add adapters")

    def __sub__(self, other: AdapterState) -> AdapterState:
        """Subtract the update of another adapter of the same base."""
        return _computed("weighted_sum", [self, other], [1.0, -1.0], "subtract adapters")

    __radd__, __rsub__ = __add__, __sub__  # of what is not an adapter: the same error

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> AdapterState:
        """Return the best adapter of a lower rank, without forming a delta.

        See `lora_inject.truncate`, which also reports the error of each site.
        """
        return _computed("truncated_state", self, rank, energy)

    def cosine(self, other: AdapterState) -> float:
        """Return the cosine of the angle between two updates, over all sites; NaN for no update.

        A site that one of them lacks counts as zero there. Trained tensors are not counted: their
        change from the base is not known.
        """
        return float(room("algebra").cosine(self, other))

    def distance(self, other: AdapterState) -> float:
        """Return the Frobenius norm of the difference of two updates, over all sites.

        Trained tensors are not counted; `lora_inject.diff` lists them.
        """
        return float(room("algebra").distance(self, other))

    # The same update in another shape -----------------------------------------------------------

    @property
    def whole(self) -> AdapterState:
        """The same adapter with A and B of each expert of every stack."""
        return replace(self, sites={name: site.whole for name, site in self.sites.items()})

    def mapped(self, change: Callable[[Tensor], Tensor]) -> AdapterState:
        """Return the adapter with each of its tensors changed; what was one tensor stays one."""
        made: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = change(tensor)
            return made[id(tensor)]

        sites = {name: site.mapped(once) for name, site in self.sites.items()}
        return replace(self, sites=sites, trained={n: once(t) for n, t in self.trained.items()})

    def to(self, dtype: torch.dtype) -> AdapterState:
        """Return the adapter with its floating point tensors in another dtype.

        Args:
            dtype: A floating point dtype.

        Raises:
            StateError: `dtype` is not one, or a finite value would become infinite.
        """
        from lora_inject.core.adapter.casting import caster

        cast = caster(dtype)
        sites = {name: site.mapped(partial(cast, name)) for name, site in self.sites.items()}
        trained = {name: cast(name, tensor) for name, tensor in self.trained.items()}
        return replace(self, sites=sites, trained=trained)

    def select(self, *patterns: str) -> AdapterState:
        """Return the sites and trained tensors that patterns, as in a config, match.

        Raises:
            StateError: A pattern matches nothing.
        """
        from lora_inject.core.spec.named import named  # for those who ask by patterns

        kept = named([*self.sites, *self.trained], patterns, "select")
        return replace(self.only(kept), config=None)

    def only(self, names: Collection[str]) -> AdapterState:
        """Return the sites and trained tensors of these names."""

        def kept(values: Mapping[str, T]) -> dict[str, T]:
            return {name: value for name, value in values.items() if name in names}

        sites, trained, rows = kept(self.sites), kept(self.trained), kept(self.rows)
        return replace(self, sites=sites, trained=trained, rows=rows)

    def rename(self, new: Mapping[str, str] | Callable[[str], str]) -> AdapterState:
        """Return the adapter with other names of layers; see `algebra.values.renamed_adapter`."""
        return _computed("renamed_adapter", self, new)

    def split(self, pattern: str, sizes: Mapping[str, int] | None = None) -> AdapterState:
        """Split fused projections, as qkv to q, k, v; see `algebra.values.split_adapter`."""
        return _computed("split_adapter", self, pattern, sizes)

    def join(self, name: str, sizes: Mapping[str, int]) -> AdapterState:
        """Join sites to fused ones, as q, k, v to qkv; see `algebra.values.joined_adapter`."""
        return _computed("joined_adapter", self, name, sizes)

    def split_experts(self, pattern: str) -> AdapterState:
        """Split stacks to sites of single experts; see `algebra.values.adapter_of_experts`."""
        return _computed("adapter_of_experts", self, pattern)

    def join_experts(self, pattern: str, n: int) -> AdapterState:
        """Join sites of single experts to stacks; see `algebra.values.adapter_of_stacks`."""
        return _computed("adapter_of_stacks", self, pattern, n)


def _computed(function: str, *arguments: Any) -> AdapterState:
    """Return what a function of the arithmetic on values makes, which lies in its own room."""
    given = [a.whole if isinstance(a, AdapterState) else a for a in arguments]
    state: AdapterState = getattr(room("algebra"), function)(*given)
    return state

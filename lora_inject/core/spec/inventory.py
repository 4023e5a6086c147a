"""All names of a model, live or on the meta device, with what matching and its messages need."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

from lora_inject.core.spec.names import around, is_bias
from lora_inject.core.spec.patterns import Layers, Names
from lora_inject.core.spec.sites import Geometry

LINEAR_KINDS = ("linear", "conv1d")


class Candidate(NamedTuple):
    """A module or a parameter that may become a site; a tuple, as a model has thousands."""

    name: str  # canonical dotted name
    # row of the table of layer kinds: `linear`, `conv1d`, `embedding`, `conv`, ...; or `parameter`
    kind: str
    in_features: int  # width of the input of A
    out_features: int  # width of the output of B
    weight_shape: tuple[int, ...]  # shape of the weight tensor
    weight: str  # canonical name of the weight tensor in the state dict
    transposed: bool = False  # whether the weight matrix is `(in, out)`
    experts: int | None = None  # number of stacked matrices, or None
    owner: str = ""  # for a parameter, the name of the module that owns it
    aliases: tuple[str, ...] = ()  # other names of the same module or parameter
    tied: tuple[str, ...] = ()  # names of the same tensor in other modules
    # None, or what was found and what to do, where it may not be adapted
    refusal: tuple[str, str] | None = None
    # whether it is a stacked parameter, whose rule must say which dimension is which
    needs_layout: bool = False
    # `forward`, or `weight` where the weight is read rather than the module called
    update: Literal["forward", "weight"] = "forward"
    dtype: str = ""  # the weight's dtype, such as `bfloat16`, or empty where it is not known
    # names of the candidates that this one stands for: an attention module for its projections.
    # Such a name is not a site itself
    members: tuple[str, ...] = ()
    active: int | None = None  # of experts: to how many of them a token goes, where it is known

    @property
    def geometry(self) -> Geometry:
        """The shapes of the weight."""
        return Geometry(*(getattr(self, field) for field in Geometry._fields))

    @property
    def module(self) -> str:
        """Name of the module whose biases belong to this candidate."""
        return self.owner if self.kind == "parameter" else self.name

    @property
    def weight_names(self) -> list[str]:
        """Names of the weight of a module, the canonical one first."""
        tail = self.weight.removeprefix(self.name)
        return [self.weight, *(alias + tail for alias in self.aliases)]

    @property
    def all_names(self) -> list[str]:
        """Names of the module, and of its weight."""
        return [self.name, *self.aliases, *self.weight_names]

    def as_parameter(self, name: str) -> Candidate:
        """Return the same weight as a parameter, for a pattern that matches the weight alone."""
        further = tuple(self.weight_names[1:])
        return self._replace(
            name=name, kind="parameter", owner=self.name, update="weight", aliases=further
        )


class Mixture(NamedTuple):
    """A block that sends each token to a few of its experts."""

    name: str  # of the block
    top_k: int | None  # to how many experts a token goes, where it is known
    experts: tuple[str, ...]  # names of the candidates that are experts, or stacks of them


@dataclass(frozen=True)
class Inventory:
    """All names of a model, with what matching needs to know of each."""

    candidates: tuple[Candidate, ...]  # what may become a site, in model order
    # every other name of a module or a parameter, with the short reason why it is not one:
    # `container`, `LayerNorm`, `Dropout`, ...
    others: Mapping[str, str]
    # shape of every parameter, by canonical name, a tied one under its first name
    parameters: Mapping[str, tuple[int, ...]]
    # further names of parameters, with the one under which `parameters` has them
    aliases: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()  # names of the output head, as the model states
    buffers: tuple[str, ...] = ()  # names of buffers, which cannot be targeted
    mixtures: tuple[Mixture, ...] = ()  # the blocks that route tokens to experts

    @cached_property
    def sites(self) -> dict[str, int]:
        """Names and aliases of candidates, with the candidate's number."""
        sites = {candidate.name: i for i, candidate in enumerate(self.candidates)}
        for i, candidate in enumerate(self.candidates):
            for alias in candidate.aliases:
                sites.setdefault(alias, i)
        return sites

    @cached_property
    def weights(self) -> dict[str, int]:
        """Names of the weights of modules, with the candidate's number."""
        return {
            name: i
            for i, candidate in enumerate(self.candidates)
            if candidate.kind != "parameter" and candidate.weight
            for name in (candidate.weight_names if candidate.aliases else (candidate.weight,))
        }

    @cached_property
    def names(self) -> dict[str, None]:
        """Every name that a rule can match."""
        tables = (self.sites, self.weights, self.others, self.parameters, self.aliases)
        return dict.fromkeys(chain.from_iterable(tables))

    @cached_property
    def tables(self) -> frozenset[str]:
        """The weights of embeddings and of the output head, by their keys in `parameters`."""
        return frozenset(
            self.listed.get(candidate.weight, candidate.weight)
            for candidate in self.candidates
            if candidate.kind == "embedding" or candidate.name in self.heads
        )

    @cached_property
    def pool(self) -> Names:
        """These, as patterns are asked of them."""
        return Names(self.names)

    @cached_property
    def layers(self) -> Layers:
        """Their layers."""
        return Layers(self.names)

    @cached_property
    def known(self) -> Names:
        """Every name, modules and containers included, as patterns are asked of them."""
        return Names([*self.names, *self.modules])

    def under(self, pattern: str, wanted: Container[str], asked: str) -> list[str]:
        """Return what an entry means of some names: those that it ends, and what lies below."""
        below = self.known.below(self.known.matching(pattern, asked))
        return [name for name in below if name in wanted]

    @cached_property
    def listed(self) -> dict[str, str]:
        """Every name of a parameter, with its key in `parameters`."""
        return {**{name: name for name in self.parameters}, **self.aliases}

    @cached_property
    def modules(self) -> dict[str, None]:
        """Every module, containers included."""
        own = (n for n in self.names if n not in self.listed and n not in self.weights)
        return dict.fromkeys([*own, *around([*self.names, *self.listed])])

    def of_site(self, name: str, kind: str) -> Candidate | None:
        """Return the candidate that a site of this name and kind is on, None if there is none."""
        if (place := self.sites.get(name)) is not None:
            return self.candidates[place]
        place = self.weights.get(name) if kind == "parameter" else None
        return None if place is None else self.candidates[place].as_parameter(name)

    def reason(self, name: str) -> str:
        """Return why a name is not a candidate."""
        if name in self.others:
            return self.others[name]
        name = self.aliases.get(name, name)
        return "bias" if is_bias(name) else f"{len(self.parameters[name])}-d parameter"

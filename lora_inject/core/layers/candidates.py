"""Find what can become a site in a model, and how: the names that `matching` works on.

Only this file decides how a module would carry an adapter: by its output if its forward is known to
be linear in W, else by its weight, or not at all, for one of the reasons in `refusals`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.forwards import has_own_forward
from lora_inject.core.layers.kinds import kind_of
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.mixtures import with_mixtures
from lora_inject.core.layers.packed_weights import loaded_kinds
from lora_inject.core.layers.plain_tensors import dtype_name
from lora_inject.core.layers.raw_candidates import raw_candidate, whole_module
from lora_inject.core.layers.refusals import unfit, why_not
from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.spec.inventory import Candidate, Inventory, Mixture
from lora_inject.core.spec.names import is_bias, joined
from lora_inject.core.spec.sites import Geometry, Shape

# Modules whose name stands for all the weights in them.
NAMED_WHOLE = (nn.MultiheadAttention, nn.RNNBase)
_HEAD = "get_output_embeddings"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inventory(survey: Survey) -> Inventory:
    """Return every name of a model that a pattern can match.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        >>> listed = inventory(Survey(net))
        >>> listed.candidates[0].kind, listed.others["1"]
        ('linear', 'ReLU')
    """
    return _Listing(survey).inventory()


class _Class(NamedTuple):
    """What all modules of a class have in common, asked once for a model."""

    name: str
    kind: Any  # its `Adapted`, or None
    weight: str  # name of the weight
    stock: bool  # whether it computes what its kind's own class does

    @classmethod
    def of(cls, layer: type[nn.Module]) -> _Class:
        kind, plain = kind_of(layer), plain_class(layer)
        if kind is None:
            return cls(plain.__name__, None, "", stock=False)
        return cls(plain.__name__, kind, kind.weight_of(layer), kind.stock(plain))


class _Listing:
    """The names of one model.

    Attributes:
        survey: The model.
        asks: Whether a library that packs weights is loaded.
        away: Why weights on the meta device have no values, where a library offloads them.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        modules = [module for _, module in survey.modules]
        reasons = (library.away(modules) for library in loaded_libraries())
        self.asks = bool(loaded_kinds())
        self.away = next((reason for reason in reasons if reason is not None), None)
        self.aliases = self._first_names()
        self.classes: dict[type, _Class] = {}
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}
        self.parameters: dict[str, Shape] = {}

    def inventory(self) -> Inventory:
        survey = self.survey
        for name, module in survey.modules:
            self._module(name, module, survey.own[id(module)])
        mixtures = self._mixtures()
        return Inventory(
            mixtures=mixtures,
            candidates=tuple(self.candidates),
            others=self.others,
            parameters=self.parameters,
            aliases=self.aliases,
            heads=self._heads(),
            buffers=tuple(
                joined(n, key) for n, m in survey.modules for key, _ in m._buffers.items()
            ),
        )

    def _heads(self) -> tuple[str, ...]:
        """Return the names of the output heads that models and parts of them state."""
        classes = {cls for cls in self.classes if hasattr(cls, _HEAD)}
        modules = [m for _, m in self.survey.modules if type(m) in classes or _HEAD in m.__dict__]
        if not modules:
            return ()
        return stated_heads(self.survey, [getattr(module, _HEAD) for module in modules])

    def _mixtures(self) -> tuple[Mixture, ...]:
        """Return the blocks that route tokens; without lists and stacks there are none."""
        lists = any(isinstance(m, nn.ModuleList | nn.ModuleDict) for _, m in self.survey.modules)
        if not lists and all(c.experts is None for c in self.candidates):
            return ()
        self.candidates, mixtures = with_mixtures(self.survey, self.candidates)
        return mixtures

    def _first_names(self) -> dict[str, str]:
        """Return every further name of a parameter, with the one that it is listed under."""
        first = {name: names[0] for names in self.survey.tied.values() for name in names[1:]}
        for holder in self.survey.holders if self.survey.further else ():
            for alias in self.survey.further.get(id(holder.module), ()):
                first[joined(alias, holder.param)] = first.get(holder.name, holder.name)
        return first

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        known = self.classes.get(type(module))
        if known is None:
            known = self.classes[type(module)] = _Class.of(type(module))
        shapes = {key: () if is_lazy(p) else tuple(p.shape) for key, p in own.items()}
        empty = 0 in shapes.get(known.weight, ())
        if known.kind is not None and not empty:
            self._layer(name, module, known, shapes.get(known.weight))
        elif (whole := self._whole(name, module, own)) is not None:
            self.candidates.append(whole)
        else:
            self.others[name] = "container" if module._modules else "empty " * empty + known.name
        around = joined(name, "")
        for key, shape in shapes.items():
            full = around + key
            if full not in self.aliases:
                self.parameters[full] = shape
            if key != known.weight:
                self._parameter(full, module, key, own[key], shape)

    def _layer(self, name: str, module: nn.Module, known: _Class, shape: Shape | None) -> None:
        row, key, full = known.kind, known.weight, joined(name, known.weight)
        stated: Geometry = row.geometry(module)
        weight = self.survey.own[id(module)].get(key, module._buffers.get(key))
        adds = not has_own_forward(module) and row.adds_to_output(module, stock=known.stock)
        refusal = None
        if shape != stated.weight_shape or not self._is_plain(weight):
            refusal = self._refusal(module, key, weight, stated, adds)
        self.candidates.append(
            Candidate(
                name,
                row.kind,
                *stated[:3],
                full,
                *stated[3:],
                aliases=self.survey.further.get(id(module), ()),
                tied=self._tied(full, weight),
                refusal=refusal,
                update="forward" if adds else "weight",
                dtype="" if weight is None else dtype_name(weight.dtype),
            )
        )

    def _parameter(
        self, full: str, module: nn.Module, key: str, parameter: nn.Parameter, shape: Shape
    ) -> None:
        n_dims = len(shape)
        if (n_dims < 2 and not is_lazy(parameter)) or is_bias(key) or 0 in shape:
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        further = self.survey.further.get(id(module), ())
        self.candidates.append(
            raw_candidate(
                full,
                module,
                parameter,
                aliases=tuple(joined(n, key) for n in further),
                tied=self._tied(full, parameter),
                refusal=self._why_not(module, key, parameter),
            )
        )

    def _whole(
        self, name: str, module: nn.Module, own: dict[str, nn.Parameter]
    ) -> Candidate | None:
        """Return the candidate of a module whose name stands for all the weights in it."""
        if not name or not isinstance(module, NAMED_WHOLE):
            return None
        aliases = self.survey.further.get(id(module), ())
        return whole_module(name, module, own, aliases, self._why_not)

    def _refusal(
        self, module: nn.Module, key: str, weight: Tensor | None, stated: Geometry, adds: bool
    ) -> tuple[str, str] | None:
        return self._why_not(module, key, weight) or unfit(module, weight, stated, adds)

    def _is_plain(self, weight: Tensor | None) -> bool:
        """Whether a weight is what most are: a Parameter with its values."""
        if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS or self.asks:
            return False
        return self.away is None or not weight.is_meta

    def _why_not(
        self, module: nn.Module, key: str, weight: Tensor | None
    ) -> tuple[str, str] | None:
        return why_not(module, key, weight, asks=self.asks, away=self.away)

    def _tied(self, name: str, weight: Tensor | None) -> tuple[str, ...]:
        """Return the further names of a tensor."""
        if weight is None or not self.survey.tied:
            return ()
        return tuple(n for n in self.survey.tied.get(memory_of(weight), ()) if n != name)


def stated_heads(survey: Survey, stated: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the output heads; `stated` are the methods that return them."""
    heads = (head for get in stated if (head := _head(get)) is not None)
    return tuple(dict.fromkeys(survey.paths[id(h)] for h in heads if id(h) in survey.paths))


def _head(get: Any) -> nn.Module | None:
    """Return the output head that a method of a model states."""
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        return None
    return head if isinstance(head, nn.Module) else None

"""Find what can become a site in a model, and how: the names that `matching` works on.

Only this file decides how a module would carry an adapter: by its output if its forward is known to
be linear in W, else by its weight, or not at all, for a reason that is said with what to do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.kinds import kind_of
from lora_inject.core.layers.library import (
    loaded_kinds,
    loaded_libraries,
    reason_against,
)
from lora_inject.core.layers.mixtures import is_transposed, with_mixtures
from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.layers.swap import OLD_FORWARD, is_of_class
from lora_inject.core.layers.weight_kinds import dtype_name, is_quantized
from lora_inject.core.spec.inventory import Candidate, Inventory, Mixture
from lora_inject.core.spec.names import is_bias, joined, parent
from lora_inject.core.spec.sites import Geometry
from lora_inject.core.spec.variants import Shape

_WRITES = "max_norm"  # of an embedding
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Refusal = tuple[str, str] | None  # the problem and the remedy


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
        kinds: The ways of packing a weight of libraries that are loaded.
        away: Why weights on the meta device have no values, where a library offloads them.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        modules = [module for _, module in survey.modules]
        reasons = (library.away(modules) for library in loaded_libraries())
        self.kinds = loaded_kinds()
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
            heads=tuple(survey.paths[id(head)] for head in survey.tables("get_output_embeddings")),
            buffers=tuple(
                joined(n, key) for n, m in survey.modules for key, _ in m._buffers.items()
            ),
        )

    # ---------------------------------------------------------------------------------- the model

    def _first_names(self) -> dict[str, str]:
        """Return every further name of a parameter, with the one that it is listed under."""
        first = {name: names[0] for names in self.survey.tied.values() for name in names[1:]}
        for holder in self.survey.holders if self.survey.further else ():
            for alias in self._further(holder.module):
                first[joined(alias, holder.param)] = first.get(holder.name, holder.name)
        return first

    def _mixtures(self) -> tuple[Mixture, ...]:
        """Return the blocks that route tokens; without lists and stacks there are none."""
        lists = any(issubclass(cls, nn.ModuleList | nn.ModuleDict) for cls in self.classes)
        if not lists and all(c.experts is None for c in self.candidates):
            return ()
        self.candidates, mixtures = with_mixtures(self.survey, self.candidates)
        return mixtures

    def _further(self, module: nn.Module) -> tuple[str, ...]:
        """Return all names but the first of a module."""
        return self.survey.further.get(id(module), ())

    def _tied(self, name: str, weight: Tensor | None) -> tuple[str, ...]:
        """Return the further names of a tensor."""
        if weight is None or not self.survey.tied:
            return ()
        return tuple(n for n in self.survey.tied.get(memory_of(weight), ()) if n != name)

    # ---------------------------------------------------------------------------------- one module

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        known = self.classes.get(type(module))
        if known is None:
            known = self.classes[type(module)] = _Class.of(type(module))
        shapes = {
            key: () if type(p) is not nn.Parameter and is_lazy(p) else tuple(p.shape)
            for key, p in own.items()
        }
        empty = 0 in shapes.get(known.weight, ())
        if known.kind is not None and not empty:
            self._layer(name, module, known, own, shapes.get(known.weight))
        elif name and (members := _members(module, own)):
            self._whole(name, module, members)
        else:
            self.others[name] = "container" if module._modules else "empty " * empty + known.name
        around = joined(name, "")
        for key, shape in shapes.items():
            full = around + key
            if full not in self.aliases:
                self.parameters[full] = shape
            if key != known.weight:
                self._parameter(full, module, key, own[key], shape)

    def _layer(
        self,
        name: str,
        module: nn.Module,
        known: _Class,
        own: dict[str, nn.Parameter],
        shape: Shape | None,
    ) -> None:
        row, key, full = known.kind, known.weight, joined(name, known.weight)
        n_in, n_out, stated, transposed, experts = geometry = row.geometry(module)
        weight = own[key] if key in own else module._buffers.get(key)
        state = module.__dict__
        replaced = "forward" in state and _has_own_forward(module)
        adds = not replaced and row.adds_to_output(module, stock=known.stock)
        refusal, dtype = None, None if weight is None else weight.dtype
        writes = state.get(_WRITES) is not None
        if shape != stated or writes or not self._is_plain(weight, dtype):
            refusal = self._why_not(module, key, weight) or _unfit(module, weight, geometry, adds)
        aliases = self._further(module) if self.survey.further else ()
        tied = self._tied(full, weight) if self.survey.tied else ()
        update = "forward" if adds else "weight"
        said = "" if dtype is None else dtype_name(dtype)
        # From a tuple, as there are thousands: by keywords it takes three times as long.
        layout = name, row.kind, n_in, n_out, stated, full, transposed, experts
        rest = "", aliases, tied, refusal, False, update, said, (), None  # from `owner` on
        self.candidates.append(Candidate._make(layout + rest))

    def _parameter(
        self, full: str, module: nn.Module, key: str, parameter: nn.Parameter, shape: Shape
    ) -> None:
        """List a parameter of two or more dimensions, or one that is lazy, as a candidate."""
        n_dims = len(shape)
        if (n_dims < 2 and not is_lazy(parameter)) or is_bias(key) or 0 in shape:
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        known = is_transposed(module) if n_dims == 3 else None
        stated = _geometry(shape, transposed=bool(known))
        self.candidates.append(
            Candidate(
                full,
                "parameter",
                *stated[:3],
                full,
                *stated[3:],
                owner=parent(full),
                aliases=tuple(joined(n, key) for n in self._further(module)),
                tied=self._tied(full, parameter),
                refusal=self._why_not(module, key, parameter),
                needs_layout=n_dims > 2 and known is None,
                update="weight",
                dtype=dtype_name(parameter.dtype),
            )
        )

    def _whole(self, name: str, module: nn.Module, members: list[str]) -> None:
        """List an attention or a recurrent module, whose name stands for all weights in it."""
        computed = _computed(module)
        self.candidates.append(
            Candidate(
                name,
                "attention" if "out_proj" in members else "recurrent",
                *(0, 0, (), ""),
                aliases=self._further(module),
                members=() if computed else tuple(joined(name, key) for key in members),
                refusal=self._why_not(module, next(iter(computed)), None) if computed else None,
            )
        )

    # ------------------------------------------------------------------------------------- why not

    def _is_plain(self, weight: Tensor | None, dtype: torch.dtype | None) -> bool:
        """Whether a weight is what most are: a Parameter with its values."""
        if type(weight) is not nn.Parameter or dtype not in _FLOATS or self.kinds:
            return False
        return self.away is None or not weight.is_meta

    def _why_not(self, module: nn.Module, key: str, parameter: Tensor | None) -> Refusal:
        """Return why a module or a parameter cannot carry an adapter, and what to do."""
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
        if (computed := _computed(module)) and key in computed:
            problem = (
                f"the weight of {cls} is computed by a parametrization: W + delta has no tensor to "
                "be merged into, and no name in a state dict"
            )
            remedy = (
                f"Name what it is computed of ('parametrizations.{key}.{computed[key]}'), or call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
            return problem, remedy
        if module.__dict__.get(_WRITES) is not None:
            problem = f"the forward of {cls} scales rows of its weight in place ({_WRITES})"
            return problem, f"Leave it out, or set its {_WRITES} to None"
        if (reason := reason_against("inject", module, parameter, self.kinds)) is not None:
            return reason
        if parameter is None:
            problem = f"{cls} holds no parameter {key!r} of its own"
            remedy = "Name what it is computed of ('weight_v' of weight_norm), or remove that"
            return problem, remedy
        if parameter.dtype.is_complex:
            problem = f"the weight of {cls} is complex, and an adapter's factors are real"
            return problem, "Leave it out"
        if is_lazy(parameter):
            return f"{cls} is lazy and not initialized", "Run the model once first"
        return self.away if parameter.is_meta else None


def _unfit(module: nn.Module, weight: Tensor | None, stated: Geometry, adds: bool) -> Refusal:
    """Say where a weight is not what the layer states, or cannot be read where it has to be."""
    if weight is None:
        return None
    cls = plain_class(type(module)).__name__
    if is_quantized(weight):
        if adds:
            return None  # a packed weight has another shape by design
        if type(weight) is nn.Parameter and weight.is_floating_point():  # cast in each forward
            problem = f"its weight is kept in {dtype_name(weight.dtype)}"
            return problem, "Inject first, then cast (enable_layerwise_casting)"
        problem = f"its weight is a packed {type(weight).__name__}, and the forward of {cls} is "
        problem += "not known"
        return problem, "State that its output is linear in the weight: extending.register_kind"
    if weight.shape != stated.weight_shape:
        problem = f"{cls} states sizes {stated.weight_shape}, and its weight has "
        problem += str(tuple(weight.shape))
        return problem, "Set the layer's sizes to those of its weight (was it resized or sharded?)"
    return None


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a forward on the instance does not call that of its class."""
    if is_of_class(module.__dict__.get(OLD_FORWARD), module):
        return False
    return not any(library.calls_class(module) for library in loaded_libraries())


def _computed(module: nn.Module) -> dict[str, str]:
    """Return the parameters that torch's parametrize computes, and the last name of what of."""
    lists = module._modules.get("parametrizations")
    inside = {} if lists is None else lists._modules
    return {key: list(each._parameters)[-1] for key, each in inside.items() if each is not None}


def _geometry(shape: tuple[int, ...], *, transposed: bool) -> Geometry:
    """Return how a raw parameter is a matrix, or a stack of them."""
    if len(shape) < 2:
        return Geometry(0, 0, shape)
    n_out, n_in = shape[:-3:-1] if transposed else shape[-2:]
    experts = math.prod(shape[:-2]) if len(shape) > 2 else None
    return Geometry(n_in, n_out, shape, transposed=transposed, experts=experts)


def _members(module: nn.Module, own: dict[str, nn.Parameter]) -> list[str]:
    """Return what is meant by the name of an attention or a recurrent module: what it reads."""
    if isinstance(module, nn.MultiheadAttention):
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [*filter(own.__contains__, keys), "out_proj"]
    recurrent = isinstance(module, nn.RNNBase)
    return [key for key in own if key.startswith("weight")] if recurrent else []

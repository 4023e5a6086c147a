"""Find what can become a site in a model, and how: the names that `matching` works on.

Only this file decides how a module would carry an adapter: by its output if its forward is known to
be linear in W, else by its weight, or not at all, with the reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.adapted import Adapted, plain_class
from lora_inject.core.layers.forwards import has_own_forward, loaded_owners
from lora_inject.core.layers.kinds import kind_of
from lora_inject.core.layers.packed_weights import loaded_kinds, reason_against
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.spec.inventory import Candidate, Inventory, Mixture
from lora_inject.core.spec.names import is_bias, joined, parent
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import Geometry

# These parents read the weights of their children, or do so in a fast path.
READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def inventory(survey: Survey) -> Inventory:
    """Return every name of a model that a pattern can match.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        >>> listed = inventory(Survey(net))
        >>> listed.candidates[0].kind, listed.others["1"]
        ('linear', 'ReLU')
    """
    return _Listing(survey).inventory()


class _Listing:
    """The names of one model.

    Attributes:
        survey: The model.
        read: Modules whose weights their parent reads, by id.
        asks: Whether a library that packs weights is loaded.
        away: Why weights on the meta device have no values, where a library offloads them.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        modules = [module for _, module in survey.modules]
        readers = (m for m in modules if isinstance(m, READING_PARENTS))
        self.read = {id(child) for reader in readers for child in reader._modules.values()}
        reasons = (owner.away(modules) for owner in loaded_owners())
        self.asks = bool(loaded_kinds())
        self.away = next((reason for reason in reasons if reason is not None), None)
        self.aliases = self._first_names()
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}

    def inventory(self) -> Inventory:
        survey, parameters = self.survey, dict[str, tuple[int, ...]]()
        for name, module in survey.modules:
            self._module(name, module, survey.own[id(module)])
        for holder, tensor in zip(survey.holders, survey.tensors, strict=True):
            if holder.name not in self.aliases:
                parameters[holder.name] = _shape(tensor)
        named = (survey.paths[id(h)] for h in _heads(survey) if id(h) in survey.paths)
        mixtures = self._mixtures()
        return Inventory(
            mixtures=mixtures,
            candidates=tuple(self.candidates),
            others=self.others,
            parameters=parameters,
            aliases=self.aliases,
            heads=tuple(dict.fromkeys(named)),
            buffers=tuple(
                joined(n, key) for n, m in survey.modules for key, _ in m._buffers.items()
            ),
        )

    def _mixtures(self) -> tuple[Mixture, ...]:
        """Return the blocks that route tokens; without lists and stacks there are none."""
        lists = any(isinstance(m, nn.ModuleList | nn.ModuleDict) for _, m in self.survey.modules)
        if not lists and all(c.experts is None for c in self.candidates):
            return ()
        self.candidates, mixtures = room("mixtures").with_mixtures(self.survey, self.candidates)
        return mixtures  # type: ignore[no-any-return]

    def _first_names(self) -> dict[str, str]:
        """Return every further name of a parameter, with the one that it is listed under."""
        first = {name: names[0] for names in self.survey.tied.values() for name in names[1:]}
        for holder in self.survey.holders if self.survey.further else ():
            for alias in self.survey.further.get(id(holder.module), ()):
                first[joined(alias, holder.param)] = first.get(holder.name, holder.name)
        return first

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        row = kind_of(module)
        weight_name = "" if row is None else row.weight_of(module)
        empty = 0 in _shape(own.get(weight_name))
        if row is not None and not empty:
            self._layer(name, module, row, weight_name)
        elif name and (members := _members(module, own)):
            self._whole(name, module, members)
        else:
            kind = "empty " * empty + plain_class(type(module)).__name__
            self.others[name] = "container" if module._modules else kind
        for key, parameter in own.items():
            if key != weight_name:
                self._parameter(joined(name, key), module, key, parameter)

    def _layer(self, name: str, module: nn.Module, row: type[Adapted], key: str) -> None:
        stated = row.geometry(module)
        weight = self.survey.own[id(module)].get(key, module._buffers.get(key))
        adds = (
            not has_own_forward(module)
            and id(module) not in self.read
            and row.adds_to_output(module)
        )
        refusal = self._refusal(module, key, weight) or _unfit(module, weight, stated, adds)
        self.candidates.append(
            Candidate(
                name,
                row.kind,
                *_shapes(stated, joined(name, key)),
                aliases=self.survey.further.get(id(module), ()),
                tied=self._tied(joined(name, key), weight),
                refusal=refusal,
                update="forward" if adds else "weight",
                dtype="" if weight is None else _dtype(weight.dtype),
            )
        )

    def _whole(self, name: str, module: nn.Module, members: list[str]) -> None:
        """The name of an attention or a recurrent module stands for all weights in it."""
        computed = _computed(module)
        candidate = Candidate(
            name,
            "attention" if "out_proj" in members else "recurrent",
            *(0, 0, (), ""),
            aliases=self.survey.further.get(id(module), ()),
            members=() if computed else tuple(joined(name, key) for key in members),
            refusal=self._refusal(module, next(iter(computed)), None) if computed else None,
        )
        self.candidates.append(candidate)

    def _parameter(self, full: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        shape = _shape(parameter)
        n_dims = len(shape)
        if (n_dims < 2 and not nn.parameter.is_lazy(parameter)) or is_bias(key) or 0 in shape:
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        known = room("stacks").is_transposed(module) if n_dims == 3 else None
        stated = _raw_geometry(shape, transposed=bool(known))
        self.candidates.append(
            Candidate(
                full,
                "parameter",
                *_shapes(stated, full),
                owner=parent(full),
                aliases=tuple(joined(n, key) for n in self.survey.further.get(id(module), ())),
                tied=self._tied(full, parameter),
                refusal=self._refusal(module, key, parameter),
                needs_layout=n_dims > 2 and known is None,
                update="weight",
                dtype=_dtype(parameter.dtype),
            )
        )

    def _tied(self, name: str, weight: Tensor | None) -> tuple[str, ...]:
        """Return the further names of a tensor."""
        if weight is None or not self.survey.tied:
            return ()
        return tuple(n for n in self.survey.tied.get(memory_of(weight), ()) if n != name)

    def _refusal(
        self, module: nn.Module, key: str, parameter: Tensor | None
    ) -> tuple[str, str] | None:
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
        if self.asks and (reason := reason_against("inject", module, parameter)) is not None:
            return reason
        if parameter is None:
            problem = f"{cls} holds no parameter {key!r} of its own"
            remedy = "Name what it is computed of ('weight_v' of weight_norm), or remove that"
            return problem, remedy
        if parameter.dtype.is_complex:
            return (
                f"the weight of {cls} is complex, and an adapter's factors are real",
                "Leave it out",
            )
        if nn.parameter.is_lazy(parameter):
            return f"{cls} is lazy and not initialized", "Run the model once first"
        if parameter.is_meta:
            return self.away
        return None


def _shapes(stated: Geometry, weight: str) -> tuple[int, int, tuple[int, ...], str, bool, Any]:
    """Return the fields of a candidate that a geometry states, with its weight's name."""
    n_in, n_out, shape, transposed, experts = stated
    return n_in, n_out, shape, weight, transposed, experts


def _unfit(
    module: nn.Module, weight: Tensor | None, stated: Geometry, adds: bool
) -> tuple[str, str] | None:
    """Say where a weight is not what the layer states, or cannot be read where it has to be."""
    if weight is None:
        return None
    if is_quantized(weight):
        if adds:
            return None  # a packed weight has another shape by design
        if type(weight) is nn.Parameter and weight.is_floating_point():  # cast in each forward
            problem = f"its weight is kept in {_dtype(weight.dtype)}"
            return problem, "Inject first, then cast (enable_layerwise_casting)"
        cls = plain_class(type(module)).__name__
        problem = (
            f"its weight is a packed {type(weight).__name__}, and the forward of {cls} is not known"
        )
        return problem, "State that its output is linear in the weight: register_kind"
    if weight.shape != stated.weight_shape:
        cls = plain_class(type(module)).__name__
        problem = (
            f"{cls} states sizes {stated.weight_shape}, and its weight has {tuple(weight.shape)}"
        )
        return problem, "Set the layer's sizes to those of its weight (was it resized or sharded?)"
    return None


def _computed(module: nn.Module) -> dict[str, str]:
    """Return the parameters that torch's parametrize computes, and the last name of what of."""
    lists = module._modules.get("parametrizations")
    inside = {} if lists is None else lists._modules
    return {key: list(each._parameters)[-1] for key, each in inside.items() if each is not None}


def _members(module: nn.Module, own: dict[str, nn.Parameter]) -> list[str]:
    """Return what is meant by the name of an attention or a recurrent module: what it reads."""
    if isinstance(module, nn.MultiheadAttention):
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [*filter(own.__contains__, keys), "out_proj"]
    recurrent = isinstance(module, nn.RNNBase)
    return [key for key in own if key.startswith("weight")] if recurrent else []


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(parameter: nn.Parameter | None) -> tuple[int, ...]:
    """Return a parameter's shape; `()` if it is missing or not initialized."""
    known = parameter is not None and not nn.parameter.is_lazy(parameter)
    return tuple(parameter.shape) if known else ()  # type: ignore[union-attr]


def _raw_geometry(shape: tuple[int, ...], *, transposed: bool) -> Geometry:
    if len(shape) < 2:
        return Geometry(0, 0, shape)
    n_out, n_in = shape[:-3:-1] if transposed else shape[-2:]
    experts = math.prod(shape[:-2]) if len(shape) > 2 else None
    return Geometry(n_in, n_out, shape, transposed=transposed, experts=experts)


_HEAD = "get_output_embeddings"


def _heads(survey: Survey) -> Iterator[nn.Module]:
    """Yield the output heads that models and parts of them state."""
    classes = {type(module) for _, module in survey.modules}
    stating = {cls for cls in classes if hasattr(cls, _HEAD)}
    for _, module in survey.modules:
        if type(module) in stating or _HEAD in module.__dict__:
            head = _output_head(module)
            if head is not None:
                yield head


def _output_head(module: nn.Module) -> nn.Module | None:
    """Return the output head that a model states by get_output_embeddings()."""
    get = getattr(module, _HEAD)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        return None
    return head if isinstance(head, nn.Module) else None

"""Find what can become a site in a model, and how: the names that `matching` works on.

Only this file decides how a module would carry an adapter: by its output if its forward is known to
be linear in W, else by its weight, or not at all, with the reason.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.layers.adapted import Adapted, Geometry, plain_class
from lora_inject.layers.kinds import kind_of
from lora_inject.layers.reading import is_quantized
from lora_inject.layers.survey import Survey, memory_of
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import is_bias, joined

# These parents read the weights of their children, or do so in a fast path.
READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def inventory(survey: Survey) -> Inventory:
    """Return every name of a model that a pattern can match.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        >>> found = inventory(Survey(net))
        >>> found.candidates[0].kind, found.others["1"]
        ('linear', 'ReLU')
    """
    return _Listing(survey).inventory()


class _Listing:
    """The names of one model.

    Attributes:
        survey: The model.
        read: Modules whose weights their parent reads, by id.
        hooked: Whether accelerate has put hooks on the model.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        modules = [module for _, module in survey.modules]
        readers = (m for m in modules if isinstance(m, READING_PARENTS))
        self.read = {id(child) for reader in readers for child in reader._modules.values()}
        self.hooked = any("_hf_hook" in module.__dict__ for module in modules)
        self.further = {name for names in survey.tied.values() for name in names[1:]}
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.buffers: list[str] = []
        self.heads: list[str] = []

    def inventory(self) -> Inventory:
        for name, module in self.survey.modules:
            self._module(name, module, self.survey.own[id(module)])
        return Inventory(
            candidates=tuple(self.candidates),
            others=self.others,
            parameters=self.parameters,
            aliases=self._first_names(),
            heads=tuple(dict.fromkeys(self.heads)),
            buffers=tuple(self.buffers),
        )

    def _first_names(self) -> dict[str, str]:
        """Return every further name of a parameter, with the one that it is listed under."""
        first = {name: names[0] for names in self.survey.tied.values() for name in names[1:]}
        further = self.survey.further
        for name, module in self.survey.modules if further else ():
            for alias in further.get(id(module), ()):
                for key in self.survey.own[id(module)]:
                    full = joined(name, key)
                    first[joined(alias, key)] = first.get(full, full)
        return first

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        if (head := _output_head(module)) is not None and id(head) in self.survey.paths:
            self.heads.append(self.survey.paths[id(head)])
        self.buffers += [joined(name, key) for key, _ in module._buffers.items()]
        row = kind_of(module)
        empty = row is not None and 0 in _shape(own.get(row.weight_of(module)))
        if row is not None and not empty:
            self.candidates.append(self._candidate(name, module, row, own))
        elif name and (members := _members(module, own)):
            self.candidates.append(self._whole(name, module, members))
        else:
            kind = "empty " * empty + plain_class(type(module)).__name__
            self.others[name] = "container" if module._modules else kind
        for key, parameter in own.items():
            full = joined(name, key)
            if full not in self.further:
                self.parameters[full] = _shape(parameter)
            if row is None or key != row.weight_of(module):
                self._parameter(full, module, key, parameter)

    def _candidate(
        self, name: str, module: nn.Module, row: type[Adapted], own: dict[str, nn.Parameter]
    ) -> Candidate:
        shapes = row.geometry(module)
        key = row.weight_of(module)
        weight = own.get(key, module._buffers.get(key))
        full = joined(name, key)
        # A forward on the instance is not that of the class; accelerate's calls it, and is rebound.
        patched = "forward" in module.__dict__ and "_old_forward" not in module.__dict__
        patched = patched and not _calls_class(module.__dict__["forward"])
        adds = not patched and id(module) not in self.read and row.adds_to_output(module)
        refusal = self._refusal(module, key, weight) or _unfit(module, weight, shapes, adds)
        return Candidate(
            name=name,
            kind=row.kind,
            **shapes._asdict(),
            weight=full,
            aliases=self.survey.further.get(id(module), ()),
            tied=self._tied(full, weight),
            refusal=refusal,
            update="forward" if adds else "weight",
            dtype="" if weight is None else _dtype(weight.dtype),
        )

    def _whole(self, name: str, module: nn.Module, members: list[str]) -> Candidate:
        """The name of an attention or a recurrent module stands for all weights in it."""
        computed = _computed(module)
        return Candidate(
            name,
            "attention" if "out_proj" in members else "recurrent",
            *(0, 0, (), ""),
            aliases=self.survey.further.get(id(module), ()),
            members=() if computed else tuple(joined(name, key) for key in members),
            refusal=self._refusal(module, next(iter(computed)), None) if computed else None,
        )

    def _parameter(self, full: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        n_dims = len(_shape(parameter))
        empty = 0 in _shape(parameter)
        if (n_dims < 2 and not nn.parameter.is_lazy(parameter)) or is_bias(key) or empty:
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        known = _experts_transposed(module) if n_dims == 3 else None
        aliases = self.survey.further.get(id(module), ())
        self.candidates.append(
            Candidate(
                name=full,
                kind="parameter",
                **_raw_geometry(parameter, transposed=bool(known))._asdict(),
                weight=full,
                owner=full.rpartition(".")[0],
                aliases=tuple(joined(alias, key) for alias in aliases),
                tied=self._tied(full, parameter),
                refusal=self._refusal(module, key, parameter),
                needs_layout=n_dims > 2 and known is None,
                update="weight",
                dtype=_dtype(parameter.dtype),
            )
        )

    def _tied(self, full: str, parameter: Tensor | None) -> tuple[str, ...]:
        if not self.survey.tied or parameter is None:
            return ()
        names = self.survey.tied.get(memory_of(parameter), ())
        return tuple(name for name in names if name != full)

    def _refusal(
        self, module: nn.Module, key: str, parameter: Tensor | None
    ) -> tuple[str, str] | None:
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
        if (computed := _computed(module)) and key in computed:
            found = (
                f"the weight of {cls} is computed by a parametrization: W + delta has no tensor to "
                "be merged into, and no name in a state dict"
            )
            remedy = (
                f"Name what it is computed of ('parametrizations.{key}.{computed[key]}'), or call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
            return found, remedy
        if parameter is None and hasattr(module, "quantization_scheme"):
            found = "compressed-tensors unpacks its weight when the model first runs"
            return found, "Run the model once, or load it with dequantize=True, then inject"
        if parameter is None:
            found = f"{cls} holds no parameter {key!r} of its own"
            remedy = "Name what it is computed of ('weight_v' of weight_norm), or remove that"
            return found, remedy
        if parameter.is_complex():
            return (
                f"the weight of {cls} is complex, and an adapter's factors are real",
                "Leave it out",
            )
        if nn.parameter.is_lazy(parameter):
            return f"{cls} is lazy and not initialized", "Run the model once first"
        if self.hooked and parameter.device.type == "meta":
            found = "accelerate has offloaded its weights"
            return found, "Inject before dispatch_model, or load the model without offload"
        return None


def _unfit(
    module: nn.Module, weight: Tensor | None, stated: Geometry, adds: bool
) -> tuple[str, str] | None:
    """Say where a weight is not what the layer states, or cannot be read where it has to be."""
    if weight is None:
        return None
    cls = plain_class(type(module)).__name__
    if is_quantized(weight):
        if adds:
            return None  # a packed weight has another shape by design
        found = (
            f"its weight is a packed {type(weight).__name__}, and the forward of {cls} is not known"
        )
        return found, "State that its output is linear in the weight: register_kind"
    if tuple(weight.shape) != stated.weight_shape:
        found = (
            f"{cls} states sizes {stated.weight_shape}, and its weight has {tuple(weight.shape)}"
        )
        return found, "Set the layer's sizes to those of its weight (was it resized or sharded?)"
    return None


def _calls_class(forward: Any) -> bool:
    """Whether a forward is one of compressed-tensors' that calls the forward of the class."""
    function = getattr(forward, "__func__", None)
    while function is not None:
        owner = function.__globals__.get("__name__", "")
        if owner.startswith("compressed_tensors.") and "__class__" in function.__code__.co_names:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


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
    return (
        [key for key in own if key.startswith("weight")] if isinstance(module, nn.RNNBase) else []
    )


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(parameter: nn.Parameter | None) -> tuple[int, ...]:
    """Return a parameter's shape; `()` if it is missing or not initialized."""
    known = parameter is not None and not nn.parameter.is_lazy(parameter)
    return tuple(parameter.shape) if known else ()  # type: ignore[union-attr]


def _raw_geometry(parameter: nn.Parameter, *, transposed: bool = False) -> Geometry:
    shape = _shape(parameter)
    if len(shape) < 2:
        return Geometry(0, 0, shape)
    n_out, n_in = shape[:-3:-1] if transposed else shape[-2:]
    experts = math.prod(shape[:-2]) if len(shape) > 2 else None
    return Geometry(n_in, n_out, shape, transposed=transposed, experts=experts)


def _experts_transposed(module: nn.Module) -> bool | None:
    """Return whether stacked experts are `(in, out)`, where transformers' class states it."""
    own = module.__dict__  # set by transformers' use_experts_implementation, always both
    stated = own.get("is_transposed") if "is_concatenated" in own else None
    return stated if isinstance(stated, bool) else None


def _output_head(module: nn.Module) -> nn.Module | None:
    """Return the output head that a model states by transformers' get_output_embeddings()."""
    get = getattr(module, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        return None
    return head if isinstance(head, nn.Module) else None

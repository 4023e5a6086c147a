"""What of a model can become a site, and how: the names that `matching` works on.

Here, and only here, it is decided how a module would carry an adapter: by its output where its
forward is known or found to be linear in W, else by its weight, or not at all and why.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from lora_inject.layers.adapted import Adapted, Geometry, WeightUpdate, plain_class
from lora_inject.layers.embedding_kind import LoRAEmbedding
from lora_inject.layers.kinds import kind_of
from lora_inject.layers.probe import linear_in_weight
from lora_inject.layers.survey import Survey
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import is_bias, joined

# These parents read the weights of their children, or do so in a fast path.
READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def inventory(survey: Survey) -> Inventory:
    """Return every name of a model that a pattern can match.

    Args:
        survey: Of any model, also on the meta device.

    Returns:
        Candidates with their kinds and shapes, the reasons against all other names, and the shapes
        of all base parameters.

    Example:
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
        first: First name of each tensor, by its id.
        tied: All names of each tensor that has several, by its id.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.read: set[int] = set()
        self.hooked = False
        self.first: dict[int, str] = {}
        self.tied: dict[int, list[str]] = {}
        for name, module in survey.modules:
            if isinstance(module, READING_PARENTS):
                self.read.update(map(id, module._modules.values()))
            self.hooked = self.hooked or "_hf_hook" in module.__dict__
            for key, parameter in survey.own[id(module)].items():
                full = joined(name, key)
                first = self.first.setdefault(id(parameter), full)
                if first is not full:
                    self.tied.setdefault(id(parameter), [first]).append(full)
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.buffers: list[str] = []
        self.heads: list[str] = []
        self.stock: dict[tuple[type, type], bool] = {}

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
        first = {name: names[0] for names in self.tied.values() for name in names[1:]}
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
        if row is not None:
            self.candidates.append(self._candidate(name, module, row, own))
        elif isinstance(module, nn.RNNBase) and name:
            cls = plain_class(type(module)).__name__
            refusal = _fused_kernel(module)
            self.candidates.append(Candidate(name, cls, 0, 0, (), "", refusal=refusal))
        elif isinstance(module, nn.MultiheadAttention) and name:
            self.candidates.append(self._attention(name, module, own))
        else:
            container = bool(module._modules)
            self.others[name] = "container" if container else plain_class(type(module)).__name__
        for key, parameter in own.items():
            full = joined(name, key)
            if self.first[id(parameter)] == full:
                self.parameters[full] = _shape(parameter)
            if row is None or key != row.weight_name:
                self._parameter(full, module, key, parameter)

    def _candidate(
        self, name: str, module: nn.Module, row: type[Adapted], own: dict[str, nn.Parameter]
    ) -> Candidate:
        shapes = row.geometry(module)
        weight = own.get(row.weight_name)
        full = joined(name, row.weight_name)
        refusal = self._refusal(module, row.weight_name, weight)
        forward = refusal is not None or self._adds_to_output(module, row, weight)
        return Candidate(
            name=name,
            kind=row.kind,
            in_features=shapes.in_features,
            out_features=shapes.out_features,
            weight_shape=shapes.weight_shape,
            transposed=shapes.transposed,
            experts=shapes.experts,
            weight=full,
            aliases=self.survey.further.get(id(module), ()),
            tied=self._tied(full, weight),
            refusal=refusal,
            update="forward" if forward else "weight",
            dtype="" if weight is None else _dtype(weight.dtype),
        )

    def _attention(
        self, name: str, module: nn.MultiheadAttention, own: dict[str, nn.Parameter]
    ) -> Candidate:
        """Whoever names an attention module means its projections, which it reads."""
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        members = tuple(joined(name, key) for key in (*filter(own.__contains__, keys), "out_proj"))
        width = int(module.embed_dim)
        aliases = self.survey.further.get(id(module), ())
        return Candidate(
            name,
            "attention",
            width,
            width,
            (),
            "",
            aliases=aliases,
            members=members,
            update="weight",
        )

    def _parameter(self, full: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        n_dims = len(_shape(parameter))
        if (n_dims < 2 and not nn.parameter.is_lazy(parameter)) or is_bias(key):
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        known = _experts_transposed(module) if n_dims == 3 else None
        shapes = _raw_geometry(parameter, transposed=bool(known))
        owner = full.rpartition(".")[0]
        self.candidates.append(
            Candidate(
                name=full,
                kind="parameter",
                in_features=shapes.in_features,
                out_features=shapes.out_features,
                weight_shape=shapes.weight_shape,
                weight=full,
                transposed=shapes.transposed,
                experts=shapes.experts,
                owner=owner,
                aliases=tuple(
                    joined(alias, key) for alias in self.survey.further.get(id(module), ())
                ),
                tied=self._tied(full, parameter),
                refusal=_fused_kernel(module) or self._refusal(module, key, parameter),
                needs_layout=n_dims > 2 and known is None,
                update="weight",
                dtype=_dtype(parameter.dtype),
            )
        )

    def _tied(self, full: str, parameter: nn.Parameter | None) -> tuple[str, ...]:
        names = self.tied.get(id(parameter)) if self.tied else None
        return () if names is None else tuple(name for name in names if name != full)

    def _adds_to_output(
        self, module: nn.Module, row: type[Adapted], weight: nn.Parameter | None
    ) -> bool:
        """Whether adding to the module's output is right; else its weight is mounted."""
        if (
            issubclass(row, WeightUpdate)
            or id(module) in self.read
            or not row.adds_to_output(module)
        ):
            return False
        cls = type(module)
        stock = self.stock.get((cls, row))
        if stock is None:
            stock = self.stock[cls, row] = row.stock(plain_class(cls))
        if stock:
            return True
        if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
            return True  # quantised: the class itself multiplies by what W stands for
        ids = issubclass(row, LoRAEmbedding)
        return linear_in_weight(module, row.geometry(module).transposed, ids, row.weight_name)

    def _refusal(
        self, module: nn.Module, key: str, parameter: nn.Parameter | None
    ) -> tuple[str, str] | None:
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
        if "parametrizations" in module._modules:
            return (
                f"the weight of {cls} is parametrised, so that a merge would write to a temporary",
                "Call torch.nn.utils.parametrize.remove_parametrizations first",
            )
        if parameter is None:
            return (
                f"{cls} holds no parameter {key!r} of its own (weight_norm?)",
                "Remove what computes it first",
            )
        if nn.parameter.is_lazy(parameter):
            return f"{cls} is lazy and not initialised", "Run the model once first"
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            return (
                f"this {cls} has its own forward on the instance, which would hide the adapter",
                "Inject before patching the module, or remove the patch",
            )
        if self.hooked and parameter.device.type == "meta":
            return (
                "accelerate has offloaded its weights",
                "Inject before dispatch_model, or load the model without offload",
            )
        return None


def _fused_kernel(module: nn.Module) -> tuple[str, str] | None:
    if not isinstance(module, nn.RNNBase):
        return None
    found = (
        f"{type(module).__name__} hands its weights to a fused kernel in a list of its own, so "
        "that an adapted one would not be read"
    )
    return found, "Adapt the layers around it"


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)


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

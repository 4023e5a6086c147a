"""The mixtures of experts in a model: which weights are experts, and what chooses among them.

1. A stack is experts if its class is one of transformers' classes of experts.
2. Any other stack of E matrices, and a ModuleList or ModuleDict of E modules of one class, is
   experts if beside it lies a router: a part whose only matrix has E outputs.
3. Without a class that is known, somebody must also say to how many experts a token goes: the
   router, what holds the experts, or the block around both. A config says it for the whole model,
   and is asked of known classes only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.inventory import LINEAR_KINDS, Candidate, Mixture
from lora_inject.core.spec.names import joined, parent

_FLOATS = ("float32", "bfloat16", "float16", "float64", "")

# How models call the number of experts that a token goes to.
_TOP_K = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_selected_experts",
)


def with_mixtures(
    survey: Survey, candidates: list[Candidate]
) -> tuple[list[Candidate], tuple[Mixture, ...]]:
    """Return a model's candidates, those that are experts with their number, and its mixtures."""
    mixtures = tuple(_Finder(survey, candidates).mixtures())
    active = {name: mixture.top_k for mixture in mixtures for name in mixture.experts}
    if active:
        candidates = [c._replace(active=active.get(c.name)) for c in candidates]
    return candidates, mixtures


class _Finder:
    def __init__(self, survey: Survey, candidates: Sequence[Candidate]) -> None:
        self.survey = survey
        self.inside: dict[str, list[Candidate]] = {}  # candidates by each module around them
        self.stacks: dict[str, list[Candidate]] = {}  # stacks of matrices by the module they are of
        for candidate in candidates:
            if candidate.experts is not None and candidate.kind == "parameter":
                self.stacks.setdefault(candidate.owner, []).append(candidate)
            name = candidate.module
            while name:
                self.inside.setdefault(name, []).append(candidate)
                name = parent(name)

    def mixtures(self) -> Iterator[Mixture]:
        """Yield each block with experts, in the order of the model."""
        blocks: dict[str, dict[str, list[Candidate]]] = {}  # holders of experts by their block
        for name, module in self.survey.modules:
            if name and (experts := self._experts(name, module)):
                blocks.setdefault(self._block(name, experts), {})[name] = experts
        for block, holders in blocks.items():
            mixture = self._mixture(block, holders)
            if mixture is not None:
                yield mixture

    def _block(self, name: str, experts: Sequence[Candidate]) -> str:
        """Return the name of the module around a holder of experts and their router."""
        if self._routers(name, (), {self._n_experts(name, experts)}):
            return name
        return parent(name)

    def _experts(self, name: str, module: nn.Module) -> list[Candidate]:
        """Return the weights of a stack, or of a list of modules of one class."""
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            return self._members(name, module)
        if name not in self.stacks:
            return []
        stacks = [c for c in self.stacks[name] if len(c.weight_shape) >= 3]
        packed = [c for c in stacks if c.dtype not in _FLOATS]  # beside which scales lie
        return packed or [c for c in stacks if len(c.weight_shape) == 3]

    def _members(self, name: str, module: nn.Module) -> list[Candidate]:
        members = {key: self.inside.get(joined(name, key), []) for key in module._modules}
        members = {key: inside for key, inside in members.items() if inside}
        if len(members) < 2 or not self._routers(parent(name), {name}, {len(members)}):
            return []
        like = {
            (plain_class(type(module._modules[key])), *(c.weight_shape for c in inside))
            for key, inside in members.items()
        }
        return _linear(itertools.chain(*members.values())) if len(like) == 1 else []

    def _mixture(self, block: str, holders: Mapping[str, list[Candidate]]) -> Mixture | None:
        """Return the mixture of a block; None if nothing says that these are experts."""
        numbers = {self._n_experts(name, experts) for name, experts in holders.items()}
        routers = self._routers(block, holders, numbers)
        is_known = all(is_transposed(self.survey.by_name[name]) is not None for name in holders)
        asked = [*self._around(block, holders, routers)]
        asked += self._configs(asked) if is_known else []
        top_k = _top_k(asked, max(numbers))
        if not is_known and not (routers and top_k):
            return None
        experts = tuple(c.name for c in itertools.chain(*holders.values()))
        return Mixture(block, top_k, experts)

    def _n_experts(self, name: str, experts: Sequence[Candidate]) -> int:
        stacked = [c.experts for c in experts if c.experts is not None]
        return max(stacked) if stacked else len({_member(c.name, name) for c in experts})

    def _routers(self, block: str, holders: Iterable[str], numbers: set[int]) -> list[str]:
        """Return the only matrices of parts beside the experts, with an output for each expert."""
        module = self.survey.by_name.get(block)
        parts = [joined(block, key) for key in module._modules] if module is not None else []
        own = [[c] for c in self.inside.get(block, ()) if c.owner == block and c.experts is None]
        beside = [self.inside.get(part, []) for part in parts if part not in holders]
        only = (inside[0] for inside in (*own, *beside) if len(inside) == 1)
        return [
            c.name
            for c in only
            if c.out_features in numbers and (c.kind in (*LINEAR_KINDS, "parameter"))
        ]

    def _around(
        self, block: str, holders: Iterable[str], routers: Iterable[str]
    ) -> Iterator[nn.Module]:
        """Yield who may say how many experts a token meets: routers, holders, then the block."""
        within = [name for router in routers for name in _upwards(router, block)]
        for name in dict.fromkeys((*within, *holders, block)):
            if name in self.survey.by_name:
                yield self.survey.by_name[name]

    def _configs(self, modules: Iterable[nn.Module]) -> list[Any]:
        configs = [module.__dict__.get("config") for module in (*modules, self.survey.model)]
        return [*configs, *(getattr(config, "text_config", None) for config in configs)]


def _top_k(asked: Iterable[Any], n_experts: int) -> int | None:
    """Return the first number of experts that one of these states."""
    for thing in asked:
        for value in (getattr(thing, key, None) for key in _TOP_K):
            if type(value) is int and 1 <= value <= n_experts:
                return value
        if isinstance(thing, nn.Module) and (k := _known(thing, _TOP_K_OF_CLASS)) is not None:
            return k
    return None


def _linear(candidates: Iterable[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.kind in LINEAR_KINDS]


def _member(name: str, holder: str) -> str:
    return name[len(holder) + 1 :].partition(".")[0]


def _upwards(name: str, block: str) -> Iterator[str]:
    while name != block and name:
        yield name
        name = parent(name)


T = TypeVar("T")

_MODELS = "transformers.models"

# Classes without that decorator, whether their matrices are (in, out).
_TRANSPOSED = {
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": False,
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextExperts": True,
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": False,
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": False,
}
# Routers that state no number, whose class is written for one.
_TOP_K_OF_CLASS = {
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeTop2Router": 2,
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersTop1Router": 1,
}


def is_transposed(module: nn.Module) -> bool | None:
    """Return whether the stacks of a module are `(experts, in, out)`; None if no class says it.

    Examples:
        >>> is_transposed(nn.Linear(2, 2)) is None
        True
    """
    own = module.__dict__  # set by transformers' use_experts_implementation, always both
    stated = own.get("is_transposed") if "has_bias" in own else None
    return stated if isinstance(stated, bool) else _known(module, _TRANSPOSED)


def _known(module: nn.Module, table: Mapping[str, T]) -> T | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)

"""The mixtures of experts in a model: which weights are experts, and what chooses among them.

1. A stack is experts if its class is one of transformers' classes of experts.
   A class of experts that lie in one matrix is in a table beside them.
2. Any other stack of E matrices, and a ModuleList or ModuleDict of E modules of one class, is
   experts if beside it lies a router: a part whose only matrix has E outputs.
3. Without a class that is known, somebody must also say to how many experts a token goes: the
   router, what holds the experts, or the block around both. A config says it for the whole model,
   and is asked of known classes only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import entries, records_of
from lora_inject.core.spec.config import ALL_EXPERTS, WORDS, Config, Rule
from lora_inject.core.spec.inventory import LINEAR_KINDS, Candidate, Inventory
from lora_inject.core.spec.mixture import Mixture
from lora_inject.core.spec.names import counted, joined, parent, quoted
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.core.spec.spellings import templates
from lora_inject.errors import MatchError, article
from lora_inject.experts.profile import ExpertProfile
from lora_inject.experts.stacks import is_transposed, n_in_one_matrix, top_k_of_class

_FLOATS = ("float32", "bfloat16", "float16", "float64", "")
_STACKED = re.compile(r"experts\\?\.[a-z(]")  # a pattern for a tensor that holds all experts
_IN_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.(\w+)$")

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


def rank_of_each(candidate: Candidate, together: int, asked: str) -> int:
    """Return the rank of an expert, where those that a token goes to have one together.

    It is the whole part, as Megatron-Bridge and NeMo Automodel divide.

    Raises:
        MatchError: Nobody says to how many a token goes, or the rank is less than that.
    """
    wanted = f"rank: {{active: {together}}}"
    if candidate.active is None:
        problem = f"{wanted}, but the model does not say to how many experts its tokens go"
        remedy = "Give the rule a rank; {active: ...} is for experts beside a router with top_k"
        raise MatchError(asked, problem, remedy)
    if together < candidate.active:
        problem = f"{wanted}, but a token goes to {candidate.active} experts"
        remedy = f"Give active: {candidate.active} or more: it is divided by that"
        raise MatchError(asked, problem, remedy)
    return together // candidate.active


def part_of_stack(candidate: Candidate, rule: Rule, asked: str) -> dict[str, Any]:
    """Return which experts of a stack a rule adapts, and what they share.

    Raises:
        MatchError: It is no stack, has no such expert, or another model was profiled.
    """
    n = candidate.experts
    wanted = "share" if rule.only is None else "only"
    if n is None:
        problem = f"{wanted}, but it is {article(candidate.kind)} of its own"
        remedy = r"It is for stacks; match single experts by name, such as experts\.(0|3)\..*"
        raise MatchError(asked, problem, remedy)
    if rule.share is not None and rule.init in FROM_WEIGHT:
        problem = f"share, and init {rule.init}, which starts each expert from its own weight"
        raise MatchError(asked, problem, "Give the rule another init")
    if isinstance(rule.only, str):
        assert rule.top is not None
        profile = ExpertProfile.from_yaml(rule.only)
        return {"only": profile.most_chosen(candidate.owner, n, rule.top, asked)}
    if rule.only is not None and max(rule.only) >= n:
        problem = f"only: {max(rule.only)}, but it has {n:,} experts, 0 to {n - 1:,}"
        raise MatchError(asked, problem, "Leave that number out")
    return {"only": rule.only and tuple(sorted(rule.only)), "share": rule.share or ""}


class _Finder:
    def __init__(self, survey: Survey, candidates: Sequence[Candidate]) -> None:
        self.survey = survey
        self.inside: dict[str, list[Candidate]] = {}  # candidates by each module around them
        for candidate in candidates:
            name = candidate.module
            while name:
                self.inside.setdefault(name, []).append(candidate)
                name = parent(name)

    def mixtures(self) -> Iterator[Mixture]:
        """Yield each block with experts, in the order of the model."""
        blocks: dict[str, dict[str, list[Candidate]]] = {}  # holders of experts by their block
        for name, module in self.survey.modules:
            if name and (experts := self._experts(name, module)):
                blocks.setdefault(self._block(name, module, experts), {})[name] = experts
        for block, holders in blocks.items():
            mixture = self._mixture(block, holders)
            if mixture is not None:
                yield mixture

    def _block(self, name: str, module: nn.Module, experts: Sequence[Candidate]) -> str:
        """Return the name of the module around a holder of experts and their router."""
        if self._routers(name, (), {self._n_experts(name, experts)}):
            return name
        around = parent(name)
        return around if n_in_one_matrix(module) is None else parent(around)

    def _experts(self, name: str, module: nn.Module) -> list[Candidate]:
        """Return the weights of a stack, or of a list of modules of one class."""
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            return self._members(name, module)
        own = [c for c in self.inside.get(name, ()) if c.kind == "parameter" and c.owner == name]
        if n_in_one_matrix(module) is not None:
            return own
        stacks = [c for c in own if c.experts is not None and len(c.weight_shape) >= 3]
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
        is_known = all(_is_known(self.survey.by_name[name]) for name in holders)
        asked = [*self._around(block, holders, routers)]
        asked += self._configs(asked) if is_known else []
        top_k = _top_k(asked, max(numbers))
        if not is_known and not (routers and top_k):
            return None
        experts = [c.name for c in itertools.chain(*holders.values())]
        others = [c.name for c in _linear(self.inside.get(block, ()))]
        shared = tuple(name for name in others if name not in {*experts, *routers})
        return Mixture(block, max(numbers), top_k, tuple(experts), tuple(routers), shared)

    def _n_experts(self, name: str, experts: Sequence[Candidate]) -> int:
        if (n := n_in_one_matrix(self.survey.by_name[name])) is not None:
            return n
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
        if isinstance(thing, nn.Module) and (k := top_k_of_class(thing)) is not None:
            return k
    return None


def _is_known(holder: nn.Module) -> bool:
    return is_transposed(holder) is not None or n_in_one_matrix(holder) is not None


def _linear(candidates: Iterable[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.kind in LINEAR_KINDS]


def _member(name: str, holder: str) -> str:
    return name[len(holder) + 1 :].partition(".")[0]


def _upwards(name: str, block: str) -> Iterator[str]:
    while name != block and name:
        yield name
        name = parent(name)


# ------------------------------------------------------------------------------ what a plan says


def why_no_stack(pattern: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Return why a pattern for stacked experts matches none, and what to do; None if it has none.

    Models of transformers 4 have a module for each expert.
    """
    inside = [match[1] for match in map(_IN_EXPERT.search, names) if match]
    if not inside or not _STACKED.search(pattern):
        return None
    parts = "|".join(dict.fromkeys(inside))
    problem = "experts are modules here, each of its own, as in transformers 4"
    return problem, rf"Match those: experts\.\d+\.({parts})"


def why_no_experts(inventory: Inventory) -> tuple[str, str]:
    """Return what was problem, and what to do, where `all-experts` means nothing."""
    stacks = [c.name for c in inventory.candidates if c.experts is not None]
    there = f"; it has {quoted([*templates(stacks)][:3])}" if stacks else ""
    problem = f"the model has no experts that a router chooses among{there}"
    remedy = (
        "Name the stack by a pattern. Experts are known by transformers' class, or by a router "
        "beside them with an output for each, in a block that states top_k"
    )
    return problem, remedy


def notes_on_experts(
    config: Config, mixtures: Sequence[Mixture], sites: Iterable[SiteSpec]
) -> Iterator[str]:
    """Yield what a plan takes and leaves of experts, if words such as `all-linear` are rules."""
    words = WORDS.intersection(rule.match for rule in config.targets)
    if words:
        taken = {site.name: site for site in sites}
        yield from left_out(words, mixtures, set(taken))
        yield from (_said(alike, set(taken)) for alike in _alike(mixtures))
        names = [name for mixture in mixtures for name in mixture.experts if name in taken]
        joined_up = [n for n in names if taken[n].kind == "parameter" and taken[n].experts is None]
        if joined_up:
            yield f"the experts of a matrix have one A: {_some(joined_up)}"


def notes_on_adapter(survey: Survey, adapter: str) -> Iterator[str]:
    """Yield what an adapter on a model leaves out of experts, by the rules that it was made by."""
    configs = [root.configs.get(adapter) or {} for _, root in records_of(survey, adapter)]
    targets = [rule for config in configs for rule in config.get("targets", ())]
    words = {rule if isinstance(rule, str) else rule["match"] for rule in targets} & WORDS
    if words:
        there = inventory(survey).mixtures
        taken = (item.entry.spec for item in entries(survey, adapter))
        yield from left_out(words, there, {spec.name for spec in taken if spec is not None})


def left_out(words: Collection[str], mixtures: Sequence[Mixture], sites: set[str]) -> Iterator[str]:
    """Yield the experts that rules by a word leave out."""
    left = [name for mixture in mixtures for name in mixture.experts if name not in sites]
    if not left or not words:
        return
    if ALL_EXPERTS in words:
        yield f"not adapted of the experts: {_some(left)}"
    else:
        yield f"all-linear leaves out the experts {_some(left)}; add all-experts to adapt them"


def _some(names: Iterable[str]) -> str:
    """Return names, those that differ in numbers joined, and no more than four."""
    shown = list(templates(names))
    return quoted(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _alike(mixtures: Iterable[Mixture]) -> Iterator[list[Mixture]]:
    """Yield the mixtures with the same numbers."""
    groups: dict[tuple[int, int | None], list[Mixture]] = {}
    for mixture in mixtures:
        groups.setdefault((mixture.n_experts, mixture.top_k), []).append(mixture)
    yield from groups.values()


def _said(mixtures: Sequence[Mixture], sites: set[str]) -> str:
    """Return the sentence about blocks with the same numbers of experts."""
    n_experts, top_k = mixtures[0].n_experts, mixtures[0].top_k
    meets = f", {top_k:,} of them for each token" if top_k else ", and it is not said how many"
    text = f"{counted(len(mixtures), 'block')} of {n_experts:,} experts{meets}"
    for what, names in (
        ("router", [name for m in mixtures for name in m.routers]),
        ("shared", [name for m in mixtures for name in m.shared]),
    ):
        for how, some in (
            ("adapted", [name for name in names if name in sites]),
            ("not adapted", [name for name in names if name not in sites]),
        ):
            if some:
                text += f"; {what} {how}: {_some(some)}"
    return text

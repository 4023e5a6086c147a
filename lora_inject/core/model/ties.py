"""Tied tensors that a merge unties: where that is refused, and what says that they are tied."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NoReturn

from torch import nn

from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.model.undo import Merged, Put
from lora_inject.core.roots.root import entries
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError


def check_ties(survey: Survey, untied: Mapping[str, str]) -> Mapping[str, str]:
    """Refuse to untie where the model computes something else when it is untied.

    `untied` is the name of each tensor that gets memory of its own, to the name of another tensor
    that it was. Returned is what of it no config tells: a class that ties it would lose one.
    """
    if not untied:
        return {}
    for cls in {type(module): None for _, module in survey.modules}:
        if _reads_tie_flag(cls):
            problem = f"its tensor is tied, and {cls.__name__} scales its output by whether "
            problem += "config.tie_word_embeddings says so: untied it would be another model"
            remedy = "Stay unmerged, or leave this site out of the adapter"
            raise LayerError(f"merge into {min(untied)!r}", problem, remedy)
    return {} if any(_tied_configs(survey)) else untied


def refuse_untold(untied: Mapping[str, str], asked: str) -> NoReturn:
    """Raise for a plain model with weights that its class may tie again."""
    name, sharer = next(iter(untied.items()))
    problem = f"merged, it is no longer the tensor of {sharer!r}, and no config of the model says "
    problem += (
        "so: code that ties the two, when a saved state dict is loaded, would lose one of them"
    )
    remedy = "Stay merged; or load merged_weights(model) into a model that does not tie them"
    raise LayerError(f"{asked} {name!r}", problem, remedy)


def _reads_tie_flag(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    if not inspect.isfunction(forward):  # a ScriptModule's is not
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


def _tied_configs(survey: Survey) -> Iterator[Any]:
    """Yield every config of transformers inside that says that embeddings are tied."""
    pending: list[Any] = [m.config for _, m in survey.modules if hasattr(m, "config")]
    seen: set[int] = set()
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        pending += [value for key, value in vars(config).items() if key.endswith("_config")]
        if getattr(config, "tie_word_embeddings", False):  # may be a default of the class
            yield config


def untie_rest(survey: Survey, untied: Mapping[str, str], merged: Merged) -> None:
    """Let no config say that tensors are tied, and part those that then nothing ties again.

    With the old flag a saved merged model would be tied again when it is loaded. And it holds one
    tensor under one of its names only, such as the bias of BERT's head, which nothing would give to
    the others.
    """
    before = _tied_by_class(survey)
    for config in [*_tied_configs(survey)]:
        merged.said.append((config, {"tie_word_embeddings": True}))
        config.tie_word_embeddings = False
    after = _tied_by_class(survey)
    for pair, cls in after.items():
        for name in sorted(untied.keys() & {*pair}):
            problem = f"{cls} ties it when it is loaded, whatever its config says"
            remedy = "Stay unmerged, or leave this site out of the adapter"
            raise LayerError(f"merge into {name!r}", problem, remedy)
    first: dict[Hashable, Holder] = {}
    for name in sorted({name for pair in before.keys() - after.keys() for name in pair}):
        holder = survey.at(name)
        if (other := first.setdefault(memory_of(holder.tensor), holder)) != holder:
            own = nn.Parameter(holder.tensor.detach().clone(), requires_grad=False)
            merged.done.append(Put(holder, own, holder.tensor, partner=other))
            holder.module._parameters[holder.param] = own


def _tied_by_class(survey: Survey) -> dict[tuple[str, str], str]:
    """Return each pair of names that a class ties when it is loaded, by what configs say now.

    A class that ties by prefix is not told of a trained copy, which has that of its weight.
    """
    copies = {id(t) for item in entries(survey) for t in item.entry.tensors(item.module).values()}

    def of_base(named: Callable[..., Iterator[tuple[str, Any]]], **how: Any) -> Any:
        return ((name, p) for name, p in named(**how) if id(p) not in copies)

    pairs = {}
    for path, module in survey.modules:
        ask = getattr(module, "get_expanded_tied_weights_keys", None)
        if not callable(ask):
            continue
        module.__dict__["named_parameters"] = functools.partial(of_base, module.named_parameters)
        try:
            for name, other in ask(all_submodels=False).items():
                pairs[joined(path, name), joined(path, other)] = type(module).__name__
        finally:
            del module.__dict__["named_parameters"]
    return pairs

"""Tied tensors that a merge unties: where that is refused, and what says that they are tied.

`untied` is the name of each tensor that gets memory of its own, to the name of another tensor that
it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from lora_inject.core.layers.survey import Holder, Survey, memory_of
from lora_inject.core.model.target import Target
from lora_inject.core.model.undo import Undone
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError


def once_if_tied(targets: Mapping[Holder, Target]) -> list[Target]:
    """A tied tensor that gets the same trained copy under all its names is written once, tied."""
    # What goes into each: trained copies alone, else nothing that another could be equal to.
    contents = {
        holder: None if target.terms else tuple((id(t), weight) for t, weight, _ in target.copies)
        for holder, target in targets.items()
    }
    kept: list[Target] = []
    written: set[Holder] = set()
    for holder, target in targets.items():
        own = contents[holder]
        if own and target.sharers and all(contents.get(h) == own for h in target.sharers):
            written.update(target.sharers)
            target.sharers = []
        if holder not in written:
            kept.append(target)
    return kept


def check_ties(survey: Survey, untied: Mapping[str, str]) -> None:
    """Refuse to untie where the model computes something else when it is untied."""
    asked = f"merge into {min(untied)!r}"
    for cls in {type(module): None for _, module in survey.modules}:
        if _reads_tie_flag(cls):
            raise LayerError(
                asked,
                f"its tensor is tied, and {cls.__name__} scales its output by whether "
                "config.tie_word_embeddings says so: untied it would be another model",
                "Stay unmerged, or leave this site out of the adapter",
            )


def untold(survey: Survey, untied: Mapping[str, str]) -> Mapping[str, str]:
    """Return what is untied and no config tells: a class that ties it would lose one of the two."""
    return {} if _tied_configs(survey) else untied


def refuse_untold(untied: Mapping[str, str], asked: str) -> NoReturn:
    """Raise for a plain model with weights that its class may tie again."""
    name, sharer = next(iter(untied.items()))
    raise LayerError(
        f"{asked} {name!r}",
        f"merged, it is no longer the tensor of {sharer!r}, and no config of the model says so: "
        "code that ties the two, when a saved state dict is loaded, would lose one of them",
        "Stay merged; or load merged_weights(model) into a model that does not tie them",
    )


def _reads_tie_flag(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    if not inspect.isfunction(forward):  # a ScriptModule's is not
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


def say_untied(survey: Survey) -> list[tuple[Any, dict[str, Any]]]:
    """Let no config say that embeddings are tied; return what each said.

    With the old flag a saved merged model would be tied again when it is loaded.
    """
    configs = _tied_configs(survey)
    for config in configs:
        config.tie_word_embeddings = False
    return [(config, {"tie_word_embeddings": True}) for config in configs]


def _tied_configs(survey: Survey) -> list[Any]:
    """Return every config inside that says that embeddings are tied."""
    pending: list[Any] = [m.config for _, m in survey.modules if hasattr(m, "config")]
    seen: set[int] = set()
    configs = []
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if getattr(config, "tie_word_embeddings", False):  # may be a default of the class
            configs.append(config)
        pending += [v for k, v in config.__dict__.items() if k.endswith("_config")]
    return configs


def check_new_ties(survey: Survey, untied: Mapping[str, str]) -> None:
    """Refuse where a class ties what was untied whatever its config says."""
    for path, module in survey.modules:
        for pair in _asked(module).items():
            for name in untied.keys() & {joined(path, key) for key in pair}:
                raise LayerError(
                    f"merge into {name!r}",
                    f"{type(module).__name__} ties it when it is loaded, whatever its config says",
                    "Stay unmerged, or leave this site out of the adapter",
                )


def tied_by_class(survey: Survey) -> set[tuple[str, str]]:
    """Return each pair of names that a class ties when it is loaded, by what its config says."""
    return {
        (joined(path, name), joined(path, other))
        for path, module in survey.modules
        for name, other in _asked(module).items()
    }


def _asked(module: Any) -> Mapping[str, str]:
    asks = getattr(module, "get_expanded_tied_weights_keys", None)
    return asks(all_submodels=False) if callable(asks) else {}


def part(holder: Holder, partner: Holder) -> Undone:
    """Give a tensor memory of its own, which it has had in common with a partner."""
    before = holder.tensor
    own = nn.Parameter(before.detach().clone(), requires_grad=False)
    holder.module._parameters[holder.param] = own
    return Undone(holder, own, before, partner=partner)


def untie_rest(
    survey: Survey,
    untied: Mapping[str, str],
    said: list[tuple[Any, dict[str, Any]]],
    undone: list[Undone],
) -> None:
    """Let no config say that tensors are tied, and part those that then nothing ties again.

    A saved model holds one tensor under one of its names only, such as the bias of BERT's head, and
    nothing would give it to the others.
    """
    pairs = tied_by_class(survey)
    said += say_untied(survey)
    check_new_ties(survey, untied)
    first: dict[Any, Holder] = {}
    for name in sorted({name for pair in pairs - tied_by_class(survey) for name in pair}):
        holder = survey.at(name)
        if (other := first.setdefault(memory_of(holder.tensor), holder)) != holder:
            undone.append(part(holder, other))

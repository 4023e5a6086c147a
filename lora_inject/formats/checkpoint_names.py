"""Weights by the names and shapes of a checkpoint on disk, as transformers writes them.

transformers 5 holds some weights in other forms than their checkpoints: stacks of experts, fused or
split projections, renamed modules. `save_pretrained` turns them back
(`core_model_loading.revert_weight_conversion`), and what reads checkpoints, such as the loaders of
vLLM and SGLang, knows only those names. Here the same function turns them back a few at a time.

    model.layers.0.mlp.experts.gate_up_proj  ->  model.layers.0.mlp.experts.0.gate_proj.weight, ...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_inject.core.layers.weight_kinds import is_quantized
from lora_inject.errors import LayerError

Weights = Mapping[str, Tensor]
Revert = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def knows_names(model: nn.Module) -> bool:
    """Whether `as_on_disk` can be asked: a model of transformers 5 that is not quantized."""
    try:
        _revert_for(model)
    except LayerError:
        return False
    return not any(is_quantized(parameter) for parameter in model.parameters())


def names_on_disk(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a model's checkpoint; empty where transformers cannot tell.

    The model may be on the meta device.
    """
    if not knows_names(model):
        return {}
    return _shapes(_revert_for(model)(model, dict(model.state_dict())))


def as_on_disk(
    model: nn.Module, shapes: Weights, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Return weights by the names and in the shapes of the model's checkpoint.

    Args:
        model: A model of transformers.
        shapes: All of its weights on the meta device.
        weights: The same ones with values, in any order.

    Raises:
        LayerError: It is no model of transformers, or transformers cannot turn its weights back.
    """
    revert = _revert_for(model)
    return _reverted(model, _groups(model, shapes, revert), revert, weights)


def _reverted(
    model: nn.Module,
    groups: Mapping[str, list[str]],
    revert: Revert,
    weights: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of each group as soon as all of them are there."""
    waiting: dict[str, Tensor] = {}
    for name, tensor in weights:
        waiting[name] = tensor
        del tensor  # so that it is gone when those made of it are
        group = groups[name]
        if all(member in waiting for member in group):
            made = revert(model, {member: waiting.pop(member) for member in group})
            while made:
                key = next(iter(made))
                yield key, made.pop(key).contiguous()


def _groups(model: nn.Module, shapes: Weights, revert: Revert) -> dict[str, list[str]]:
    """Return for each weight the ones that are turned back together, itself included.

    They are those of a layer, by the first number in their names; a weight outside of layers is
    alone. If a layer by itself does not become what it becomes among all, they are all weights.
    """
    layers: dict[str, list[str]] = {}
    for name in shapes:
        match = re.match(r"(?:.*?\.)?\d+\.", name)
        layers.setdefault(match[0] if match else name, []).append(name)
    wanted = _shapes(revert(model, dict(shapes)))
    if not all(_fits(model, members, shapes, revert, wanted) for members in layers.values()):
        layers = {"": [*shapes]}
    return {name: members for members in layers.values() for name in members}


def _fits(
    model: nn.Module, names: list[str], shapes: Weights, revert: Revert, wanted: Mapping[str, Any]
) -> bool:
    """Whether some weights by themselves become what they become among all."""
    try:
        made = revert(model, {name: shapes[name] for name in names})
    except Exception:  # noqa: BLE001 - an operation that lacks the other weights raises anything
        return False
    return _shapes(made).items() <= wanted.items()


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _revert_for(model: nn.Module) -> Revert:
    """Return transformers' function that turns the weights of a model back."""
    asked = "merged_weights, names='checkpoint'"
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        problem = f"a {type(model).__name__} is no model of transformers, which knows the names"
        raise LayerError(asked, problem, "Leave names out")
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        problem = f"transformers {library.__version__} does not turn weights back"
        raise LayerError(asked, problem, "Use transformers from 5 on") from None
    return revert_weight_conversion  # type: ignore[no-any-return]

"""Tensors that share memory: what a merge must not untie, and what it must not write in part.

Below, `untied` is the name of each tensor that gets memory of its own, to the name of another
tensor that it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from lora_inject.errors import LayerError
from lora_inject.layers.survey import Survey, memory_of
from lora_inject.spec.names import joined


def refuse_overlaps(survey: Survey, written: Mapping[Hashable, str]) -> None:
    """Refuse to write a tensor of which another holds a part; who holds the whole is tied to it."""
    spans = []
    held: list[tuple[str, Tensor, Hashable]]
    held = [(h.name, h.tensor, memory_of(h.tensor)) for h in survey.holders]
    held += [
        (name, buffer, (buffer.data_ptr(), name))  # tied to nothing: it would not be untied
        for path, module in survey.modules
        for key, buffer in module._buffers.items()
        for name in (joined(path, key),)
        if type(buffer) is Tensor and not buffer.is_meta and buffer.data_ptr()
    ]
    for name, tensor, memory in held:
        if isinstance(memory, tuple):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            n_bytes = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
            spans.append((memory[0], memory[0] + n_bytes, name, memory))
    spans.sort(key=lambda span: span[:3])
    last = spans[:1]  # of those that begin before: if any overlaps, the one that ends last does
    for two in spans:
        one, last = last[0], [max(*last, two, key=lambda span: span[1])]
        if two[0] < one[1] and one[3] != two[3] and not written.keys().isdisjoint((one[3], two[3])):
            asked, other = (one, two) if one[3] in written else (two, one)
            raise LayerError(
                f"merge into {written[asked[3]]!r}",
                f"a part of its memory is also a part of {other[2]!r}, which would change",
                "Give one of them memory of its own: layer.weight = "
                "torch.nn.Parameter(layer.weight.detach().clone())",
            )


def check_ties(survey: Survey, untied: Mapping[str, str], eject: bool) -> None:
    """Refuse to untie where the model computes or loads something else when it is untied."""
    if not untied:
        return
    name, sharer = next(iter(untied.items()))
    asked = f"merge into {name!r}"
    for cls in {type(module): None for _, module in survey.modules}:
        if _reads_tie_flag(cls):
            raise LayerError(
                asked,
                f"its tensor is tied, and {cls.__name__} scales its output by whether "
                "config.tie_word_embeddings says so: untied it would be another model",
                "Stay unmerged, or leave this site out of the adapter",
            )
    if eject and not tied_configs(survey):
        raise LayerError(
            f"{asked} with eject=True",
            f"its tensor is also that of {sharer!r} and would be untied, and no "
            "config of the model says so: code that ties the two, when a saved state dict is "
            "loaded, would lose one of them",
            "Where no code ties them any more, call merge(model) and eject(model)",
        )


def _reads_tie_flag(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    if not inspect.isfunction(forward):  # a ScriptModule's is not
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


def tied_configs(survey: Survey) -> list[Any]:
    """Return every transformers config inside that says that embeddings are tied."""
    pending: list[Any] = [m.config for _, m in survey.modules if hasattr(m, "config")]
    seen: set[int] = set()
    found = []
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if getattr(config, "tie_word_embeddings", False):  # may be a default of the class
            found.append(config)
        pending += [v for k, v in config.__dict__.items() if k.endswith("_config")]
    return found


def refuse_new_ties(survey: Survey, untied: Mapping[str, str]) -> None:
    """Refuse where a transformers class ties what was untied whatever its config says."""
    for path, module in survey.modules if untied else ():
        asks = getattr(module, "get_expanded_tied_weights_keys", None)
        for pair in asks(all_submodels=False).items() if callable(asks) else ():
            for name in untied.keys() & {joined(path, key) for key in pair}:
                raise LayerError(
                    f"merge into {name!r}",
                    f"{type(module).__name__} ties it when it is loaded, whatever its config says",
                    "Stay unmerged, or leave this site out of the adapter",
                )

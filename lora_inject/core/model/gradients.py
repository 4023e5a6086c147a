"""Layers that hand no gradient on: what lies before them would train by a part of its gradient.

What is packed hands one on only if its kind says that it `trains`. Which layers lie before which is
not known until a model runs. So a layer among those that train is refused at once. One in a tower
of its own, such as a quantized image encoder before a language model, is watched: a forward that
hands it an input with a gradient is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.core.layers.library import loaded_kinds, reason_against, weight_kind
from lora_inject.core.layers.survey import Survey, base_parameters
from lora_inject.core.layers.weight_kinds import Reason, WeightKind, has_codes
from lora_inject.core.spec.names import joined, parent
from lora_inject.errors import LayerError

# torch's own quantized layers, as `torch.ao.quantization.quantize_dynamic` makes them.
_WITHOUT_AUTOGRAD = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")

# Buffers in which layers hold their packed weight; other buffers of integers are no weights.
_PACKED = ("weight", "qweight")


def check_live_inputs(
    survey: Survey, asked: str, training: Iterable[str], *, watched: bool = False
) -> None:
    """Refuse to train where a layer hands no gradient to its input, or may hand none.

    Args:
        survey: The model.
        asked: For messages.
        training: Names of the modules that train.
        watched: Whether what is apart is watched already; else `watch` is called after this.
    """
    towers: _Towers | None = None
    kinds = loaded_kinds()
    for path, module in survey.modules:
        for key, reason in _dead(module, kinds):
            towers = towers or _Towers(survey, training)
            if towers.apart(path) and (_is_watched(module) or not watched):
                break
            problem = f"{reason.found}: no gradient reaches the layers before it"
            remedy = f"{reason.remedy}; an adapter that was trained elsewhere can be loaded onto it"
            name = joined(path, key) if key else path
            raise LayerError(f"{asked}, {name!r}", problem, remedy)


def _dead(module: nn.Module, kinds: list[WeightKind]) -> Iterator[tuple[str, Reason]]:
    """Yield why a module hands no gradient on, and the tensor that is to blame, `""` for itself."""
    if type(module).__module__.startswith(_WITHOUT_AUTOGRAD):
        problem = f"{type(module).__name__} of torch.ao computes without autograd"
        yield "", Reason(problem, "Train first, then quantize")
    if isinstance(module, nn.Embedding):  # whose input has no gradient
        return
    if kinds and (reason := reason_against("train", module, None, kinds)) is not None:
        yield "", reason
    for key, weight in _held(module):
        reason = reason_against("train", module, weight, kinds) if kinds else None
        if reason is None and has_codes(weight):
            reason = weight_kind(module, weight).why_not("train", module, weight)
        if reason is not None:
            yield key, reason


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base tensors of a module that may be packed weights."""
    yield from base_parameters(module).items()
    for key, buffer in module._buffers.items():  # of a ScriptModule it is no dict
        if buffer is not None and key in _PACKED:
            yield key, buffer


class _Towers:
    """Which modules are apart from those that train.

    Two modules are, where neither is inside the other, and their names part at two modules with
    layers of their own, held by one that says no order of them, as a list of layers does.
    """

    def __init__(self, survey: Survey, training: Iterable[str]) -> None:
        self.by_name, self.training = survey.by_name, {*training}
        self.parts: dict[str, set[str]] = {}  # each module above one that trains, to those in it
        for path in self.training:
            below = path
            for above in _around(path):
                self.parts.setdefault(above, set()).add(below)
                below = above

    def apart(self, path: str) -> bool:
        """Return whether a module is apart from all that train."""
        if path in self.training or path in self.parts:
            return False
        below = path
        for above in _around(path):
            if above in self.training:
                return False
            others = self.parts.get(above, set()) - {below}
            ordered = isinstance(self.by_name[above], nn.Sequential | nn.ModuleList)
            if others and (ordered or not all(map(self._has_layers, (below, *others)))):
                return False
            below = above
        return True

    def _has_layers(self, path: str) -> bool:
        return bool(self.by_name[path]._modules)


def _around(path: str) -> Iterator[str]:
    """Yield the names of the modules around one, the innermost first."""
    while path:
        path = parent(path)
        yield path


# ------------------------------------------------------------------------------- what is watched


def watch(modules: Iterable[nn.Module]) -> None:
    """Have each layer without a backward refuse an input with a gradient."""
    kinds = loaded_kinds()
    for module in modules:
        if next(_dead(module, kinds), None) is not None and not _is_watched(module):
            module.register_forward_pre_hook(_refuse_gradient, with_kwargs=True)


def unwatch(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of `watch` off."""
    for module in modules:
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _refuse_gradient]:
            del module._forward_pre_hooks[key]
            del module._forward_pre_hooks_with_kwargs[key]


def _is_watched(module: nn.Module) -> bool:
    return _refuse_gradient in module._forward_pre_hooks.values()


def _refuse_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a forward that would lose a gradient."""
    given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise LayerError(
            f"a forward of a {type(module).__name__} with gradients",
            "it hands no gradient to its input, and adapters that train lie before it",
            "Run it within torch.no_grad(), or call train_only(model, None)",
        )

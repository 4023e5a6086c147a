"""Choosing among adapters for all threads: which take part, and for how much.

No layer, no parameter and no `requires_grad` is touched, so this costs the same for ten sites as
for ten thousand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from lora_inject.core.layers.selected import Mix
from lora_inject.core.roots.carried import alone, check_names, check_unmerged, reach
from lora_inject.core.roots.mixes import check_mixes, weights_of
from lora_inject.errors import StateError

M = TypeVar("M", bound=nn.Module)


@alone
def activate(model: M, which: str | Mapping[str, float] | None) -> M:
    """Choose the adapters that take part from here on, in all threads.

    It is a change between forwards: one that runs in another thread meanwhile may compute some of
    its layers by either setting. What each thread wants for itself is `routed`.

    On CUDA this is an operation of the current stream: compiled forwards in another stream have to
    wait for it.

    Args:
        model: The root, or any module that holds roots.
        which: One adapter; a mix of several with their weights (`W + sum of w * scale * B @ A`);
            or None, like an empty mix, for the plain base.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, a weight is not finite, or the model is merged.
        LayerError: An adapter with a gain (DoRA) is not the only one at one of its sites.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = activate(net, {"sql": 0.7, "style": 0.3})
    """
    weights = weights_of(which, "activate")
    reached = reach(model)
    if not reached.selections:
        raise StateError("activate", "the model has no adapter", "Inject or load one first")
    check_names(reached.names, weights, "activate")
    check_unmerged("activate", *reached.selections)
    if reached.gained & weights.keys():
        check_mixes(model, weights)
    for selection in reached.selections:
        selection.check_settled("activate")
    mix = Mix(weights)
    for selection in reached.selections:
        selection.replace(mix)
    return model

"""The base's weights with the update folded in, one at a time, for a server that follows a run.

Nothing is written: training can continue, and only one merged tensor exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_inject.functional import all_finite
from lora_inject.layers.survey import Survey, memory_of
from lora_inject.model.carried import refuse_merged
from lora_inject.model.dequantizing import dtype_of
from lora_inject.model.merge import root_of, state_to_merge
from lora_inject.model.merge_targets import Target, check_results, merge_targets, not_finite
from lora_inject.spec.names import joined


def merged_weights(
    model: nn.Module,
    *,
    name: str | Mapping[str, float] | None = None,
    dequantize: str | torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the base's parameters as `merge` would leave them, without merging.

    Args:
        model: The injected root.
        name: Fold this adapter, or mix; by default what is active.
        dequantize: Yield quantized weights as plain ones of this dtype; see `merge`.

    Returns:
        Pairs of a parameter's name in the base's state dict and its value: a new tensor where an
        adapter takes part, else the base's own, which is not to be written to. A tied tensor comes
        under each of its names.

    Raises:
        StateError: Nothing is active, the model is merged, or an adapter holds NaN or Inf or is not
            whole in this model.
        LayerError: A weight cannot be merged into, as with `merge`; during iteration: a merged
            weight is not finite.

    Examples:
        >>> from lora_inject.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> [(key, tuple(tensor.shape)) for key, tensor in merged_weights(net)]
        [('0.weight', (6, 4)), ('0.bias', (6,))]
    """
    survey = Survey(model)
    selection = root_of(survey).selection
    refuse_merged("merged_weights", selection)
    selection.check_settled("merged_weights", others=True)
    into = None if dequantize is None else dtype_of(dequantize)
    targets = merge_targets(survey, state_to_merge(survey, selection, name).active, into)
    check_results(targets, None, undo=True)
    return _folded(survey, targets)


def _folded(survey: Survey, targets: list[Target]) -> Iterator[tuple[str, Tensor]]:
    by_name = {target.name: target for target in targets}
    # One trained copy under all names of a tied tensor is one target.
    tied = {memory_of(target.weight): target for target in targets if not target.sharers}
    for path, module in survey.modules:
        for key, parameter in survey.own[id(module)].items():
            full = joined(path, key)
            target = by_name.get(full) or tied.get(memory_of(parameter))
            yield full, parameter.detach() if target is None else _fold(target)


def _fold(target: Target) -> Tensor:
    merged = target.formed()
    if not all_finite(merged):
        raise not_finite(target, target.weight)
    return merged

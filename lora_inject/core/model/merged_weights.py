"""The base's parameters as a merge would leave them, one after the other, without a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.layers.weight_kinds import in_dtype
from lora_inject.core.model.gathering import gathered_weights
from lora_inject.core.model.merge import mix_to_fold, root_of
from lora_inject.core.model.merge_targets import check_results, merge_targets
from lora_inject.core.model.merged_rows import counted_in, formed_values
from lora_inject.core.model.packed_target import PackedTarget, dtype_of
from lora_inject.core.model.target import Target
from lora_inject.core.spec.names import joined, parent
from lora_inject.errors import LayerError, StateError
from lora_inject.formats.checkpoint_names import as_on_disk


def merged_weights(
    model: nn.Module,
    *,
    name: str | Mapping[str, float] | None = None,
    dequantize: str | torch.dtype | None = None,
    kept: dict[str, float] | None = None,
    names: Literal["model", "checkpoint"] = "model",
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the base's parameters as `merge` would leave them, without merging.

    What is sharded comes whole, gathered one tensor at a time: every process has to iterate to the
    end.

    Args:
        model: The injected root.
        name: Fold this adapter, or mix; by default what is active.
        dequantize: Yield quantized weights as plain ones of this dtype; see `merge`.
        kept: A dict that gets, by the name of each merged tensor of 16 bits, the share of its delta
            that rounding has kept: see `MergeReport`.
        names: `model`: the names and shapes of the base's state dict. `checkpoint`: those of its
            checkpoint on disk, as `save_pretrained` writes them and servers load them: each expert
            by itself, projections fused as there.

    Returns:
        Pairs of a parameter's name and its value: a new tensor where an adapter takes part, else
        the base's own, which is not to be written to. A tied tensor comes under each of its names.

    Raises:
        StateError: Nothing is active, the model is merged, or an adapter holds NaN or Inf or is not
            whole in this model; during iteration: a weight or its adapter has changed since.
        LayerError: A weight cannot be merged into, as with `merge`; names of a checkpoint are asked
            for, and the model has no `save_pretrained` that tells them, or is quantized; during
            iteration: a merged weight is not finite.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> [(key, tuple(tensor.shape)) for key, tensor in merged_weights(net)]
        [('0.weight', (6, 4)), ('0.bias', (6,))]
    """
    survey = Survey(model)
    if names not in ("model", "checkpoint"):
        raise StateError(
            "merged_weights, names", f"it is {names!r}", "Give 'model' or 'checkpoint'"
        )
    weights = _while_unchanged(survey, _merged(survey, name, dequantize, kept))
    return weights if names == "model" else _as_on_disk(survey, weights)


def _while_unchanged(
    survey: Survey, weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Return weights that are all of this moment; an error comes in the place of a later one."""
    selection = root_of(survey).selection
    tables = {path: module._parameters.values() for path, module in survey.modules}
    held = {path: [t for t in table if t is not None] for path, table in tables.items()}
    then = {path: [*map(_version, tensors)] for path, tensors in held.items()}

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            path = parent(name)
            if selection.merged or [*map(_version, held[path])] != then[path]:
                problem = "it or its adapter has changed since the call"
                remedy = "Take all weights before the next step of an optimizer, merge or swap"
                raise StateError(f"merged_weights, {name!r}", problem, remedy)
            yield name, weight

    return checked()


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _as_on_disk(
    survey: Survey, weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Return weights by the names of the checkpoint."""
    shapes = {}
    for path, module in survey.modules:
        for key, parameter in survey.own[id(module)].items():
            name = joined(path, key)
            if is_quantized(parameter):
                problem = "it is quantized, and has another form on disk"
                raise LayerError(
                    f"merged_weights, names='checkpoint', {name!r}", problem, "Leave names out"
                )
            shapes[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return iter(as_on_disk(survey.model, shapes, weights))


def _merged(
    survey: Survey,
    name: str | Mapping[str, float] | None,
    dequantize: str | torch.dtype | None,
    kept: dict[str, float] | None,
) -> Iterator[tuple[str, Tensor]]:
    into = None if dequantize is None else dtype_of(dequantize)
    mix = mix_to_fold(survey, name, "merged_weights")
    if any(hasattr(holder.tensor, "full_tensor") for holder in survey.holders):
        return iter(gathered_weights(survey, mix, into, kept))
    targets = merge_targets(survey, mix, into)
    check_results(targets, None, undo=True)
    return _folded(survey, targets, kept)


def _folded(
    survey: Survey, targets: list[Target], kept: dict[str, float] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each base parameter as a merge would leave it.

    | parameter | value |
    |---|---|
    | of a layer that becomes a plain one | the plain weight and bias |
    | of a target, or tied to one that stays tied | the merged values |
    | a bias beside a weight that is unpacked | in that weight's dtype, as the sum has it |
    | any other | its own |
    """
    by_name = {target.name: target for target in targets}
    tied = {memory_of(target.weight): target for target in targets if not target.sharers}
    packed = [target for target in targets if isinstance(target, PackedTarget)]
    unpacked = [target for target in packed if target.becomes_plain]
    biases = {joined(parent(t.written.name), "bias"): t.dtype for t in unpacked}
    layers = {id(target.holder.module): target for target in unpacked if target.replaces_layer}
    for path, module in survey.modules:
        layer = layers.get(id(module))
        if layer is not None:
            yield from _replaced(path, layer)
            continue
        for key, parameter in survey.own[id(module)].items():
            full = joined(path, key)
            target = by_name.get(full) or tied.get(memory_of(parameter))
            if target is not None:
                yield full, counted_in(target, kept)
            else:
                yield full, _unmerged(parameter, biases.get(full))


def _unmerged(parameter: nn.Parameter, bias_dtype: torch.dtype | None) -> Tensor:
    """Return a base parameter that no adapter changes; a bias may get another dtype."""
    if bias_dtype is not None:
        parameter = in_dtype(parameter, bias_dtype)
    return parameter.detach()


def _replaced(path: str, layer: PackedTarget) -> Iterator[tuple[str, Tensor]]:
    """Yield weight and bias of a quantizer's layer as the plain one has them."""
    yield layer.written.name, formed_values(layer)
    bias = getattr(layer.holder.module, "bias", None)
    if isinstance(bias, Tensor):
        yield joined(path, "bias"), in_dtype(bias, layer.dtype).detach()

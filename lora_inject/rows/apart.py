"""A layer that runs once for each run of rows of one adapter.

Every tensor that it takes and returns must have the rows on its first axis, or on its second where
the batch is packed as `(1, tokens, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_inject.core.layers.contexts import in_context
from lora_inject.errors import LayerError
from lora_inject.trees import tree_flatten, tree_unflatten


def apart(
    rows: Any,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dim: int = 0,
    several: bool = False,
) -> Any:
    """Run a layer for each run of rows of one adapter, under that adapter alone.

    Args:
        rows: The selection.
        module: The layer.
        args: The arguments of the call.
        kwargs: Likewise, by name.
        dim: The axis that has the rows.
        several: Whether more than one tensor has them.

    Raises:
        LayerError: The tensors that it takes or returns do not have these rows.
    """
    if torch.compiler.is_compiling():  # dynamo cannot raise our exception: it shows the text
        raise RuntimeError("A layer that adapters train in full cannot be routed in a graph.")
    given, form = tree_flatten((args, kwargs))
    x = check_inputs(rows, module, given, dim, several=several)
    runs = [(name, len(list(each))) for name, each in groupby(rows.rows)]
    repeat = x.shape[dim] // len(rows.rows)
    parts = _split_rows(given, [repeat * n for _, n in runs], dim)
    outputs = []
    for (name, n), part in zip(runs, parts, strict=True):
        selected = rows.of_run(name, n)
        run_args, run_kwargs = tree_unflatten(list(part), form)
        with in_context({module._lora.selection: selected}):
            outputs.append(selected.forward(module, run_args, run_kwargs))
    firsts = [next(t for t in part if isinstance(t, Tensor)) for part in parts]
    return _join_rows(module, outputs, firsts, dim)


def check_inputs(
    rows: Any, module: nn.Module, given: Sequence[Any], dim: int, *, several: bool
) -> Tensor:
    """Return the first tensor of a call, whose axis `dim` is the rows; raise if others differ."""
    tensors = [t for t in given if isinstance(t, Tensor)]
    if not tensors:
        _refuse(module, "takes", given)
    x: Tensor = tensors[0]
    if not dim:
        rows.check(module, x)
    if len(tensors) > 1 and not several:
        _refuse(module, "takes", tensors)
    if any(t.shape[dim : dim + 1] != x.shape[dim : dim + 1] for t in tensors):
        _refuse(module, "takes", tensors)
    return x


def _split_rows(given: Sequence[Any], sizes: Sequence[int], dim: int) -> list[tuple[Any, ...]]:
    """Return the arguments of each run."""
    columns = [
        torch.split(t, list(sizes), dim) if isinstance(t, Tensor) else (t,) * len(sizes)
        for t in given
    ]
    return list(zip(*columns, strict=True))


def _join_rows(
    module: nn.Module, outputs: Sequence[Any], inputs: Sequence[Tensor], dim: int
) -> Any:
    """Return the outputs of all runs as one."""
    flat = [tree_flatten(output) for output in outputs]
    leaves = [leaves for leaves, _ in flat]
    axes = [_axis(t, inputs[-1], dim) for t in leaves[-1]]
    if -1 in axes:
        _refuse(module, "returns", leaves[-1])
    whole = [
        torch.cat(each, axis) for each, axis in zip(zip(*leaves, strict=True), axes, strict=True)
    ]
    return tree_unflatten(whole, flat[-1][1])


def _axis(output: Any, x: Tensor, dim: int) -> int:
    """Return where an output has the rows that its input has along `dim`; -1 for nowhere."""
    if not isinstance(output, Tensor) or not output.dim():
        return -1
    if x.dim() > 2 and len(output) == x.shape[:2].numel():
        return 0  # rows and positions as one
    return dim if output.shape[dim : dim + 1] == x.shape[dim : dim + 1] else -1


def _refuse(module: nn.Module, verb: str, values: Sequence[Any]) -> NoReturn:
    shown = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in values]
    raise LayerError(
        f"rows with weights of their own in a {type(module).__name__}",
        f"its forward {verb} {', '.join(map(str, shown))}, which cannot be told apart by row",
        "Leave it out of the adapters, or train each alone",
    )

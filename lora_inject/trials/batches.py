"""Join the batches of several trials, and split the outputs by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_inject.errors import StateError, check_type

Forward = Callable[[Any], Any]
Loss = Callable[[Any, Any], Tensor]
IGNORED = -100
"""The label that cross entropy leaves out."""


def n_rows(batch: Any, whose: str) -> int:
    """Return the number of rows of a batch, which must be equal in all its tensors."""
    sizes = {t.shape[0] for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1 or not all(sizes):
        found = f"its tensors have {sorted(sizes)} rows" if sizes else "it holds no tensor"
        raise StateError(f"step, batch of {whose!r}", found, "Give tensors with one row an example")
    return int(sizes.pop())


def scalar_loss(loss: Loss, outputs: Any, batch: Any, whose: str) -> Tensor:
    """Return one trial's loss, which must be a single number in a tensor."""
    value, asked = loss(outputs, batch), f"loss of trial {whose!r}"
    check_type(asked, value, Tensor, "Return a scalar tensor")
    if value.numel() != 1:
        raise StateError(asked, f"it has the shape {tuple(value.shape)}", "Return its mean")
    return value.reshape(())


def n_tokens(batch: Any) -> int:
    """Return rows times positions of the batch's first tensor."""
    first = next(t for t in tree_flatten(batch)[0] if isinstance(t, Tensor))
    return int(first.shape[:2].numel())


def joined(batches: Mapping[str, Any]) -> Any:
    """Concatenate the rows of all batches.

    Raises:
        StateError: The batches differ in structure, or in a dimension other than the first.
    """
    (first, one), *others = batches.items()
    leaves, form = tree_flatten(one)
    columns = [[leaf] for leaf in leaves]
    for name, batch in others:
        theirs, other = tree_flatten(batch)
        if other != form:
            raise StateError(
                f"step, batches of {first!r} and {name!r}",
                "their structures differ",
                "Give all trials batches with the same entries",
            )
        for column, leaf in zip(columns, theirs, strict=True):
            alike = isinstance(leaf, Tensor) == isinstance(column[0], Tensor)
            if not alike or (isinstance(leaf, Tensor) and leaf.shape[1:] != column[0].shape[1:]):
                raise StateError(
                    f"step, batches of {first!r} and {name!r}",
                    f"their rows differ: {_shape(column[0])} and {_shape(leaf)}",
                    "Pad the rows of one step to one length",
                )
            column.append(leaf)
    rows = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
    return tree_unflatten(rows, form)


def parted(outputs: Any, rows: Mapping[str, int]) -> dict[str, Any]:
    """Return each trial's rows of the outputs.

    Uses `split`, because the backward of a slice fills a tensor of full size for each trial.

    Raises:
        StateError: A tensor does not have as many rows as the batch.
    """
    leaves, form = tree_flatten(outputs)
    total, columns = sum(rows.values()), []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            columns.append([leaf] * len(rows))
            continue
        if not leaf.dim() or leaf.shape[0] != total:
            raise StateError(
                "step",
                f"the forward returned {_shape(leaf)} for {total} rows: a mean over the batch "
                "would mix the trials",
                "Give a forward that returns one row of outputs for each row, without a loss",
            )
        columns.append(list(torch.split(leaf, list(rows.values()))))
    parts = zip(*columns, strict=True)
    return {name: tree_unflatten(list(part), form) for name, part in zip(rows, parts, strict=True)}


def _shape(leaf: Any) -> str:
    shown = tuple(leaf.shape) if isinstance(leaf, Tensor) else ""
    return f"{type(leaf).__name__}{shown}"


def plain_forward(model: nn.Module) -> Forward:
    """Return a call of a model with a batch: by keyword without `labels`, or by position."""

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**{key: value for key, value in batch.items() if key != "labels"})
        if isinstance(batch, Sequence):
            return model(*batch)
        return model(batch)

    return forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode, then give each module its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def causal_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of the next token, as transformers' causal models compute it.

    Args:
        outputs: With `logits (rows, tokens, vocabulary)`.
        batch: With `labels (rows, tokens)`; -100 is ignored.
    """
    return F.cross_entropy(*_next_tokens(outputs, batch))


def causal_losses(outputs: Any, batch: Mapping[str, Tensor], n: int) -> Tensor:
    """Return the causal loss `(n,)` of each of n equal parts of a batch, in one pass."""
    logits, labels = _next_tokens(outputs, batch)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.view(n, -1).sum(1) / (labels != IGNORED).view(n, -1).sum(1)


def _next_tokens(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return all logits `(rows * tokens, vocabulary)`, not copied, and the label of each."""
    if not isinstance(batch, Mapping) or "labels" not in batch or not hasattr(outputs, "logits"):
        found = "the default loss needs logits of the model and a batch with 'labels'"
        raise StateError("step", found, "Give both, or a loss of your own: loss=...")
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    logits = outputs.logits.flatten(0, 1)
    return logits.float() if logits.dtype.itemsize < 4 else logits, labels

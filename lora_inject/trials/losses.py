"""The loss of the next token, for a trial's outputs.

It comes with the gradient of the logits, part by part, so one tensor of the size of the logits is
all that is kept. `cross_entropy` keeps one and makes two more in its backward, which is the peak of
a step's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from lora_inject.core.layers.survey import unwrapped
from lora_inject.errors import StateError, check_type, within
from lora_inject.trials.batches import shown

Loss = Callable[[Any, Any], Tensor]
Losses = Loss | Mapping[str, Loss]
IGNORED, LABELS = -100, "a label for each token, or -100"
"""The label that cross entropy leaves out, and what errors ask for."""
PARTS = 8
LEAST = 2**20
"""Number of parts, and the fewest logits in one: the launches do not grow with the batch."""


def default_loss(model: nn.Module) -> Loss:
    """Return the loss of the next token, if the model has no other."""
    plain = unwrapped(model)
    kind, config = getattr(plain, "loss_type", None), getattr(plain, "config", None)
    encodes = getattr(config, "is_encoder_decoder", False) is True
    if encodes or kind not in (None, "ForCausalLM", "ForConditionalGeneration"):
        has = f"it is that of the next token, and a {type(plain).__name__} has another"
        raise StateError("the default loss", has, "Give a loss of your own: loss=...")
    return causal_loss


def scalar_loss(loss: Loss, outputs: Any, batch: Any, whose: str) -> Tensor:
    """Return one trial's loss, which must be a single number in a tensor."""
    asked = f"loss of trial {whose!r}"
    with within(asked):
        value = loss(outputs, batch)
    check_type(asked, value, Tensor, "Return a scalar tensor")
    if value.numel() != 1:
        raise StateError(asked, f"it has the shape {tuple(value.shape)}", "Return its mean")
    return value.reshape(())


def causal_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of the next token, as transformers' causal models compute it.

    Its gradient comes with it, so one backward is all that its graph is good for.

    Args:
        outputs: With `logits (rows, tokens, vocabulary)`.
        batch: With `labels (rows, tokens)`, int64; -100 is ignored.

    Raises:
        StateError: There are no such logits or labels, or a label is no token of the vocabulary
            (on the CPU; on a device torch stops the process, so that the host need not wait).
    """
    logits, labels = _logits(outputs, batch), _next(batch["labels"]).flatten()
    if len(labels) != logits.shape[:2].numel():
        problem = f"logits of shape {tuple(logits.shape)} for {len(labels)} labels"
        raise StateError("the default loss", problem, f"Give {LABELS}, or a loss of your own")
    kept = labels != IGNORED
    if labels.device.type == "cpu":
        _check_labels(labels, kept, logits.shape[2])
    weights = (kept if logits.dtype.itemsize < 8 else kept.double()) / kept.sum()
    losses: Tensor = _NextToken.apply(logits.flatten(0, 1), labels, weights)  # type: ignore[no-untyped-call]
    return losses.sum()


def _check_labels(labels: Tensor, kept: Tensor, n_classes: int) -> None:
    """Refuse labels that are no tokens, and those that are all ignored."""
    asked = "the default loss"
    wrong = labels[kept & ((labels >= n_classes) | (labels < 0))]
    if len(wrong):
        problem = f"a label is {int(wrong[0])}, and the logits are of {n_classes} tokens"
        raise StateError(asked, problem, f"Give {LABELS}")
    if not kept.any():
        why = f"each label after the first of a row is {IGNORED}, which makes its loss NaN"
        raise StateError(asked, why, "Label a token, or leave the batch out")


def _logits(outputs: Any, batch: Any) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    logits: Any = getattr(outputs, "logits", None)
    fits = isinstance(labels, Tensor) and (labels.dim(), labels.dtype) == (2, torch.int64)
    if not fits or not isinstance(logits, Tensor) or logits.dim() != 3:
        problem = (
            "it needs logits (rows, tokens, vocabulary) of the model and labels (rows, tokens) "
        )
        problem += f"of int64 in the batch; these are {shown(logits)} and {shown(labels)}"
        raise StateError("the default loss", problem, "Give both, or a loss of your own: loss=...")
    return logits


def _next(labels: Tensor) -> Tensor:
    """Return the label of the token after each, `(rows, tokens)`."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def ends_of(loss: Tensor, outputs: Any) -> frozenset[Any]:
    """Return the nodes of the graph that made those outputs which a loss leads to."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    made = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    ends, seen, nodes = set(), set[Any](), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            ends.add(node)
        else:
            nodes += [other for other, _ in node.next_functions]
    return frozenset(ends)


class _NextToken(torch.autograd.Function):
    """Weighted cross entropy of each token: logits `(n, v)`, labels and weights `(n,)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses, grads = torch.empty_like(weights), torch.empty_like(logits)
        tokens = max(LEAST // logits.shape[1], len(logits) // PARTS) + 1
        wide = torch.promote_types(logits.dtype, torch.float32)
        for start in range(0, len(logits), tokens):
            part = slice(start, start + tokens)
            w, index = weights[part, None], labels[part, None]
            index = index.masked_fill(index == IGNORED, 0)
            g = torch.log_softmax(logits[part], 1, wide)
            losses[part] = torch.where(w == 0, 0.0, -w * g.gather(1, index))[:, 0]
            g.exp_().scatter_add_(1, index, g.new_full((), -1.0).expand(index.shape))
            grads[part] = g.mul_(w).masked_fill_(w == 0, 0.0)
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (grads,) = ctx.saved_tensors
        return grads.mul_(g[:, None]), None, None

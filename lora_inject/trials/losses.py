"""The loss of the next token: of one trial, or of all trials of a pass at once.

At once, each loss comes with the gradient of its logits, part by part, so one tensor of the size of
the logits is all that is kept. `cross_entropy` keeps one and makes two more in its backward, which
is the peak of a step's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from lora_inject.errors import StateError, check_type
from lora_inject.layers.sending import sent_once
from lora_inject.layers.survey import unwrapped
from lora_inject.trials.batches import Joined

Loss = Callable[[Any, Any], Tensor]
IGNORED = -100
"""The label that cross entropy leaves out."""
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
    value, asked = loss(outputs, batch), f"loss of trial {whose!r}"
    check_type(asked, value, Tensor, "Return a scalar tensor")
    if value.numel() != 1:
        raise StateError(asked, f"it has the shape {tuple(value.shape)}", "Return its mean")
    return value.reshape(())


def causal_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of the next token, as transformers' causal models compute it.

    Args:
        outputs: With `logits (rows, tokens, vocabulary)`.
        batch: With `labels (rows, tokens)`; -100 is ignored.
    """
    logits = _logits(outputs, batch).flatten(0, 1)
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(wide, _next(batch["labels"]).flatten())


def causal_losses(outputs: Any, batches: Mapping[str, Any], of: Joined) -> tuple[Tensor, ...]:
    """Return the causal loss of each trial, for the outputs of their joined batch."""
    logits = _logits(outputs, next(iter(batches.values())))
    if of.even:
        labels = _next(of.batch["labels"]).flatten()
    else:
        for name, batch in batches.items() if of.lengths is not None else ():
            ids, mine = batch.get("input_ids"), batch["labels"]
            if isinstance(ids, Tensor) and ids.shape[:2] != mine.shape:
                found = f"its labels have the shape {tuple(mine.shape)}, and its input_ids "
                remedy = "Give each token a label, or -100"
                raise StateError(f"step, batch of {name!r}", found + str(tuple(ids.shape)), remedy)
        length = of.batch["labels"].shape[1]
        each = [_next(b["labels"], 0 if of.packed else length) for b in batches.values()]
        labels = torch.cat([one.flatten() for one in each])
    if labels.numel() != logits.shape[:2].numel():
        found = f"logits of shape {tuple(logits.shape)} for {labels.numel()} labels"
        raise StateError("step", found, "Give a loss of your own: loss=...")
    repeat = labels.numel() // sum(of.sizes.values())
    sizes, kept = [repeat * n for n in of.sizes.values()], labels != IGNORED
    repeats = sent_once(tuple(sizes), kept.device)
    counts = _sums(kept, sizes).repeat_interleave(repeats, output_size=len(kept))
    weights = kept / counts if logits.dtype.itemsize < 8 else kept.double() / counts
    losses: Tensor = _NextToken.apply(logits.flatten(0, 1), labels, weights)  # type: ignore[no-untyped-call]
    return _sums(losses, sizes).unbind()


def ends_of(loss: Tensor, outputs: Any) -> frozenset[Any]:
    """Return the nodes of the graph that made those outputs which a loss leads to."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    made = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    found, seen, nodes = set(), set[Any](), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.add(node)
        else:
            nodes += [other for other, _ in node.next_functions]
    return frozenset(found)


def _sums(t: Tensor, sizes: list[int]) -> Tensor:
    """Return the sum of each trial's tokens."""
    if len(set(sizes)) == 1:
        return t.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in torch.split(t, sizes)])


def _logits(outputs: Any, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "labels" not in batch or not hasattr(outputs, "logits"):
        found = "the default loss needs logits of the model and a batch with 'labels'"
        raise StateError("step", found, "Give both, or a loss of your own: loss=...")
    logits: Tensor = outputs.logits
    if logits.dim() != 3 or batch["labels"].dim() != 2:
        shapes = f"{tuple(logits.shape)} and {tuple(batch['labels'].shape)}"
        found = f"the default loss needs a label for each token; logits and labels are {shapes}"
        raise StateError("step", found, "Give a loss of your own: loss=...")
    return logits


def _next(labels: Tensor, length: int = 0) -> Tensor:
    """Return the label of the token after each, `(rows, tokens)`, filled up to a length."""
    missing = max(0, length - labels.shape[1])
    return F.pad(labels[:, 1:], (0, 1 + missing), value=IGNORED)


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
        # A trial whose loss is not finite gets 0, which a product with NaN is not.
        grads.mul_(g[:, None]).masked_fill_((g == 0)[:, None], 0.0)
        return grads, None, None

"""The loss of the next token: of one trial, or of all trials of a pass at once.

At once, each loss comes with the gradient of its logits, part by part, so one tensor of the size of
the logits is all that is kept. `cross_entropy` keeps one and makes two more in its backward, which
is the peak of a step's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_inject.core.layers.sending import sent_once
from lora_inject.core.layers.survey import unwrapped
from lora_inject.errors import StateError, check_type, within
from lora_inject.trees import tree_leaves
from lora_inject.trials.batches import Joined

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

    Args:
        outputs: With `logits (rows, tokens, vocabulary)`.
        batch: With `labels (rows, tokens)`, int64; -100 is ignored.

    Raises:
        StateError: There are no such logits or labels, or a label is no token of the vocabulary
            (on the CPU; on a device torch stops the process, so that the host need not wait).
    """
    logits, labels = _logits(outputs, batch), _next(batch["labels"]).flatten()
    _check_labels(labels, logits, {})
    logits = logits.flatten(0, 1)
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(wide, labels)


def causal_losses(outputs: Any, batches: Mapping[str, Any], of: Joined) -> tuple[Tensor, ...]:
    """Return the causal loss of each trial, for the outputs of their joined batch."""
    logits = _logits(outputs, next(iter(batches.values())))
    if of.even:
        labels = _next(of.batch["labels"]).flatten()
    else:
        for name, batch in batches.items() if of.lengths is not None else ():
            ids, mine = batch.get("input_ids"), batch["labels"]
            if isinstance(ids, Tensor) and ids.shape[:2] != mine.shape:
                problem = f"its labels have the shape {tuple(mine.shape)}, and its input_ids "
                problem += str(tuple(ids.shape))
                raise StateError(f"step, batch of {name!r}", problem, f"Give {LABELS}")
        length = of.batch["labels"].shape[1]
        each = [_next(b["labels"], 0 if of.packed else length) for b in batches.values()]
        labels = torch.cat([one.flatten() for one in each])
    _check_labels(labels, logits, of.sizes)
    repeat = labels.numel() // sum(of.sizes.values())
    sizes, kept = [repeat * n for n in of.sizes.values()], labels != IGNORED
    repeats = sent_once(tuple(sizes), kept.device)
    counts = _sums(kept, sizes).repeat_interleave(repeats, output_size=len(kept))
    weights = kept / counts if logits.dtype.itemsize < 8 else kept.double() / counts
    losses: Tensor = _NextToken.apply(logits.flatten(0, 1), labels, weights)  # type: ignore[no-untyped-call]
    return _sums(losses, sizes).unbind()


def _check_labels(labels: Tensor, logits: Tensor, sizes: Mapping[str, int]) -> None:
    """Refuse labels `(n,)` that are not one for each of the logits, or no token on the CPU."""
    asked, n_classes = "the default loss", logits.shape[2]
    if len(labels) != logits.shape[:2].numel():
        problem = f"logits of shape {tuple(logits.shape)} for {len(labels)} labels"
        raise StateError(asked, problem, f"Give {LABELS}, or a loss of your own: loss=...")
    if labels.device.type != "cpu":
        return
    wrong = (labels >= n_classes) | ((labels < 0) & (labels != IGNORED))
    if wrong.any():
        place = int(wrong.nonzero()[0]) * sum(sizes.values()) // len(labels)
        ends = zip(accumulate(sizes.values()), sizes, strict=True)
        whose = next((f", batch of {name!r}" for end, name in ends if place < end), "")
        problem = f"a label is {int(labels[wrong][0])}, and the logits are of {n_classes} tokens"
        raise StateError(f"{asked}{whose}", problem, f"Give {LABELS}")


def refuse_unlabeled(losses: Mapping[str, float], batches: Mapping[str, Any]) -> None:
    """Refuse batches whose labels are all ignored: NaN then does not come from the training."""
    for name in (name for name, value in losses.items() if math.isnan(value)):
        if bool((_next(batches[name]["labels"]) == IGNORED).all()):
            why = f"each label after the first of a row is {IGNORED}, which makes its loss NaN"
            raise StateError(f"step, batch of {name!r}", why, "Label a token, or leave it out")


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


def _sums(t: Tensor, sizes: list[int]) -> Tensor:
    """Return the sum of each trial's tokens."""
    if len(set(sizes)) == 1:
        return t.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in torch.split(t, sizes)])


def _logits(outputs: Any, batch: Any) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or not hasattr(outputs, "logits"):
        problem = "the default loss needs logits of the model and a batch with 'labels'"
        raise StateError("step", problem, "Give both, or a loss of your own: loss=...")
    logits: Tensor = outputs.logits
    if logits.dim() != 3 or labels.dim() != 2:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        problem = f"the default loss needs a label for each token; logits and labels are {shapes}"
        raise StateError("step", problem, "Give a loss of your own: loss=...")
    if labels.dtype != torch.int64:
        problem = f"the default loss needs labels of torch.int64, and these are {labels.dtype}"
        raise StateError("step", problem, "Convert them, or give a loss of your own: loss=...")
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

"""What is learnt from a row: the words that follow, a class, or a number.

A task turns rows into tensors, says what the loss of a batch is and which numbers tell
how good a model is. The words that follow are learnt by eq. (2) of the LoRA paper: the sum runs
over the target's tokens only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from data.packaged import refusal
from data.pairs import IGNORED, Example, collate
from torch import Tensor
from torch.nn import functional as F

from training.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Classes", "Numbers", "Pairs", "Task", "pair_loss", "token_losses"]


class Task(ABC):
    """What is learnt.

    Attributes:
        metric: The number that chooses the best checkpoint.
        higher: Whether more of it is better.
    """

    metric: str
    higher: bool

    @abstractmethod
    def encode(self, rows: Sequence[Row], *, train: bool) -> list[Any]:
        """Rows as tokens; for training, what is too long is left out."""

    @abstractmethod
    def collate(self, batch: Sequence[Any]) -> dict[str, Tensor]:
        """A batch as the model takes it, with its `labels`."""

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Of a batch: a sum over `num_items_in_batch`, which counts all that an update is over."""

    def thin(self, logits: Any, labels: Tensor) -> Tensor:
        """What has to be kept of a batch's logits to compute the metrics."""
        del labels
        return logits[0] if isinstance(logits, tuple) else logits

    @abstractmethod
    def metrics(self, found: Any) -> dict[str, float]:
        """The numbers, of what `thin` kept and the labels, over all rows together."""


# ------------------------------------------------------------------------------- words that follow


def pair_loss(
    logits: Tensor, labels: Tensor, n_items: Any = None, smoothing: float = 0.0
) -> Tensor:
    """The negative of eq. (2) for a batch: the mean over the tokens of its targets.

    Args:
        logits: (n, length, vocabulary).
        labels: (n, length), `IGNORED` outside the targets. The logits at i predict the token at
            i + 1.
        n_items: What to divide the sum by, where the batch is a part of an update; by default the
            number of target tokens.
        smoothing: Label smoothing: this share of each token's weight goes to all words alike.

    Returns:
        A number.
    """
    predicts = labels[:, 1:] != IGNORED
    wanted = labels[:, 1:][predicts]
    total = F.cross_entropy(
        logits[:, :-1][predicts].float(), wanted, reduction="sum", label_smoothing=smoothing
    )
    return total / (wanted.numel() if n_items is None else n_items)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each target token at the place that predicts it, (n, length - 1); else 0."""
    wanted = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED
    )
    return losses.masked_fill(wanted == IGNORED, 0.0)


class Pairs(Task):
    """The target's words, given the context.

    Args:
        tokenizer: The model's.
        prompt: How a context is put, with `{text}` in it.
        max_tokens: Of a pair; what is longer is left out of training.
        smoothing: Label smoothing in training.
    """

    metric = "nll"
    higher = False

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, max_tokens: int, smoothing: float
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.smoothing = smoothing

    def context(self, row: Row) -> list[int]:
        """The tokens that a model is shown."""
        return self.tokenizer.encode(self.prompt.format(text=row.text))

    def encode(self, rows: Sequence[Row], *, train: bool) -> list[Example]:
        """Context and target apart, so that their border never moves.

        In training the target ends with the token that ends a turn, so that generation stops. In
        measuring it does not: a base that was never told how to end would be charged for it.
        """
        found = []
        for row in rows:
            context = self.context(row)
            target = self.tokenizer.encode(row.target, add_special_tokens=False)
            example = Example(context + target + [self._end] * train, len(context))
            if len(example.tokens) <= self.max_tokens:
                found.append(example)
        if rows and not found:
            raise refusal(
                f"pairs of at most {self.max_tokens} tokens", "all are longer", "Raise --max-tokens"
            )
        return found

    @property
    def _end(self) -> int:
        return self.tokenizer.eos_token_id

    def collate(self, batch: Sequence[Example]) -> dict[str, Tensor]:
        """Padded on the right, where causal attention never looks."""
        tokens, labels = collate(batch, self._end)
        return {"input_ids": tokens, "labels": labels}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Eq. (2), with label smoothing."""
        return pair_loss(outputs["logits"], labels, num_items_in_batch, self.smoothing)

    def thin(self, logits: Any, labels: Tensor) -> Tensor:
        """One number for each token instead of one for each word that it might have been."""
        return token_losses(logits[0] if isinstance(logits, tuple) else logits, labels)

    def metrics(self, found: Any) -> dict[str, float]:
        """Per token of all targets, without label smoothing."""
        counted = found.label_ids[:, 1:] != IGNORED
        nll = float(found.predictions[counted].astype(np.float64).mean())
        return {"nll": nll, "perplexity": float(np.exp(nll)), "target_tokens": int(counted.sum())}


# ------------------------------------------------------------------------------ a class or a number


class _Judgement(Task):
    """What a text is, or two texts together."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @abstractmethod
    def label(self, row: Row) -> int | float:
        """The target as the model is to give it."""

    def encode(self, rows: Sequence[Row], *, train: bool) -> list[dict[str, Any]]:
        del train
        return [
            {
                **self.tokenizer(row.text, row.second, truncation=True, max_length=self.max_tokens),
                "labels": self.label(row),
            }
            for row in rows
        ]

    def collate(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{k: v for k, v in row.items() if k != "labels"} for row in batch]
        padded = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        return {**padded, "labels": torch.tensor([row["labels"] for row in batch])}


class Classes(_Judgement):
    """One of several classes.

    Args:
        tokenizer: The model's.
        max_tokens: Of a text; what is longer is cut.
        names: The classes, as the rows write them.
    """

    metric = "accuracy"
    higher = True

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, names: Sequence[str]) -> None:
        super().__init__(tokenizer, max_tokens)
        self.names = list(names)

    def label(self, row: Row) -> int:
        if row.target not in self.names:
            there = ", ".join(self.names)
            raise refusal(
                f"the class {row.target!r} of {row.text[:40]!r}",
                f"the rows to train on have: {there}",
                "Put an example of it among them",
            )
        return self.names.index(row.target)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = F.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


class Numbers(_Judgement):
    """A number, by the square of the error."""

    metric = "mse"
    higher = False

    def label(self, row: Row) -> float:
        try:
            return float(row.target)
        except ValueError:
            raise refusal(
                f"the number of {row.text[:40]!r}", f"found {row.target!r}", "Write a number"
            ) from None

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        errors = outputs["logits"].squeeze(-1).float() - labels
        total = errors.square().sum()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, found: Any) -> dict[str, float]:
        guesses = found.predictions.squeeze(-1).astype(np.float64)
        varied = guesses.std() > 0 and found.label_ids.std() > 0
        pearson = float(np.corrcoef(guesses, found.label_ids)[0, 1]) if varied else 0.0
        return {"mse": float(((guesses - found.label_ids) ** 2).mean()), "pearson": pearson}

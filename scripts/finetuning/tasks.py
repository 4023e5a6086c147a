"""What is learned from a row: the words that follow, a class, or a number.

A task turns rows into tensors and says which numbers tell how good a model is. Words are learned by
eq. (2) of the LoRA paper: the loss is over the target's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from data.packaged import refusal
from data.pairs import IGNORED
from finetuning.rows import Row
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding


class Words:
    """The target's words, given the context; or the assistant's, given the conversation.

    A context is put into `prompt` for `{text}`; rows of more than `max_tokens` are left out.
    """

    metric, higher = "nll", False

    def __init__(self, tokenizer: Any, prompt: str, max_tokens: int, smoothing: float) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.max_tokens, self.smoothing = max_tokens, smoothing

    def encode(self, rows: Sequence[Row], *, train: bool) -> list[dict[str, list[int]]]:
        """Tokens and labels of each row; outside of what is learned the label is -100.

        In training a target ends with the token that ends a turn, so that generation stops; in
        measuring it does not: a base that was never told how to end would be charged for it.
        """
        found = [self._turns(row) if row.messages else self._pair(row, train) for row in rows]
        short = [row for row in found if len(row["input_ids"]) <= self.max_tokens]
        if rows and not short:
            asked = f"rows of at most {self.max_tokens} tokens"
            raise refusal(asked, "all are longer", "Raise --max-tokens")
        return short

    def _pair(self, row: Row, train: bool) -> dict[str, list[int]]:
        context = list(self.tokenizer.encode(self.prompt.format(text=row.text)))
        target = self.tokenizer.encode(row.target, add_special_tokens=False)
        target += [self.tokenizer.eos_token_id] * train
        return {"input_ids": context + target, "labels": [IGNORED] * len(context) + target}

    def _turns(self, row: Row) -> dict[str, list[int]]:
        """Tokens of a conversation by the model's own template, turn by turn."""
        if self.tokenizer.chat_template is None:
            raise refusal("rows of messages", "the tokenizer has no chat template", "Use pairs")
        messages = [{"role": role, "content": content} for role, content in row.messages]

        def tokens(n: int, answer: bool = False) -> list[int]:
            how = {"tokenize": False, "add_generation_prompt": answer}
            text = self.tokenizer.apply_chat_template(messages[:n], **how)
            return list(self.tokenizer.encode(text, add_special_tokens=False))

        ids = tokens(len(messages))
        labels = [IGNORED] * len(ids)
        for i, (role, _) in enumerate(row.messages):
            if role == "assistant":
                before, after = tokens(i, answer=True), tokens(i + 1)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    found = "the chat template rewrites earlier turns"
                    raise refusal("the tokens of the assistant", found, "Give one turn in each row")
                labels[len(before) : len(after)] = after[len(before) :]
        return {"input_ids": ids, "labels": labels}

    def collate(self, batch: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Padded on the right, where causal attention never looks."""
        pads = {"input_ids": self.tokenizer.eos_token_id, "labels": IGNORED}
        columns = {key: [torch.tensor(row[key]) for row in batch] for key in pads}
        return {key: pad_sequence(columns[key], True, pad) for key, pad in pads.items()}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The negative of eq. (2): the mean over the target's tokens of the whole update."""
        counted = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][counted]
        logits = outputs["logits"][:, :-1][counted].float()
        total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=self.smoothing)
        return total / (wanted.numel() if num_items_in_batch is None else num_items_in_batch)

    def thin(self, logits: Any, labels: Tensor) -> Tensor:
        """-log p of each target token, (n, length - 1), instead of a number for each word."""
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float().mT
        return F.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=IGNORED)

    def metrics(self, found: Any) -> dict[str, float]:
        """Per token of all targets, without label smoothing."""
        counted = found.label_ids[:, 1:] != IGNORED
        nll = float(found.predictions[counted].astype(np.float64).mean())
        return {"nll": nll, "perplexity": float(np.exp(nll)), "target_tokens": int(counted.sum())}


class Judgment:
    """A class of `names`, or a number where there are none; of a text, or of two texts together.

    What is longer than `max_tokens` is cut.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, names: Sequence[str]) -> None:
        self.tokenizer, self.max_tokens, self.names = tokenizer, max_tokens, list(names)
        self.collate = DataCollatorWithPadding(tokenizer)
        self.metric, self.higher = ("accuracy", True) if names else ("mse", False)
        self.loss = None  # the model's own

    def label(self, row: Row) -> int | float:
        """Return the target as the model is to give it."""
        try:
            return self.names.index(row.target) if self.names else float(row.target)
        except ValueError:
            there = f"a class of: {', '.join(self.names)}" if self.names else "a number"
            asked = f"the label of {row.text[:40]!r}"
            raise refusal(asked, f"found {row.target!r}", f"Write {there}") from None

    def encode(self, rows: Sequence[Row], *, train: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return tokens and label of each row, whatever it is for."""
        cut = {"truncation": True, "max_length": self.max_tokens}
        found = [self.tokenizer(row.text, row.second, **cut) for row in rows]
        return [{**one, "labels": self.label(row)} for one, row in zip(found, rows, strict=True)]

    def thin(self, logits: Any, labels: Tensor) -> Tensor:  # noqa: ARG002
        """Return what the metrics need of the outputs."""
        return logits[0] if isinstance(logits, tuple) else logits

    def metrics(self, found: Any) -> dict[str, float]:
        """Return the numbers over all rows together."""
        if self.names:
            return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
        guesses = found.predictions.squeeze(-1).astype(np.float64)
        varied = guesses.std() > 0 and found.label_ids.std() > 0
        pearson = float(np.corrcoef(guesses, found.label_ids)[0, 1]) if varied else 0.0
        return {"mse": float(((guesses - found.label_ids) ** 2).mean()), "pearson": pearson}

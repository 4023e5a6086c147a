"""What a model says itself, and how near that is to what people said.

Rows with the same context are several right answers to one question, so each context is
asked once and compared with all of its targets, as the E2E challenge does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from training.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.tasks import Pairs

__all__ = ["bleu", "by_context", "say"]

BATCH = 16


def by_context(rows: Iterable[Row], n: int | None = None) -> dict[str, list[str]]:
    """Context to all of its targets, for the first `n` contexts."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.text in found or n is None or len(found) < n:
            found.setdefault(row.text, []).append(row.target)
    return found


def say(
    model: PreTrainedModel, task: Pairs, contexts: Sequence[str], max_new_tokens: int = 80
) -> list[str]:
    """The model's own words after each context: greedy, up to the end of the line.

    Args:
        model: A causal language model.
        task: How a context is put.
        contexts: The contexts.
        max_new_tokens: Where to stop if the model does not.

    Returns:
        One line for each.
    """
    prompts = [task.context(Row(context, "")) for context in contexts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        with torch.inference_mode():
            written = _continue(model, task, [prompts[i] for i in rows], max_new_tokens)
        for i, tokens in zip(rows, written, strict=True):
            text = task.tokenizer.decode(tokens, skip_special_tokens=True)
            said[i] = next(iter(text.strip().splitlines()), "").strip()
    model.train(was_training)
    return said


def _continue(
    model: PreTrainedModel, task: Pairs, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[Any]:
    """Greedy decoding of a batch, padded on the left so that all go on at one place."""
    end = task.tokenizer.eos_token_id
    length = max(map(len, prompts))
    tokens = torch.full((len(prompts), length), end, device=model.device)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return list(written[:, length:])


def bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Corpus BLEU by sacrebleu, with as many references for each line as there are.

    Args:
        said: One line for each context.
        references: What people said, for each context.

    Returns:
        `score` in [0, 100], sacrebleu's `signature`, and how many contexts.
    """
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    # sacrebleu takes columns: the first reference of each line, then the second, ...
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    metric = BLEU(force=True)  # no warning of lines that end in " .": so do those trained on
    score = metric.corpus_score(list(said), columns).score
    return {"score": score, "signature": str(metric.get_signature()), "n": len(said)}

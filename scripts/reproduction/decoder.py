"""Stage `decoder`: fine-tuning SmolLM2-135M on pairs of code and summary by eq. (1) and (2)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from data import pairs as data
from data.pairs import Example
from torch import Tensor

import lora_inject as li

from .lab import Answer, Lab, Result, table, verdict
from .methods import Method, prefix, top_two, train

BATCH = 8
MAX_TOKENS = 112  # of a pair; what is longer is left out
MARGIN = 0.02  # nats for each token: what counts as on par


def _lora(model: Any, rank: int) -> None:
    li.inject(model, {"rank": rank, "alpha": 8, "targets": [r"self_attn\.[qv]_proj"]})


PREFIX = partial(prefix, body="model", n_tokens=10)
R4 = (2e-3, 5e-3)
METHODS = {
    "lora-r4": Method("LoRA q, v, r = 4", partial(_lora, rank=4), R4),
    "full": Method("full fine-tuning", lambda model: model, (5e-5, 2e-4)),
    "lora-r1": Method("LoRA q, v, r = 1", partial(_lora, rank=1), R4, like="lora-r4"),
    "lora-r16": Method("LoRA q, v, r = 16", partial(_lora, rank=16), R4, like="lora-r4"),
    "top2": Method("top two layers", lambda m: top_two(m, m.model.layers), (2e-4, 1e-3)),
    "prefix": Method("prefix tuning, 10 tokens (PEFT)", PREFIX, (1e-2, 5e-2)),
}


def decoder(lab: Lab) -> tuple[str, list[Answer]]:
    """Perplexity of every method; the rate is chosen on pairs of the training modules."""
    found = {"untrained": lab.run(fine_tune, "untrained", 0.0)}
    for name, method in METHODS.items():
        tuned = method.like or name
        rates = METHODS[tuned].rates[: lab.sizes.keep_rates]
        best = min(rates, key=lambda rate: per_token(lab.run(fine_tune, tuned, rate)["dev"])[0])
        found[method.title] = lab.run(fine_tune, name, best)
    shown = {title: f"{math.exp(per_token(rows['test'])[0]):.2f}" for title, rows in found.items()}
    full = METHODS["full"].title
    answers = []
    for title in (METHODS[name].title for name in ("lora-r1", "lora-r4", "lora-r16")):
        both = zip(found[title]["test"], found[full]["test"], strict=True)
        mean, error = per_token([(one - other, n) for (one, n), (other, _) in both])
        nats = f"{mean:+.3f} ± {error:.3f} nats a token"
        said = f"perplexity {shown[title]} against {shown[full]} ({nats})"
        answers.append((said, verdict(-mean, error, -MARGIN)))
    return table(("method", "perplexity"), shown.items()), answers


def fine_tune(lab: Lab, name: str, rate: float) -> Result:
    """Train, but for `untrained`; nats and tokens of pairs to choose by, and to report on."""
    model, tokenizer = lab.decoder()
    split = lab.pairs()
    n_train, n_test = lab.sizes.pair_steps * BATCH, lab.sizes.n_pairs
    known, test = (
        data.examples(tokenizer, part, n, MAX_TOKENS, ended=False)
        for part, n in ((split.train, n_train + n_test // 2), (split.held_out, n_test))
    )
    if name in METHODS:
        torch.manual_seed(0)
        METHODS[name].apply(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        batches = data.batches(known[:n_train], BATCH)
        train(trained, batches, lambda batch: log_probs(model, batch).mean().neg(), rate)
    return {"dev": measure(model, known[n_train:]), "test": measure(model, test)}


def log_probs(model: Any, batch: list[Example]) -> Tensor:
    return data.target_log_probs(model, *data.collate(batch, 0))


def measure(model: Any, part: list[Example]) -> list[tuple[float, int]]:
    """Nats and number of target tokens of each pair."""
    found: list[tuple[float, int]] = []
    with torch.inference_mode():
        for batch in data.batches(part, BATCH):
            sizes = [len(e.tokens) - e.n_prompt for e in batch]
            pieces = log_probs(model, batch).split(sizes)
            found += [(-p.sum().item(), n) for p, n in zip(pieces, sizes, strict=True)]
    return found


def per_token(rows: list[tuple[float, int]]) -> tuple[float, float]:
    """Nats for each token, with the standard error over pairs."""
    nats, tokens = map(sum, zip(*rows, strict=True))
    mean = nats / tokens
    return mean, math.sqrt(sum((of_pair - mean * n) ** 2 for of_pair, n in rows)) / tokens

"""Stage `decoder`: fine-tuning SmolLM2-135M on pairs of code and summary by eq. (1) and (2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from data import pairs as data
from data.pairs import Example

import lora_inject as li

from .lab import Claim, Lab, Result, table, verdict
from .methods import Method, prefix, top_two, train

BATCH = 8
MAX_TOKENS = 112  # of a pair; what is longer is left out
MARGIN = 0.02  # nats for each token: what counts as on par


def _lora(rank: int) -> Callable[[Any], Any]:
    config = {"rank": rank, "alpha": 8, "targets": [r"self_attn\.[qv]_proj"]}
    return lambda model: li.inject(model, config)


METHODS = {
    "lora-r4": Method("LoRA q, v, r = 4", _lora(4), (2e-3, 5e-3)),
    "full": Method("full fine-tuning", lambda model: model, (5e-5, 2e-4)),
    "lora-r1": Method("LoRA q, v, r = 1", _lora(1), like="lora-r4"),
    "lora-r16": Method("LoRA q, v, r = 16", _lora(16), like="lora-r4"),
    "top2": Method("top two layers", lambda m: top_two(m, m.model.layers), (2e-4, 1e-3)),
    "prefix": Method(
        "prefix tuning, 10 tokens (PEFT)", lambda m: prefix(m, "model", 10), (1e-2, 5e-2)
    ),
}


def decoder(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Perplexity of every method; the rate is chosen on pairs of the training modules."""
    settings = lab.settings("pair_steps", "n_pairs")
    start = lab.run("pairs/base", lab.settings("n_pairs"), lambda: fine_tune(lab, None, 0))
    best: dict[str, tuple[float, Result]] = {}
    for name, method in METHODS.items():
        rates = method.rates[: lab.sizes.keep_rates] or (best[method.like][0],)
        tried = [
            lab.run(
                f"pairs/{name}/{rate:g}",
                {"rate": rate, **settings},
                lambda method=method, rate=rate: fine_tune(lab, method, rate),
            )
            for rate in rates
        ]
        best[name] = min(zip(rates, tried, strict=True), key=lambda one: one[1]["dev"])
    full = best["full"][1]
    rows = [("untrained", f"{math.exp(start['test']):.2f}")]
    rows += [(METHODS[n].title, f"{math.exp(r['test']):.2f}") for n, (_, r) in best.items()]
    perplexities = dict(rows)
    claims = []
    for name in ("lora-r1", "lora-r4", "lora-r16"):
        title, (mean, error) = METHODS[name].title, behind(best[name][1], full)
        against = f"{perplexities[title]} against {perplexities[METHODS['full'].title]}"
        claims.append((
            f"{title}, is on par with full fine-tuning on a generation task",
            "GPT-2 medium E2E: BLEU 70.4 against 68.2",
            f"perplexity {against} ({mean:+.3f} ± {error:.3f} nats a token)",
            verdict(-mean, error, -MARGIN),
        ))  # fmt: skip
    return [table(("method", "perplexity"), rows)], claims


def parts(lab: Lab, tokenizer: Any) -> list[list[Example]]:
    """Pairs to train on, to choose the rate by (of the training modules), and to report on."""
    split = lab.pairs()
    n_train, n_test = lab.sizes.pair_steps * BATCH, lab.sizes.n_pairs
    n = n_train + n_test // 2
    known = data.examples(tokenizer, split.train, n, MAX_TOKENS, ended=False)
    test = data.examples(tokenizer, split.held_out, n_test, MAX_TOKENS, ended=False)
    return [known[:n_train], known[n_train:], test]


def fine_tune(lab: Lab, method: Method | None, rate: float) -> Result:
    """Train, unless there is no method, then measure on both held-out parts."""
    model, tokenizer = lab.decoder()
    rows, *measured = parts(lab, tokenizer)
    if method is None:
        return measure(model, measured)
    torch.manual_seed(0)
    method.apply(model)
    train(
        [p for p in model.parameters() if p.requires_grad],
        data.batches(rows, BATCH),
        lambda batch: -data.target_log_probs(model, *data.collate(batch, 0)).mean(),
        rate,
    )
    return measure(model, measured)


def measure(model: Any, parts: Sequence[Sequence[Example]]) -> Result:
    """Nats for each target token, on the development and the test part; by pair on the latter."""
    means, nats, tokens = [], [], []
    with torch.inference_mode():
        for part in parts:
            nats, tokens = [], []
            for batch in data.batches(part, BATCH):
                sizes = [len(e.tokens) - e.n_prompt for e in batch]
                flat = data.target_log_probs(model, *data.collate(batch, 0))
                nats += [-piece.sum().item() for piece in flat.split(sizes)]
                tokens += sizes
            means.append(sum(nats) / sum(tokens))
    return {"dev": means[0], "test": means[1], "nats": nats, "tokens": tokens}


def behind(one: Result, other: Result) -> tuple[float, float]:
    """Nats for each token that one is worse than the other, with its standard error over pairs."""
    total = sum(one["tokens"])
    mean = (sum(one["nats"]) - sum(other["nats"])) / total
    rows = zip(one["nats"], other["nats"], one["tokens"], strict=True)
    return mean, math.sqrt(sum((a - b - mean * n) ** 2 for a, b, n in rows)) / total

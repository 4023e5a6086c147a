"""Stage `decoder`: fine-tuning SmolLM2-135M on pairs of code and summary by eq. (1) and (2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from data import pairs as data
from data.pairs import Example
from torch import Tensor

import lora_inject

from .lab import Claim, Lab, Result, table, verdict
from .sentences import WEIGHT_DECAY, factor

BATCH = 8
MAX_TOKENS = 112  # of a pair; what is longer is left out
MARGIN = 0.02  # nats for each token: what counts as on par


class Way(NamedTuple):
    """One way to fine-tune the decoder; without rates it takes that of LoRA at r = 4."""

    title: str
    apply: Callable[[Any], Any]
    rates: tuple[float, ...]


def _top_two(model: Any) -> Any:
    model.requires_grad_(False)
    model.model.layers[-2:].requires_grad_(True)
    return model


def _lora(rank: int) -> Callable[[Any], Any]:
    config = {"rank": rank, "alpha": 8, "targets": [r"self_attn\.[qv]_proj"]}
    return lambda model: lora_inject.inject(model, config)


def _prefix(model: Any) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    # PEFT hands over the prefix by a name that transformers is about to change
    warnings.filterwarnings("ignore", category=FutureWarning)
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))


WAYS = {
    "lora-r4": Way("LoRA q, v, r = 4", _lora(4), (2e-3, 5e-3)),
    "full": Way("full fine-tuning", lambda model: model, (5e-5, 2e-4)),
    "lora-r1": Way("LoRA q, v, r = 1", _lora(1), ()),
    "lora-r16": Way("LoRA q, v, r = 16", _lora(16), ()),
    "top2": Way("top two layers", _top_two, (2e-4, 1e-3)),
    "prefix": Way("prefix tuning, 10 tokens (PEFT)", _prefix, (1e-2, 5e-2)),
}


def decoder(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Perplexity of every way; the rate is chosen on pairs of the training modules."""
    settings = lab.settings("pair_steps", "n_pairs")
    start = lab.run("pairs/base", lab.settings("n_pairs"), lambda: base(lab))
    best: dict[str, tuple[float, Result]] = {}
    for name, way in WAYS.items():
        tried = {}
        for rate in way.rates[: lab.sizes.keep_rates] or (best["lora-r4"][0],):
            tried[rate] = lab.run(
                f"pairs/{name}/{rate:g}",
                {"rate": rate, **settings},
                lambda way=way, rate=rate: fine_tune(lab, way, rate),
            )
        rate = min(tried, key=lambda rate: tried[rate]["dev"])
        best[name] = rate, tried[rate]
    rows = [("untrained", f"{math.exp(start['test']):.2f}")]
    full = best["full"][1]
    base_line = f"{math.exp(full['test']):.2f}"
    claims = {}
    for name, (_, result) in best.items():
        mean, error = behind(result, full)
        nats = "" if name == "full" else f"{mean:+.3f} ± {error:.3f}"
        perplexity = f"{math.exp(result['test']):.2f}"
        rows.append((WAYS[name].title, perplexity))
        if name.startswith("lora"):
            claims[name] = (
                f"{WAYS[name].title}, is on par with full fine-tuning on a generation task",
                "GPT-2 medium E2E: BLEU 70.4 against 68.2",
                f"perplexity {perplexity} against {base_line} ({nats} nats a token)",
                verdict(-mean, error, -MARGIN),
            )
    return [table(("method", "perplexity"), rows)], [
        claims[name] for name in ("lora-r1", "lora-r4", "lora-r16")
    ]


def parts(lab: Lab, tokenizer: Any) -> list[list[Example]]:
    """Pairs to train on, to choose the rate by (of the training modules), and to report on."""
    split = lab.pairs()
    n_train, n_test = lab.sizes.pair_steps * BATCH, lab.sizes.n_pairs
    n = n_train + n_test // 2
    known = data.examples(tokenizer, split.train, n, MAX_TOKENS, ended=False)
    test = data.examples(tokenizer, split.held_out, n_test, MAX_TOKENS, ended=False)
    return [known[:n_train], known[n_train:], test]


def base(lab: Lab) -> Result:
    """The untrained model."""
    model, tokenizer = lab.decoder()
    return measure(model, parts(lab, tokenizer)[1:])


def fine_tune(lab: Lab, way: Way, rate: float) -> Result:
    """Train, then measure on both held-out parts."""
    model, tokenizer = lab.decoder()
    rows = parts(lab, tokenizer)
    torch.manual_seed(0)
    model = way.apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    order = data.batches(rows[0], BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, len(order)))
    for batch in order:
        (-log_probs(model, *data.collate(batch, 0)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return measure(model, rows[1:])


def log_probs(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each target token; through PEFT's forward where PEFT wraps the model."""
    if not hasattr(model, "peft_config"):
        return data.target_log_probs(model, tokens, labels)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    predicts = labels[:, 1:] != data.IGNORED
    wanted = labels[:, 1:][predicts]
    return logits[predicts].float().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)


def measure(model: Any, parts: Sequence[Sequence[Example]]) -> Result:
    """Nats for each target token, on the development and the test part; by pair on the latter."""
    means, nats, tokens = [], [], []
    with torch.inference_mode():
        for part in parts:
            nats, tokens = [], []
            for batch in data.batches(part, BATCH):
                sizes = [len(e.tokens) - e.n_prompt for e in batch]
                flat = log_probs(model, *data.collate(batch, 0))
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

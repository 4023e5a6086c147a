"""Stage `decoder`: fine-tuning a decoder on context-target pairs by eq. (1) and (2) (section 2).

A small second look at quality, on another architecture and a generation task: code to
its one-line summary (`pairs.py`), SmolLM2-135M. The rate is chosen on pairs of the training
modules, the result is the perplexity of pairs of other modules. The model has no biases, so there
is no BitFit, and its head is tied to the embedding, so there is no head alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import pairs as data
from data.pairs import Example, target_log_probs
from torch import Tensor

import lora_inject

from .classifier import WEIGHT_DECAY, factor
from .document import Claim, Section, table, verdict_above
from .lab import Lab, Result

BATCH = 8
MAX_TOKENS = 112  # of a pair; what is longer is left out
SEED = 0
MARGIN = 0.02  # nats for each token: what counts as on par


@dataclass(frozen=True)
class Way:
    """One way to fine-tune the decoder.

    Attributes:
        title: As in tables.
        apply: Sets up what trains; returns the model to train.
        rates: Learning rates to try; none to take that of LoRA at r = 4.
    """

    title: str
    apply: Callable[[Any], Any]
    rates: tuple[float, ...]


def _full(model: Any) -> Any:
    return model


def _top_two(model: Any) -> Any:
    model.requires_grad_(False)
    for layer in model.model.layers[-2:]:
        layer.requires_grad_(True)
    return model


def _lora(rank: int) -> Callable[[Any], Any]:
    config = {"rank": rank, "alpha": 8, "targets": [r"self_attn\.[qv]_proj"]}
    return lambda model: lora_inject.inject(model, config)


def _prefix(model: Any) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    # PEFT hands over the prefix by a name that transformers is about to change
    warnings.filterwarnings("ignore", category=FutureWarning)
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))


TUNED = "lora-r4"
WAYS = {
    "lora-r4": Way("LoRA q, v, r = 4", _lora(4), (2e-3, 5e-3)),
    "full": Way("full fine-tuning", _full, (5e-5, 2e-4)),
    "lora-r1": Way("LoRA q, v, r = 1", _lora(1), ()),
    "lora-r16": Way("LoRA q, v, r = 16", _lora(16), ()),
    "top2": Way("top two layers", _top_two, (2e-4, 1e-3)),
    "prefix": Way("prefix tuning, 10 tokens (PEFT)", _prefix, (1e-2, 5e-2)),
}


def do(lab: Lab) -> None:
    """The base, then every way at every rate."""
    settings = lab.settings("pair_steps", "n_pairs")
    lab.run("pairs/base", lab.settings("n_pairs"), lambda: base(lab))
    for name, way in WAYS.items():
        for rate in rates_of(lab, name):
            lab.run(
                f"pairs/{name}/{rate:g}",
                {"rate": rate, **settings},
                lambda way=way, rate=rate: fine_tune(lab, way, rate),
            )


def rates_of(lab: Lab, name: str) -> tuple[float, ...]:
    """Learning rates to try for one way; LoRA at r = 4 comes before those that take its rate."""
    if WAYS[name].rates:
        return WAYS[name].rates[: lab.sizes.keep_rates]
    chosen = best(lab, TUNED)
    assert chosen is not None
    return (chosen[0],)


def base(lab: Lab) -> Result:
    """The untrained model."""
    model, tokenizer = lab.decoder()
    return measure(model, examples(lab, tokenizer)[1:])


def fine_tune(lab: Lab, way: Way, rate: float) -> Result:
    """Train, then measure on both held-out parts."""
    model, tokenizer = lab.decoder()
    parts = examples(lab, tokenizer)
    torch.manual_seed(SEED)
    model = way.apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    order = data.batches(parts[0], BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, len(order)))
    start, losses = time.process_time(), []
    for batch in order:
        loss = -log_probs(model, *data.collate(batch, 0)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 4))
    seconds = time.process_time() - start
    result = measure(model, parts[1:])
    return result | {
        "parameters": sum(p.numel() for p in trained),
        "cpu_seconds": seconds,
        "train_losses": losses,
    }


def log_probs(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each target token; through PEFT's forward where PEFT wraps the model."""
    if not hasattr(model, "peft_config"):
        return target_log_probs(model, tokens, labels)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    predicts = labels[:, 1:] != data.IGNORED
    wanted = labels[:, 1:][predicts]
    return logits[predicts].float().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)


def measure(model: Any, parts: Sequence[Sequence[Example]]) -> Result:
    """Nats for each target token, on the development and the test part; by pair on the latter."""
    found: list[list[float]] = []
    counts: list[list[int]] = []
    with torch.inference_mode():
        for part in parts:
            values, lengths = [], []
            for batch in data.batches(part, BATCH):
                flat = log_probs(model, *data.collate(batch, 0))
                sizes = [len(e.tokens) - e.n_prompt for e in batch]
                values += [-piece.sum().item() for piece in flat.split(sizes)]
                lengths += sizes
            found.append(values)
            counts.append(lengths)
    dev, test = (sum(v) / sum(n) for v, n in zip(found, counts, strict=True))
    return {"dev": dev, "test": test, "nats": found[1], "tokens": counts[1]}


def examples(lab: Lab, tokenizer: Any) -> tuple[list[Example], list[Example], list[Example]]:
    """Training pairs, further pairs of the same modules, and pairs of other modules, as tokens."""
    split = lab.pairs()
    n_train, n_test = lab.sizes.pair_steps * BATCH, lab.sizes.n_pairs
    n_dev = n_test // 2
    near = _short(tokenizer, split.train, n_train + n_dev)
    return near[:n_train], near[n_train:], _short(tokenizer, split.held_out, n_test)


def _short(tokenizer: Any, found: Sequence[data.Pair], n: int) -> list[Example]:
    """The first n that are short enough."""
    short: list[Example] = []
    for pair in found:
        example = data.encode(tokenizer, pair, ended=False)
        if len(example.tokens) <= MAX_TOKENS:
            short.append(example)
        if len(short) == n:
            break
    return short


def best(lab: Lab, name: str) -> tuple[float, Result] | None:
    """The rate that the development part chooses, and its result."""
    tried = {}
    for rate in WAYS[name].rates or WAYS[TUNED].rates:
        record = lab.record(f"pairs/{name}/{rate:g}")
        if record is not None:
            tried[rate] = record["result"]
    if not tried:
        return None
    rate = min(tried, key=lambda rate: tried[rate]["dev"])
    return rate, tried[rate]


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    start, found = lab.record("pairs/base"), {n: b for n in WAYS if (b := best(lab, n))}
    if start is None or not {"full", "lora-r4"} <= found.keys():
        return None
    rows = [("untrained", "0", "", f"{math.exp(start['result']['test']):.2f}", "", "")]
    full = found["full"][1]
    for name, (rate, result) in found.items():
        gap = "" if name == "full" else "{:+.3f} ± {:.3f}".format(*behind(result, full))
        rows.append(
            (
                WAYS[name].title,
                f"{result['parameters']:,}",
                f"{rate:g}",
                f"{math.exp(result['test']):.2f}",
                gap,
                f"{result['cpu_seconds']:.0f}",
            )
        )
    names = ("lora-r1", "lora-r4", "lora-r16")
    claims = [_claim(WAYS[n].title, found[n][1], full) for n in names if n in found]
    sizes = lab.sizes
    text = [
        (
            f"SmolLM2-135M (from 4 bits, computed in float32) on {sizes.pair_steps} batches of "
            f"{BATCH} "
            "pairs of a function's code and its one-line summary, with the loss on the summary "
            f"only. Perplexity is that of {sizes.n_pairs} pairs of modules that are not in the "
            f"training data. The rate is chosen on {sizes.n_pairs // 2} further pairs of the "
            "training "
            "modules. One seed."
        ),
        table(("method", "parameters", "rate", "perplexity", "nats behind full", "s"), rows),
        (
            "*Nats behind full* is the loss of a target token minus that of full fine-tuning, so "
            "below 0 is better, ± one standard error over pairs. "
            "LoRA at r = 1 and 16 uses the rate of r = 4."
        ),
    ]
    notes = [
        "There is no BitFit and no head alone: the model has no biases; its head is its embedding.",
        f"The run is short: {sizes.pair_steps * BATCH} pairs show only the start of training.",
    ]
    return Section("Quality at equal data: a decoder on pairs (sections 2, 5)", claims, text, notes)


def behind(one: Result, other: Result) -> tuple[float, float]:
    """Nats for each token that one is worse than the other, with its standard error over pairs."""
    tokens = sum(one["tokens"])
    mean = (sum(one["nats"]) - sum(other["nats"])) / tokens
    off = [
        a - b - mean * n for a, b, n in zip(one["nats"], other["nats"], one["tokens"], strict=True)
    ]
    return mean, math.sqrt(sum(x * x for x in off)) / tokens


def _claim(title: str, result: Result, full: Result) -> Claim:
    mean, error = behind(result, full)
    return Claim(
        f"{title}, is on par with full fine-tuning on a generation task",
        "GPT-2 medium E2E: BLEU 70.4 against 68.2",
        f"perplexity {math.exp(result['test']):.2f} against {math.exp(full['test']):.2f} "
        f"({mean:+.3f} ± {error:.3f} nats a token)",
        verdict_above(-mean, error, -MARGIN),
    )

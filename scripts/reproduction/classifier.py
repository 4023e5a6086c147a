"""One run: an encoder with a head of its own, fine-tuned on sentences in one of the ways.

All methods share everything but what trains: the same rows in the same order for the
same seed, the same head at the same start and rate, the same schedule (the paper's: AdamW, linear
up over the first 6 %, linear down), no dropout.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data.minilm import mean_of_tokens
from data.snippets import Snippet
from torch import Tensor, nn

import lora_inject

from .lab import Lab, Result
from .methods import Method

WEIGHT_DECAY = 0.01
WARM_UP = 0.06
POOLED_BATCHES = 8  # batches are cut from this many, sorted by length, so that few tokens are pads


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head with two outputs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, length) tokens and mask to (n, 2) logits."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(mean_of_tokens(states, mask))


Row = tuple[list[int], int]


def fine_tune(
    lab: Lab,
    method: Method,
    seed: int,
    rate: float,
    head_rate: float,
    part: str,
    keep: str = "",
    kind: str = "movies",
) -> Result:
    """Train on the training part, measure on another.

    Args:
        lab: Where.
        method: What trains.
        seed: Of the head, of A and of the order of the rows.
        rate: Peak learning rate of all but the head.
        head_rate: Peak learning rate of the head.
        part: "dev" or "test".
        keep: Name to keep the adapter under, if any.
        kind: Of the sentences.

    Returns:
        accuracy, loss (nats, on that part), right (one bit for each row, as text), parameters,
        head_parameters, seconds and cpu_seconds of training, peak_bytes beyond the model before
        it was set up (None where the system does not tell), train_losses.
    """
    sentences = lab.sentences(kind)
    encoder, tokenizer = lab.encoder()
    rows = encode(tokenizer, sentences.train, lab.sizes.max_tokens)
    measured = encode(tokenizer, getattr(sentences, part), lab.sizes.max_tokens)
    base = memory_now()
    torch.manual_seed(seed)
    model = Classifier(encoder).eval()  # no dropout in any method
    method.apply(model)
    if not lora_inject.adapters(model):
        model.head.requires_grad_(True)
    groups = groups_of(model, rate, head_rate)
    wall, cpu = time.perf_counter(), time.process_time()
    losses = train(model, groups, rows, lab.sizes.batch, seed)
    result: Result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_since() - base if base else None,
        "parameters": sum(p.numel() for p in groups[0]["params"]),
        "head_parameters": sum(p.numel() for p in groups[1]["params"]),
        "train_losses": losses,
    }
    if keep:
        save(model, lab.kept(keep))
    return result | evaluate(model, measured)


def groups_of(model: Classifier, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """What trains, as two groups: all but the head, and the head.

    A trained copy that an adapter keeps of the head sits on the head as well.
    """
    head = {id(p) for p in model.head.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in head], "lr": rate},
        {"params": [p for p in trainable if id(p) in head], "lr": head_rate},
    ]


def train(
    model: Classifier, groups: list[dict[str, Any]], rows: Sequence[Row], batch: int, seed: int
) -> list[float]:
    """One pass over the rows; returns the loss of every step."""
    order = batches(rows, batch, seed)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, len(order)))
    losses = []
    for chosen in order:
        ids, mask, labels = collate(chosen)
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 4))
    return losses


def factor(step: int, steps: int) -> float:
    """The schedule: linear up, then linear down to nothing."""
    up = max(1, round(steps * WARM_UP))
    return min((step + 1) / up, (steps - step) / (steps - up + 1))


def evaluate(model: Classifier, rows: Sequence[Row]) -> Result:
    """Accuracy, loss, and which rows were right, in the order of `rows`."""
    right = ["0"] * len(rows)
    total = 0.0
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            chosen = by_length[start : start + 64]
            ids, mask, labels = collate([rows[row] for row in chosen])
            logits = model(ids, mask)
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            for row, hit in zip(chosen, (logits.argmax(1) == labels).tolist(), strict=True):
                right[row] = str(int(hit))
    n_right = right.count("1")
    return {"accuracy": n_right / len(rows), "loss": total / len(rows), "right": "".join(right)}


# ---------------------------------------------------------------------------------------- rows


def encode(tokenizer: Any, snippets: Sequence[Snippet], max_tokens: int) -> list[Row]:
    """Tokens and label of each sentence."""
    texts = [snippet.text for snippet in snippets]
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return [(row, snippet.label) for row, snippet in zip(ids, snippets, strict=True)]


def batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """Cut rows into batches of like length, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    pool = size * POOLED_BATCHES
    cut: list[list[Row]] = []
    for start in range(0, len(order), pool):
        near = sorted((rows[row] for row in order[start : start + pool]), key=lambda r: len(r[0]))
        cut += [near[i : i + size] for i in range(0, len(near), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask (n, length) and labels (n,)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (tokens, _) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask, torch.tensor([label for _, label in rows])


def save(model: Classifier, path: Path) -> None:
    """Keep the adapter as one file."""
    lora_inject.save_adapter(model, path, format="native", overwrite=True)


# -------------------------------------------------------------------------------------- memory


def memory_now() -> int:
    """Resident bytes now, with what was freed given back; forgets the peak. 0 if unknown."""
    if not sys.platform.startswith("linux"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def peak_since() -> int:
    """The most resident bytes since `memory_now`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

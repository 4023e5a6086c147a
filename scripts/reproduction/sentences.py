"""Stages on sentences: quality, matrices, ranks (sections 5 and 7; Tables 2 to 6).

An encoder with a head of its own is fine-tuned in each of the ways. All share everything but what
trains: the same rows in the same order for the same seed, the same head at the same start and rate,
AdamW with the paper's schedule, no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data.models import mean_of_tokens
from data.snippets import Snippet
from torch import Tensor, nn

import lora_inject as li

from .lab import FAILS, HOLDS, OPEN, Answer, Lab, Result, table, verdict
from .methods import METHODS, RANKS, TITLES, train

TUNING_SEED = 100  # used for nothing else
KEPT = ("lora-qv-r8", "lora-qv-r64")  # adapters that other stages read
MARGIN = 0.01  # of accuracy: what counts as on par
Row = dict[str, Any]  # what the tokenizer makes of a sentence, and its label


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head: two outputs for each row's label."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        inputs = self.tokenizer.pad(rows, return_tensors="pt")
        labels = inputs.pop("labels")
        states = self.encoder(**inputs).last_hidden_state
        return self.head(mean_of_tokens(states, inputs["attention_mask"])), labels


def fine_tune(lab: Lab, name: str, seed: int, rate: float, part: str, kind: str) -> Result:
    """Train on the training part of one kind of sentences, measure on another part."""
    head_rate = rate if name == "head" else rate_of(lab, "head")
    sentences = lab.sentences(kind)
    encoder, tokenizer = lab.encoder()
    rows = encode(lab, tokenizer, sentences.train)
    measured = encode(lab, tokenizer, getattr(sentences, part))
    torch.manual_seed(seed)
    model = Classifier(encoder, tokenizer).eval()
    METHODS[name].apply(model)
    if not li.adapters(model):
        model.head.requires_grad_(True)
    head = [p for p in model.head.parameters() if p.requires_grad]  # or an adapter's copy of it
    others = [*{p for p in model.parameters() if p.requires_grad} - {*head}]
    groups = [{"params": head, "lr": head_rate}, {"params": others, "lr": rate}]
    cut = batches(rows, lab.sizes.batch, seed)
    train(groups, cut, lambda batch: nn.functional.cross_entropy(*model(batch)))
    if name in KEPT and part == "test":
        li.save_adapter(model, kept(lab, name, seed, kind), format="native", overwrite=True)
    return {"parameters": sum(p.numel() for p in others), "right": evaluate(model, measured)}


def kept(lab: Lab, name: str, seed: int, kind: str = "movies") -> Path:
    """The file of a run's adapter."""
    return lab.folder / f"{name}-seed{seed}-{kind}.safetensors"


def encode(lab: Lab, tokenizer: Any, snippets: Sequence[Snippet]) -> list[Row]:
    """Tokens, mask and label of each sentence."""
    cut = {"truncation": True, "max_length": lab.sizes.max_tokens, "return_token_type_ids": False}
    return [{**tokenizer(snippet.text, **cut), "labels": snippet.label} for snippet in snippets]


def evaluate(model: Classifier, rows: Sequence[Row]) -> list[int]:
    """For each row, the shortest first, whether the model is right: 1 or 0."""
    rows = sorted(rows, key=n_tokens)
    right: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            outputs, labels = model(rows[start : start + 64])
            right += (outputs.argmax(1) == labels).int().tolist()
    return right


def n_tokens(row: Row) -> int:
    return len(row["input_ids"])


def batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """Cut rows into batches of like length out of eight at a time, in an order by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    cut: list[list[Row]] = []
    for start in range(0, len(order), 8 * size):
        near = [rows[row] for row in order[start : start + 8 * size]]
        near.sort(key=n_tokens)
        cut += [near[i : i + size] for i in range(0, len(near), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def rate_of(lab: Lab, name: str) -> float:
    """The learning rate of a method, tuned now if it was not yet."""
    tuned = METHODS[name].like or name

    def accuracy(rate: float) -> float:
        return sum(lab.run(fine_tune, tuned, TUNING_SEED, rate, "dev", "movies")["right"])

    return max(METHODS[tuned].rates[: lab.sizes.keep_rates], key=accuracy)


def run(lab: Lab, name: str, seed: int, kind: str = "movies") -> Result:
    """One run that is measured on the test part."""
    return lab.run(fine_tune, name, seed, rate_of(lab, name), "test", kind)


class Scores(NamedTuple):
    """The results of a method: `right` is 1 or 0, (seeds, rows)."""

    title: str
    parameters: int
    right: Tensor

    @property
    def cells(self) -> tuple[str, ...]:
        """Title, parameters, mean test accuracy in percent, and its deviation over seeds."""
        accuracy = 100 * self.right.mean(1)
        found = (f"{accuracy.mean():.1f}", f"{accuracy.std():.1f}")
        return (self.title, f"{self.parameters:,}", *found)


def scores(lab: Lab, names: Sequence[str]) -> list[Scores]:
    """Run methods with every seed; all methods of a seed first."""
    by_seed = [[run(lab, name, seed) for name in names] for seed in lab.sizes.seeds]
    found = []
    for name, results in zip(names, zip(*by_seed, strict=True), strict=True):
        right = torch.tensor([result["right"] for result in results], dtype=torch.float64)
        found.append(Scores(METHODS[name].title, results[0]["parameters"], right))
    return found


class Gap(NamedTuple):
    """How much one method is ahead of another, and the standard error of that."""

    difference: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.error:.1f}"


def gap(one: Scores, other: Scores) -> Gap:
    """Compare on the same rows and seeds; the error is of the rows, paired, and of the seeds."""
    ahead = one.right - other.right
    errors = (by.std().item() / sqrt(len(by)) for by in (ahead.mean(0), ahead.mean(1)))
    return Gap(ahead.mean().item(), hypot(*errors))


def compared(one: Scores, other: Scores, bound: float = 0.0) -> Answer:
    """Whether one method is ahead of another, or behind by less than a bound below zero."""
    ahead = gap(one, other)
    said = f"{one.cells[2]} against {other.cells[2]} ({ahead} points)"
    return said, verdict(*ahead, bound)


def quality(lab: Lab) -> tuple[str, list[Answer]]:
    """All ways to fine-tune on the same sentences, each tuned by a grid of its own (section 5)."""
    names = ["full", "top2", "head", "bitfit", "prefix", "adapter-h", "adapter-l"]
    names += ["lora-qv-r8", "lora-all-r8"]  # others: the stages `matrices` and `ranks`
    full, *others = scores(lab, names)
    *rivals, qv, every = others
    rows = [(*full.cells, ""), *((*s.cells, gap(s, full)) for s in others)]
    head = ("method", "parameters beside the head", "accuracy, %", "deviation", "against full")
    answers = [compared(s, full, -MARGIN) for s in (qv, every)]
    ahead = sorted((gap(qv, s), s.title) for s in rivals)
    verdicts = [verdict(*points) for points, _ in ahead]
    worst = next((v for v in (FAILS, OPEN) if v in verdicts), HOLDS)
    least, most = (f"{points} ({title})" for points, title in (ahead[0], ahead[-1]))
    return table(head, rows), [
        *((f"r = 8: {said}", holds) for said, holds in answers),
        (f"q, v at r = 8 is ahead by {least} to {most} points", worst),
    ]


MATRICES = {  # WikiSQL and MNLI in the paper's Table 5
    "q-r8": (70.4, 91.0), "k-r8": (70.0, 90.8), "v-r8": (73.0, 91.0), "o-r8": (73.2, 91.3),
    "qk-r4": (71.4, 91.3), "qv-r4": (73.7, 91.3), "qkvo-r2": (73.7, 91.7),
}  # fmt: skip


def matrices(lab: Lab) -> tuple[str, list[Answer]]:
    """Which matrices to adapt under one budget (section 7.1, Table 5)."""
    q, _, v, _, qk, qv, qkvo = found = scores(lab, [f"lora-{name}" for name in MATRICES])
    papers = zip((s.cells for s in found), MATRICES.values(), strict=True)
    rows = [(*cells[:2], *paper, *cells[2:]) for cells, paper in papers]
    head = ("matrices", "parameters", "WikiSQL (paper)", "MNLI (paper)", "accuracy here, %")
    answers = [compared(qv, q), compared(qv, qk), compared(v, q), compared(qkvo, qv, -MARGIN)]
    return table((*head, "deviation"), rows), answers


WIKISQL = {  # by rank, in the paper's Table 6
    "q": "68.8 69.6 70.5 70.4 70.0",
    "qv": "73.4 73.3 73.7 73.8 73.5",
    "qkvo": "74.1 73.7 74.0 74.0 73.9",
    "all": "not in the paper",
}


def ranks(lab: Lab) -> tuple[str, list[Answer]]:
    """How large a rank must be (section 7.2, Table 6); the best is the luckiest of five."""
    rows, answers = [], []
    for sites, paper in WIKISQL.items():
        low, *more = scores(lab, [f"lora-{sites}-r{rank}" for rank in RANKS])
        rows.append((TITLES[sites], *(s.cells[2] for s in (low, *more)), paper))
        best = max(more, key=lambda s: s.right.mean())
        answers.append(compared(low, best, -MARGIN))
    head = ("matrices", *(f"r = {rank}" for rank in RANKS), "WikiSQL (paper)")
    return table(head, rows), answers

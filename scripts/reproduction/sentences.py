"""Stages on sentences: quality, rivals, matrices, ranks (sections 5 and 7; Tables 2 to 6).

An encoder with a head of its own is fine-tuned in each of the ways. All share everything but what
trains: the same rows in the same order for the same seed, the same head at the same start and rate,
AdamW with the paper's schedule, no dropout. A method is tuned by its own grid and one seed that is
used for nothing else; one that is near to a tuned one takes its rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import hypot, sqrt
from typing import Any, NamedTuple

import torch
from data.models import mean_of_tokens
from data.snippets import Snippet
from torch import Tensor, nn

import lora_inject as li

from .lab import FAILS, HOLDS, OPEN, Claim, Lab, Result, table, verdict
from .methods import METHODS, RANKS, TITLES, Method, train

TUNING_SEED = 100
KEPT = ("lora-qv-r8", "lora-qv-r64")  # adapters that the stage `directions` reads
SHARED = ("n_train", "batch", "max_tokens")
MARGIN = 0.01  # of accuracy: what counts as on par
Row = tuple[list[int], int]


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head with two outputs."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(mean_of_tokens(states, mask))


# ------------------------------------------------------------------------------------- one run


def fine_tune(
    lab: Lab, name: str, seed: int, rate: float, head_rate: float, part: str,
    keep: str = "", kind: str = "movies",
) -> Result:  # fmt: skip
    """Train on the training part, measure on another."""
    sentences = lab.sentences(kind)
    encoder, tokenizer = lab.encoder()
    rows = encode(tokenizer, sentences.train, lab.sizes.max_tokens)
    measured = encode(tokenizer, getattr(sentences, part), lab.sizes.max_tokens)
    torch.manual_seed(seed)
    model = Classifier(encoder).eval()
    METHODS[name].apply(model)
    if not li.adapters(model):
        model.head.requires_grad_(True)
    head = {id(p) for p in model.head.parameters()}  # an adapter's copy of it sits there as well
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in head]
    groups = [{"params": [p for p in trained if id(p) in head], "lr": head_rate}]
    groups += [{"params": others, "lr": rate}] if others else []

    def loss(batch: Sequence[Row]) -> Tensor:
        ids, mask, labels = collate(batch)
        return nn.functional.cross_entropy(model(ids, mask), labels)

    train(groups, batches(rows, lab.sizes.batch, seed), loss)
    if keep:
        li.save_adapter(model, lab.kept(keep), format="native", overwrite=True)
    return {"parameters": sum(p.numel() for p in others), **evaluate(model, measured)}


def evaluate(model: nn.Module, rows: Sequence[Row]) -> Result:
    """Accuracy, and which rows were right, in the order of `rows`."""
    right = ["0"] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            chosen = by_length[start : start + 64]
            ids, mask, labels = collate([rows[row] for row in chosen])
            hits = (model(ids, mask).argmax(1) == labels).tolist()
            for row, hit in zip(chosen, hits, strict=True):
                right[row] = str(int(hit))
    return {"accuracy": right.count("1") / len(rows), "right": "".join(right)}


def encode(tokenizer: Any, snippets: Sequence[Snippet], max_tokens: int) -> list[Row]:
    """Tokens and label of each sentence."""
    texts = [snippet.text for snippet in snippets]
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return [(row, snippet.label) for row, snippet in zip(ids, snippets, strict=True)]


def batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """Cut rows into batches of like length out of eight at a time, in an order by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    cut: list[list[Row]] = []
    for start in range(0, len(order), 8 * size):
        near = [rows[row] for row in order[start : start + 8 * size]]
        near.sort(key=lambda row: len(row[0]))
        cut += [near[i : i + size] for i in range(0, len(near), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask (n, length) and labels (n,)."""
    tokens = [torch.tensor(ids) for ids, _ in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return ids, mask, torch.tensor([label for _, label in rows])


# ----------------------------------------------------------------------------- rates and scores


def rate_of(lab: Lab, name: str) -> float:
    """The learning rate of a method, tuned now if it was not yet."""
    tuned = name if METHODS[name].rates else METHODS[name].like
    found = {}
    for rate in METHODS[tuned].rates[: lab.sizes.keep_rates]:
        head_rate = rate if tuned == "head" else rate_of(lab, "head")
        settings = {"rate": rate, "head_rate": head_rate, **lab.settings(*SHARED, "n_dev")}
        args = (tuned, TUNING_SEED, rate, head_rate, "dev")
        work = lambda args=args: fine_tune(lab, *args)  # noqa: E731
        found[rate] = lab.run(f"sentences/tuning/{tuned}/{rate:g}", settings, work)["accuracy"]
    return max(found, key=lambda rate: found[rate])


def kept_name(name: str, seed: int) -> str:
    """The file of a run's adapter, among what is kept."""
    return f"sentences/{name}/seed{seed}.safetensors"


def run(lab: Lab, name: str, seed: int) -> Result:
    """One run that is measured on the test part."""
    rate, head_rate = rate_of(lab, name), rate_of(lab, "head")
    keep = kept_name(name, seed) if name in KEPT else ""
    settings = {"rate": rate, "head_rate": head_rate, "seed": seed}
    work = lambda: fine_tune(lab, name, seed, rate, head_rate, "test", keep)  # noqa: E731
    return lab.run(
        f"sentences/{name}/seed{seed}", {**settings, **lab.settings(*SHARED, "n_test")}, work
    )


class Scores(NamedTuple):
    """The results of a method, one for each seed."""

    method: Method
    results: Sequence[Result]

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.mean(result["accuracy"] for result in self.results)

    @property
    def deviation(self) -> float:
        """Its standard deviation over seeds."""
        return statistics.stdev(result["accuracy"] for result in self.results)


def scores(lab: Lab, names: Sequence[str]) -> dict[str, Scores]:
    """Run methods with every seed; all methods of a seed first."""
    by_seed = [{name: run(lab, name, seed) for name in names} for seed in lab.sizes.seeds]
    return {name: Scores(METHODS[name], [row[name] for row in by_seed]) for name in names}


class Gap(NamedTuple):
    """How much one method is ahead of another, and the standard error of that."""

    difference: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.error:.1f}"


def gap(one: Scores, other: Scores) -> Gap:
    """Compare on the same rows and seeds; the error is of the rows, paired, and of the seeds."""
    pairs = [(a["right"], b["right"]) for a, b in zip(one.results, other.results, strict=True)]
    by_seed = [(a.count("1") - b.count("1")) / len(a) for a, b in pairs]
    rows = range(len(pairs[0][0]))
    by_row = [statistics.mean(int(a[row]) - int(b[row]) for a, b in pairs) for row in rows]
    of_rows = statistics.stdev(by_row) / sqrt(len(by_row))
    of_seeds = statistics.stdev(by_seed) / sqrt(len(by_seed))
    return Gap(statistics.mean(by_seed), hypot(of_rows, of_seeds))


# -------------------------------------------------------------------------------------- stages


def against(one: Scores, other: Scores, gap: Gap) -> str:
    return f"{100 * one.mean:.1f} against {100 * other.mean:.1f} ({gap} points)"


def cells(scores: Scores) -> tuple[str, ...]:
    n_parameters = scores.results[0]["parameters"]
    return (scores.method.title, f"{n_parameters:,}", f"{100 * scores.mean:.1f}")


def quality(lab: Lab) -> tuple[list[str], list[Claim]]:
    """All ways to fine-tune on the same sentences (section 5)."""
    names = ["full", "top2", "head", "bitfit", "prefix", "adapter-h", "adapter-l"]
    names += ["lora-qv-r8", "lora-all-r8"]  # others: the stages `matrices` and `ranks`
    found = scores(lab, names)
    full = found["full"]
    rows = [
        (*cells(s), f"{100 * s.deviation:.1f}", "" if s is full else gap(s, full))
        for s in found.values()
    ]
    head = ("method", "parameters beside the head", "accuracy, %", "deviation", "against full")
    claims = []
    for name, title in (("lora-qv-r8", "q, v"), ("lora-all-r8", "all linears")):
        ahead = gap(found[name], full)
        claims.append((
            f"LoRA on {title} is on par with full fine-tuning, or better",
            "RoBERTa-base GLUE mean 87.2 against 86.4 (q, v)",
            f"r = 8: {against(found[name], full, ahead)}", verdict(*ahead, -MARGIN),
        ))  # fmt: skip
    return [table(head, rows)], claims


def rivals(lab: Lab) -> tuple[list[str], list[Claim]]:
    """The other ways to train little, each tuned by a grid of its own (section 5)."""
    others = ("adapter-h", "adapter-l", "prefix", "bitfit", "top2", "head")
    ours, *theirs = scores(lab, ("lora-qv-r8", *others)).values()
    gaps = [gap(ours, s) for s in theirs]
    verdicts = [verdict(*g) for g in gaps]
    listed = list(zip(theirs, gaps, strict=True))
    least, most = (choose(listed, key=lambda row: row[1]) for choose in (min, max))
    worst = next((v for v in (FAILS, OPEN) if v in verdicts), HOLDS)
    claim = ("LoRA is ahead of the other ways to train less than everything",
             "in most columns of Tables 2 to 4",
             (f"q, v at r = 8 is ahead by {least[1]} ({least[0].method.title}) to {most[1]} "
             f"({most[0].method.title}) points"), worst)  # fmt: skip
    return [], [claim]


MATRICES = {  # WikiSQL and MNLI in the paper's Table 5
    "lora-q-r8": (70.4, 91.0), "lora-k-r8": (70.0, 90.8), "lora-v-r8": (73.0, 91.0),
    "lora-o-r8": (73.2, 91.3), "lora-qk-r4": (71.4, 91.3), "lora-qv-r4": (73.7, 91.3),
    "lora-qkvo-r2": (73.7, 91.7),
}  # fmt: skip


def matrices(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Which matrices to adapt under one budget (section 7.1, Table 5)."""
    found = scores(lab, tuple(MATRICES))
    rows = [
        (*cells(s)[:2], *MATRICES[n], cells(s)[2], f"{100 * s.deviation:.1f}")
        for n, s in found.items()
    ]
    head = ("matrices", "parameters", "WikiSQL (paper)", "MNLI (paper)", "accuracy here, %")
    claims = []
    for one, other, what, bound in (
        ("qv-r4", "q-r8", "q and v together beat q alone", 0.0),
        ("qv-r4", "qk-r4", "q and v beat q and k", 0.0),
        ("v-r8", "q-r8", "v alone beats q alone", 0.0),
        ("qkvo-r2", "qv-r4", "all four at r = 2 are at least as good as q, v", -MARGIN),
    ):
        a, b = f"lora-{one}", f"lora-{other}"
        (wiki, mnli), (wiki2, mnli2) = MATRICES[a], MATRICES[b]
        ahead = gap(found[a], found[b])
        claims.append((
            f"{what} (Table 5)", f"WikiSQL {wiki} against {wiki2}, MNLI {mnli} against {mnli2}",
            against(found[a], found[b], ahead), verdict(*ahead, bound),
        ))  # fmt: skip
    return [table((*head, "deviation"), rows)], claims


WIKISQL = {  # by rank, in the paper's Table 6
    "q": (68.8, 69.6, 70.5, 70.4, 70.0),
    "qv": (73.4, 73.3, 73.7, 73.8, 73.5),
    "qkvo": (74.1, 73.7, 74.0, 74.0, 73.9),
    "all": (),
}


def ranks(lab: Lab) -> tuple[list[str], list[Claim]]:
    """How large a rank must be (section 7.2, Table 6); the best is the luckiest of five."""
    rows, claims = [], []
    for sites, paper in WIKISQL.items():
        low, *more = scores(lab, [f"lora-{sites}-r{rank}" for rank in RANKS]).values()
        title = TITLES.get(sites, sites)
        theirs = " ".join(map(str, paper)) or "not in the paper"
        rows.append((title, *(f"{100 * s.mean:.1f}" for s in (low, *more)), theirs))
        best = max(more, key=lambda s: s.mean)
        ahead = gap(low, best)
        claims.append((
            f"r = 1 on {title} is within a point of the best rank (Table 6)",
            f"WikiSQL {paper[0]} against {max(paper)}" if paper else theirs,
            against(low, best, ahead), verdict(*ahead, -MARGIN),
        ))  # fmt: skip
    head = ("matrices", *(f"r = {rank}" for rank in RANKS), "WikiSQL (paper)")
    return [table(head, rows)], claims

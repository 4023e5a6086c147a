"""What `lora_inject.search` finds, compared with every one of its trials run in full, alone.

    export PYTHONPATH=scripts MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
    python -m reproduction.searching             writes docs/search.md
    python -m reproduction.searching --quick     tiny random models

Two tasks: sentences of movie reviews on an encoder, and pairs of code and summary on a decoder. The
weights are those of scripts/reproduce.sh. Each finished run is kept as there.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import report
from data import pairs as data
from data.minilm import mean_of_tokens
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey

from . import classifier, document
from .lab import FULL, QUICK, Lab, Result

SEEDS = (0, 1, 2)
SHARPNESS = 20.0  # what a cosine is multiplied by
PAIR_TOKENS = 56


@dataclass(frozen=True)
class Task:
    """A model with data, and how to run it.

    Attributes:
        title: As in the page.
        load: From a lab and a seed: model, batches, held-out batches, forward, loss.
        rules: The names of q and v.
        steps: Of a whole run.
        batch: Rows of a step.
        n_held_out: Held-out rows.
    """

    title: str
    load: Callable[[Lab, Task, int], tuple[Any, ...]]
    rules: str
    steps: int
    batch: int
    n_held_out: int

    def space(self, seed: int, quick: bool) -> dict[str, Any]:
        """Return sixteen trials."""
        return {
            "targets": {"all": ["all-linear"], "qv": [self.rules]},
            "rank": [1, 4],
            "scale": 2,
            "lr": [5e-4, 2e-3, 8e-3, 3.2e-2],
            "seed": seed,
            "training": {"schedule": "linear"},
            "budget": {"steps": 20 if quick else self.steps},
        }


class ByLabelTexts(nn.Module):
    """An encoder that classifies by the nearer of two texts, whose places are the base's own."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder = encoder
        ids = [tokenizer.encode(text) for text in ("a bad movie", "a good movie")]
        rows = [self.place(torch.tensor([row]), torch.ones(1, len(row))) for row in ids]
        self.register_buffer("labels", torch.cat(rows).detach())

    def place(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return `(n, dim)`, of length 1."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(mean_of_tokens(states, mask))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return `(n, 2)` logits."""
        return SHARPNESS * self.place(ids, mask) @ self.labels.T


def _movies(lab: Lab, task: Task, seed: int) -> tuple[Any, ...]:
    encoder, tokenizer = lab.encoder()
    model = ByLabelTexts(encoder.eval(), tokenizer)
    split = lab.sentences()
    train = classifier.encode(tokenizer, split.train, lab.sizes.max_tokens)
    judged = classifier.encode(tokenizer, split.dev, lab.sizes.max_tokens)[: task.n_held_out]
    batches = classifier.batches(train, task.batch, seed)[: task.steps]
    held_out = [judged[i : i + 8] for i in range(0, len(judged), 8)]
    return (
        model,
        [classifier.collate(rows) for rows in batches],
        [classifier.collate(rows) for rows in held_out],
        lambda batch: model(*batch[:2]),
        lambda logits, batch: F.cross_entropy(logits, batch[2]),
    )


def _pairs(lab: Lab, task: Task, seed: int) -> tuple[Any, ...]:
    model, tokenizer = lab.decoder()
    split = lab.pairs()

    def some(found: Sequence[data.Pair], n: int) -> list[data.Example]:
        encoded = (data.encode(tokenizer, pair, ended=False) for pair in found)
        short = (example for example in encoded if len(example.tokens) <= PAIR_TOKENS)
        return [example for example, _ in zip(short, range(n), strict=False)]

    n = task.steps * task.batch
    train, judged = some(split.train, n), some(split.held_out, task.n_held_out)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = [order[i : i + task.batch] for i in range(0, len(order), task.batch)]
    batches = [data.collate([train[i] for i in rows], 0) for rows in cut]
    held_out = [data.collate(judged[i : i + 4], 0) for i in range(0, len(judged), 4)]

    def loss(outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return li.causal_loss(outputs, {"labels": batch[1]})

    return model, batches, held_out, lambda batch: model(batch[0], use_cache=False), loss


TASKS = {
    "movies": Task(
        "Movie snippets, MiniLM", _movies, r"self\.(query|value)", steps=96, batch=4, n_held_out=96
    ),
    "pairs": Task(
        "Code and summary, SmolLM2-135M", _pairs, "[qv]_proj", steps=48, batch=1, n_held_out=32
    ),
}


def do(lab: Lab, name: str, seed: int, quick: bool) -> None:
    """Run half of the trials alone, then search, then run the other half alone.

    So the times of both are taken under the same conditions.
    """
    task = TASKS[name]
    settings = {**task.space(seed, quick), "batch": task.batch, "held_out": task.n_held_out}
    place = f"search/{name}/seed{seed}"
    parts = functools.cache(lambda: task.load(lab, task, seed))
    names = list(candidates(task, parts()[0], seed, quick)[1])
    for i, trial in enumerate(names):
        if i == len(names) // 2:
            lab.run(f"{place}/found", settings, lambda: search(task, parts(), seed, quick))
        lab.run(f"{place}/alone/{trial.replace(' ', '-')}", {**settings, "trial": trial},
                lambda trial=trial: alone(task, parts(), seed, quick, trial))  # fmt: skip


def candidates(task: Task, model: nn.Module, seed: int, quick: bool) -> tuple[li.Space, Any]:
    """Return a task's space and its trials."""
    space = li.Space.coerce(task.space(seed, quick))
    return space, space.candidates(inventory(Survey(model)))[0]


def search(task: Task, parts: tuple[Any, ...], seed: int, quick: bool) -> Result:
    """Run the search; time is the processor's, which leaves out waiting for a core."""
    model, batches, held_out, forward, loss = parts
    began = time.process_time()
    found = li.search(model, task.space(seed, quick), batches, held_out, forward=forward, loss=loss)
    return {
        "seconds": time.process_time() - began,
        "best": found.best,
        "base": fmean(found.base),
        "plan": found.plan,
        "trials": {name: candidate.parameters for name, candidate in found.candidates.items()},
        "losses": [{n: fmean(v) for n, v in rung.held_out.items()} for rung in found.rungs],
    }


def alone(task: Task, parts: tuple[Any, ...], seed: int, quick: bool, name: str) -> Result:
    """Train one trial in full by a plain loop."""
    model, batches, held_out, forward, loss = parts
    space, trials = candidates(task, model, seed, quick)
    trial = li.Search(space, trials).trial(name, space.budget.steps or 0)
    began = time.process_time()
    torch.manual_seed(trial.seed)
    li.inject(model, trial.config)
    groups = li.parameter_groups(model, trial.lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=trial.weight_decay, fused=True)
    for step in range(trial.steps or 0):
        for group in optimizer.param_groups:
            group["lr"] = trial.lr * trial.factor(step)
        batch = batches[step % len(batches)]
        loss(forward(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held = fmean(loss(forward(batch), batch).item() for batch in held_out)
    li.eject(model)
    return {"loss": held, "seconds": time.process_time() - began}


# ------------------------------------------------------------------------------------ the page


def rows_of(lab: Lab, name: str) -> list[tuple[Any, ...]]:
    """Return a row for each seed of which all is done."""
    found = []
    for seed in SEEDS:
        record = lab.record(f"search/{name}/seed{seed}/found")
        if record is None:
            continue
        trials = record["result"]["trials"]
        files = [f"search/{name}/seed{seed}/alone/{t.replace(' ', '-')}" for t in trials]
        records = [lab.record(file) for file in files]
        if None in records:
            continue
        full = {t: r["result"] for t, r in zip(trials, records, strict=True) if r is not None}
        found.append(row_of(seed, record["result"], full))
    return found


def row_of(seed: int, searched: Result, full: dict[str, Result]) -> tuple[Any, ...]:
    """Say what a search found, and what the trials alone say of it."""
    losses = {name: result["loss"] for name, result in full.items()}
    order = sorted(losses, key=losses.__getitem__)
    best = searched["best"]
    times = sum(result["seconds"] for result in full.values())
    first = sorted(searched["losses"][0], key=searched["losses"][0].__getitem__)
    uniform, qv = (min(v for n, v in losses.items() if n.startswith(m)) for m in MATCHED)
    return (
        seed,
        best,
        order.index(best) + 1,
        first.index(order[0]) + 1 if order[0] in first else "diverged",
        f"{losses[best]:.4f}",
        f"{losses[order[0]]:.4f}",
        f"{losses[order[len(order) // 2]]:.4f}",
        f"{searched['base']:.4f}",
        f"{uniform:.4f}",
        f"{qv:.4f}",
        f"{searched['seconds'] / times:.2f}",
        f"{times:.0f}",
    )


HEADS = (
    *("seed", "found", "rank of 16", "the best, after rung 1", "its loss", "best", "median"),
    *("base", "all-linear, r = 1", "q, v, r = 4", "time / in turn", "in turn, s"),
)
MATCHED = ("all r1", "qv r4")  # of about as many parameters


def write(lab: Lab, path: Path) -> None:
    """Write the page from what is done."""
    parts = [(Path(__file__).parent / "searching.md").read_text(encoding="utf-8").strip()]
    for name, task in TASKS.items():
        if rows := rows_of(lab, name):
            counts = lab.record(f"search/{name}/seed{rows[0][0]}/found")["result"]["trials"]
            uniform, qv = (next(n for t, n in counts.items() if t.startswith(m)) for m in MATCHED)
            what = (
                f"{task.steps} steps of {task.batch} row{'s' * (task.batch > 1)}, "
                f"{task.n_held_out} held-out rows. All linear layers at r = 1 have {uniform:,} "
                f"parameters, q and v at r = 4 {qv:,}; of each the best learning rate is shown."
            )
            hits = sum(row[2] <= 2 for row in rows)
            said = f"Best or second best of 16: {hits} of {len(rows)} searches."
            parts += [f"## {task.title}", what, document.table(HEADS, rows, words=2), said]
    records = [r for r in lab.records() if "trial" in r["settings"] or "targets" in r["settings"]]
    if records:
        where = document.where(report.machine("cpu"), records)
        parts += ["## Machine, versions, times", where]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, seed by seed, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    repo = Path(__file__).resolve().parents[2]
    parser.add_argument("--quick", action="store_true", help="tiny random models, one seed")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="default: all")
    parser.add_argument("--folder", type=Path, default=repo / ".reproduction", help="records")
    parser.add_argument("--output", type=Path, default=repo / "docs" / "search.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lab = Lab(args.folder, QUICK if args.quick else FULL, args.quick)
    for seed in SEEDS[: 1 if args.quick else None]:
        for name in args.tasks:
            do(lab, name, seed, args.quick)
            write(lab, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where runs happen and what is kept of them: one JSON file for each finished run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data import models, pairs, snippets
from data.packaged import write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import toy

Result = dict[str, Any]
Answer = tuple[str, str]  # what was found, and whether the claim holds
HOLDS, FAILS, OPEN, PARTLY = "holds", "**does not hold**", "undecided", "holds in part"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: rows of sentences, steps of 8 pairs, shapes of what is timed."""

    n_sentences: tuple[int, int, int] = (3200, 1000, 2400)
    batch: int = 32
    max_tokens: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    keep_rates: int = 4  # learning rates tried of each grid, from its start
    pair_steps: int = 40
    n_pairs: int = 120
    memory_tokens: tuple[int, int] = (8, 64)
    latency_model: tuple[int, int] = (12, 768)
    latency: tuple[tuple[int, int], ...] = ((8, 256), (4, 128), (1, 16))
    rounds: int = 9


QUICK = Sizes(
    *((48, 16, 32), 16, 12, (0, 1), 1, 2, 4, (2, 16), (2, 32), ((2, 16), (2, 8), (1, 4)), 2)
)


@dataclass(frozen=True)
class Lab:
    """Everything a stage may use: a folder for records, sizes, and models that may be toys."""

    folder: Path
    sizes: Sizes
    toys: bool

    def run(self, work: Callable[..., Result], *args: object) -> Result:
        """The result of `work(lab, *args)`, from its record with these sizes or by doing it now."""
        name = "/".join([work.__module__.rpartition(".")[2], work.__name__, *map(str, args)])
        path = self.folder / "records" / f"{name}.json"
        sizes = json.loads(json.dumps(asdict(self.sizes)))
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("sizes") != sizes:
            began = time.perf_counter()
            kept = {"sizes": sizes, "result": json.loads(json.dumps(work(self, *args)))}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return kept["result"]

    def encoder(self) -> tuple[Any, Any]:
        """A fresh encoder and its tokenizer."""
        return toy.encoder() if self.toys else models.encoder()

    def sentences(self, kind: str) -> snippets.Split:
        """The sentences of one kind, cut to size."""
        read = toy.sentences(kind) if self.toys else snippets.read(self.folder, kind)
        parts = zip(snippets.split(read), self.sizes.n_sentences, strict=True)
        return snippets.Split(*(part[:n] for part, n in parts))

    def pairs(self) -> pairs.Split:
        """Pairs of a function and its summary, of this Python or made up."""
        return toy.pairs() if self.toys else pairs.collect()

    def decoder(self) -> tuple[Any, Any]:
        """A fresh decoder and its tokenizer."""
        if self.toys:
            return toy.decoder()
        folder = self.folder / "smollm2"
        if not folder.is_dir():
            models.save_decoder(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A table of Markdown; all columns but the first `words` are flush right."""
    rule = [":--" if i < words else "--:" for i in range(len(head))]
    lines = [head, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def holds(condition: bool) -> str:
    return HOLDS if condition else FAILS


def verdict(difference: float, error: float, bound: float = 0.0) -> str:
    """Whether a difference is above a bound, two standard errors being the noise."""
    if difference - 2 * error > bound:
        return HOLDS
    return FAILS if difference + 2 * error < bound else OPEN


def n_bytes(number: float) -> str:
    """Bytes with a unit, to three figures or so."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number:.0f} bytes"

"""Where runs happen and what is kept of them: one JSON file for each finished run.

`Lab.run` looks for a record of that name with those settings and returns its result. Else it calls
the function and writes the record in one rename. So everything may be stopped at any moment and
started again; a changed setting makes exactly the runs that depend on it new.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data import models, pairs, snippets
from data.packaged import write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import toy

Result = dict[str, Any]
Claim = tuple[str, str, str, str]
HOLDS, FAILS, OPEN, PARTLY = "holds", "**does not hold**", "undecided", "holds in part"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: rows of sentences, steps of 8 pairs, shapes of what is timed."""

    n_train: int = 3200
    n_dev: int = 1000
    n_test: int = 2400
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
    *(48, 16, 32, 16, 12, (0, 1), 1, 2, 4, (2, 16), (2, 32), ((2, 16), (2, 8), (1, 4)), 2)
)


@dataclass(frozen=True)
class Lab:
    """Everything a stage may use: a folder for records, sizes, and models that may be toys."""

    folder: Path
    sizes: Sizes
    toys: bool

    def run(self, name: str, settings: Mapping[str, Any], work: Callable[[], Result]) -> Result:
        """The result of a run, from its record or by doing it now, as JSON gives it back."""
        path = self.folder / "records" / f"{name}.json"
        wanted = json.loads(json.dumps({**settings, "toys": self.toys}))
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] == wanted:
                return kept["result"]
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n", encoding="utf-8")
        date = {"date": time.strftime("%Y-%m-%d %H:%M"), "load": os.getloadavg()[0]}
        write_json(path, {"settings": wanted, "result": result, **date, **seconds})
        print(f"{date['date']} {name}: {seconds['seconds']:.0f} s", flush=True)
        return json.loads(json.dumps(result))

    def kept(self, name: str) -> Path:
        """Where a run keeps what is too large for its record, such as an adapter."""
        path = self.folder / "kept" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def settings(self, *names: str) -> dict[str, Any]:
        """Some of the sizes, for the settings of a run."""
        return {name: asdict(self.sizes)[name] for name in names}

    def encoder(self) -> tuple[Any, Any]:
        """A fresh encoder and its tokenizer."""
        return toy.encoder() if self.toys else models.encoder()

    def sentences(self, kind: str = "movies") -> snippets.Split:
        """The sentences of one kind, cut to size."""
        sizes = self.sizes
        whole = _sentences(None if self.toys else self.folder, kind)
        counts = (sizes.n_train, sizes.n_dev, sizes.n_test)
        return snippets.Split(*(part[:n] for part, n in zip(whole, counts, strict=True)))

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


@functools.cache
def _sentences(folder: Path | None, kind: str) -> snippets.Split:
    return snippets.split(toy.sentences(kind) if folder is None else snippets.read(folder, kind))


# ------------------------------------------------------------------------------------- telling


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A table of Markdown; all columns but the first `words` are flush right."""
    rule = [":--" if i < words else "--:" for i in range(len(head))]
    lines = [head, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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

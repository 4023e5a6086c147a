"""Where runs happen and what is kept of them: one JSON file for each finished run.

A run is a name, its settings and a function. `Lab.run` looks for a record of that name
with those settings and returns it; else it calls the function and writes the record in one rename.
So the whole of it may be stopped at any moment and started again: what is finished is kept, what
was interrupted starts over, and a changed setting makes exactly the runs that depend on it new.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data import minilm, smollm2, snippets
from data import pairs as data
from data.packaged import write_json
from data.snippets import Split

from . import toy

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        n_train: Sentences to train on, each seen once.
        n_dev: Sentences to choose the learning rate by.
        n_test: Sentences to report on.
        batch: Sentences in a step.
        max_tokens: Longer sentences are cut.
        seeds: One run of each method for each.
        keep_rates: Learning rates tried of each grid, from its start.
        pair_steps: Steps of 8 pairs on the decoder.
        n_pairs: Held-out pairs.
        memory_tokens: Shape of the batches of the memory stage, (rows, tokens).
        latency: Shape of the model, (layers, dim), and of the batches, (rows, tokens).
        rounds: Repetitions of everything that is timed.
    """

    n_train: int
    n_dev: int
    n_test: int
    batch: int
    max_tokens: int
    seeds: tuple[int, ...]
    keep_rates: int
    pair_steps: int
    n_pairs: int
    memory_tokens: tuple[int, int]
    latency: tuple[tuple[int, int], tuple[tuple[int, int], ...]]
    rounds: int


FULL = Sizes(
    n_train=3200,
    n_dev=1000,
    n_test=2400,
    batch=32,
    max_tokens=32,
    seeds=(0, 1, 2),
    keep_rates=4,
    pair_steps=40,
    n_pairs=120,
    memory_tokens=(8, 64),
    latency=((12, 768), ((8, 256), (4, 128), (1, 16))),
    rounds=9,
)
QUICK = Sizes(
    n_train=48,
    n_dev=16,
    n_test=32,
    batch=16,
    max_tokens=12,
    seeds=(0, 1),
    keep_rates=1,
    pair_steps=2,
    n_pairs=4,
    memory_tokens=(2, 16),
    latency=((2, 32), ((2, 16), (2, 8), (1, 4))),
    rounds=2,
)


@dataclass(frozen=True)
class Lab:
    """Everything a stage may use.

    Attributes:
        folder: Records, kept adapters and the downloaded sentences.
        sizes: How large everything is.
        random_weights: Tiny random models and made-up sentences instead of the real ones.
        say: Told what is going on, a line at a time.
        stopped: Asked before each run whether the user wants no more of them.
    """

    folder: Path
    sizes: Sizes
    random_weights: bool
    say: Callable[[str], None] = print
    stopped: Callable[[], bool] = lambda: False

    # ------------------------------------------------------------------------------ records

    def run(self, name: str, settings: Mapping[str, Any], work: Callable[[], Result]) -> Result:
        """The result of a run, from its record or by doing it now.

        Args:
            name: Path of the record below the folder, without its ending.
            settings: All that the result depends on, as plain data.
            work: Does the run.

        Returns:
            What `work` returned, as JSON gives it back.

        Raises:
            KeyboardInterrupt: The run is not done yet, and the user wants no more of them.
        """
        wanted = json.loads(json.dumps({**settings, "random_weights": self.random_weights}))
        kept = self.record(name)
        if kept is not None and kept["settings"] == wanted:
            return kept["result"]
        if self.stopped():
            raise KeyboardInterrupt
        if not self.random_weights:
            gc.collect()  # the last run's model
        self.say(f"{name} ...")
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        record = {
            "settings": wanted,
            "result": result,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "load": os.getloadavg()[0],
        }
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n", encoding="utf-8")
        write_json(path, record)
        self.say(f"{name} {record['seconds']:.0f} s")
        kept = self.record(name)
        assert kept is not None
        return kept["result"]

    def record(self, name: str) -> dict[str, Any] | None:
        """The whole record of a run, or None where there is none."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def records(self) -> list[dict[str, Any]]:
        """Whole records of all runs there are."""
        paths = sorted((self.folder / "records").rglob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _path(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def kept(self, name: str) -> Path:
        """Where a run keeps what is too large for its record, such as an adapter."""
        path = self.folder / "kept" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def settings(self, *names: str) -> dict[str, Any]:
        """Some of the sizes, for the settings of a run."""
        return {name: asdict(self.sizes)[name] for name in names}

    # ----------------------------------------------------------------------- models and data

    def encoder(self) -> tuple[Any, Any]:
        """A fresh encoder and its tokenizer."""
        if self.random_weights:
            return toy.encoder()
        return minilm.load(minilm.find())

    def sentences(self, kind: str = "movies") -> Split:
        """The sentences of one kind, cut to size."""
        whole = _sentences(None if self.random_weights else self.folder, kind)
        sizes = self.sizes
        return Split(
            whole.train[: sizes.n_train], whole.dev[: sizes.n_dev], whole.test[: sizes.n_test]
        )

    def pairs(self) -> data.Split:
        """Pairs of a function and its summary, of this Python or made up."""
        return toy.pairs() if self.random_weights else _pairs()

    def decoder(self) -> tuple[Any, Any]:
        """A fresh decoder and its tokenizer. The real one is turned into a checkpoint once."""
        if self.random_weights:
            return toy.decoder()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.folder / "smollm2"
        if not folder.is_dir():
            self.say("reading the decoder out of its GGUF file, once ...")
            smollm2.save(smollm2.find(), folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)


@functools.cache
def _sentences(folder: Path | None, kind: str) -> Split:
    """All sentences of a kind in three parts; made up where there is no folder."""
    if folder is None:
        return snippets.split(toy.sentences(kind))
    return snippets.split(snippets.sentiment(snippets.read(snippets.fetch(folder), kind)))


@functools.cache
def _pairs() -> data.Split:
    return data.collect()


def weights_present() -> bool:
    """Whether both pretrained models are installed."""
    try:
        minilm.find()
        smollm2.find()
    except SystemExit:
        return False
    return True

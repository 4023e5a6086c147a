"""Stage `switching`: three tasks on one base against three full copies (sections 1, 4.2).

The three tasks are three kinds of sentences, each with an adapter and a head of its own,
trained here. What is timed is only the change from one task to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lora_inject

from . import classifier, trials
from .classifier import Classifier
from .document import FAILS, HOLDS, PARTLY, Claim, Section, n_bytes, table
from .lab import Lab, Result
from .methods import METHODS

TASKS = ("movies", "products", "editorials")
METHOD = METHODS["lora-qv-r8"]
REPEATS = 5


def do(lab: Lab) -> None:
    """Train an adapter for each task, then switch."""
    rate, head_rate = trials.rate_of(lab, METHOD), trials.rate_of(lab, METHODS["head"])
    settings = {"rate": rate, "head_rate": head_rate, **lab.settings(*trials.SHARED, "n_test")}
    for task in TASKS:
        lab.run(
            f"switching/{task}",
            settings,
            lambda task=task: classifier.fine_tune(
                lab, METHOD, 0, rate, head_rate, "test", f"{task}.safetensors", task
            ),
        )
    lab.run("switching/times", settings, lambda: switch(lab))


def switch(lab: Lab) -> Result:
    """Accuracy of every adapter on every task, bytes, and seconds of each way to switch."""
    encoder, tokenizer = lab.encoder()
    model = Classifier(encoder).eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    base = {name: value for name, value in plain.items() if not name.startswith("head.")}
    full = lab.kept("full.safetensors")
    save_file(plain, full)
    paths = {task: lab.kept(f"{task}.safetensors") for task in TASKS}
    for task, path in paths.items():
        lora_inject.load_adapter(model, path, task)
    sizes = lab.sizes
    rows = {
        task: classifier.encode(tokenizer, lab.sentences(task).test[:500], sizes.max_tokens)
        for task in TASKS
    }
    accuracy = {}
    for adapter in TASKS:
        lora_inject.activate(model, adapter)
        accuracy[adapter] = {t: classifier.evaluate(model, r)["accuracy"] for t, r in rows.items()}
    mixed = mixed_off(model, tokenizer, lab)
    lora_inject.activate(model, TASKS[0])
    lora_inject.merge(model)
    lora_inject.unmerge(model)
    after = model.state_dict()
    result: Result = {
        "accuracy": accuracy,
        "rows": {task: len(r) for task, r in rows.items()},
        "mixed_off": mixed,
        "exact": all(torch.equal(after[name], value) for name, value in base.items()),
        "adapter_bytes": paths[TASKS[0]].stat().st_size,
        "full_bytes": full.stat().st_size,
        "seconds": {
            "activate an adapter that is on the model": in_turn(
                lambda task: lora_inject.activate(model, task)
            )
        },
    }
    names = iter(range(10**6))

    def load(task: str) -> None:
        lora_inject.load_adapter(model, paths[task], f"{task}-{next(names)}")

    result["seconds"]["load an adapter from its file"] = in_turn(load)
    lora_inject.eject(model)
    result["seconds"]["load a full copy from its file"] = in_turn(
        lambda _: model.load_state_dict(load_file(full))
    )
    return result


def mixed_off(model: Classifier, tokenizer: Any, lab: Lab) -> float:
    """How far the states of a batch of mixed tasks are from those of each task alone, at most.

    The heads are left out: a head is a whole matrix for each task, which rows cannot share.
    """
    plain = Classifier(lab.encoder()[0]).eval()
    for task in TASKS:
        state = lora_inject.adapter_state(model, task)
        lora_inject.install(plain, lora_inject.AdapterState(state.sites), task)
    rows = [lab.sentences(task).test[0] for task in TASKS]
    ids, mask, _ = classifier.collate(classifier.encode(tokenizer, rows, lab.sizes.max_tokens))
    with torch.inference_mode():
        with lora_inject.routed(plain, list(TASKS)):
            mixed = plain.encoder(ids, mask).last_hidden_state
        alone = []
        for row, task in enumerate(TASKS):
            lora_inject.activate(plain, task)
            alone.append(plain.encoder(ids, mask).last_hidden_state[row])
    return ((mixed - torch.stack(alone)).abs() * mask.unsqueeze(-1)).max().item()


def in_turn(change: Callable[[str], Any]) -> float:
    """Median seconds of a change, over the tasks in turn."""
    seconds = []
    for _ in range(REPEATS):
        for task in TASKS:
            start = time.perf_counter()
            change(task)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    record = lab.record("switching/times")
    if record is None:
        return None
    result = record["result"]
    adapter, full = result["adapter_bytes"], result["full_bytes"]
    copies, shared = 3 * full, full + 3 * adapter
    seconds = list(result["seconds"].values())
    claims = [
        Claim(
            "Tasks are switched by swapping A and B, at a much lower cost than a full copy",
            "100 tasks: 354 GB instead of 35 TB",
            f"{1e6 * seconds[0]:.0f} µs to activate, {1000 * seconds[1]:.1f} ms to load from disk; "
            f"a full copy {1000 * seconds[2]:.1f} ms",
            HOLDS if seconds[1] < seconds[2] else PARTLY,
        ),
        Claim(
            "Three tasks take one base and three small files",
            "350 GB and 35 MB for each",
            f"{n_bytes(shared)} instead of {n_bytes(copies)}: {n_bytes(adapter)} for each task, "
            f"{full / adapter:.0f} times smaller",
            HOLDS,
        ),
        Claim(
            "Inputs of several tasks can share a batch while nothing is merged",
            "section 4.2, in words",
            f"a row for each task: its last states are within {result['mixed_off']:.0e} of those "
            "of the task alone",
            HOLDS if result["mixed_off"] < 1e-5 else FAILS,
        ),
        Claim(
            "W0 is recovered when another adapter is to go in",
            "by subtracting B A",
            "bit for bit" if result["exact"] else "not bit for bit",
            HOLDS if result["exact"] else FAILS,
        ),
    ]
    accuracies = [
        (one, *(f"{100 * result['accuracy'][one][task]:.1f}" for task in TASKS)) for one in TASKS
    ]
    text = [
        (
            "There are three kinds of sentences, with one adapter (q, v, r = 8) and one head for "
            "each, "
            "all on one model. The table has the accuracy in % on up to "
            f"{max(result['rows'].values())} rows of each task, by the active adapter:"
        ),
        table(("adapter", *(f"on {task}" for task in TASKS)), accuracies),
        table(
            ("to change the task", "median"),
            [(title, f"{1000 * s:.3f} ms") for title, s in result["seconds"].items()],
        ),
    ]
    note = (
        "A file of this size is read from memory, not from a disk. With a base that is larger than "
        "memory the full copy would be slower still. Each load checks a fingerprint of the base."
    )
    return Section("Switching tasks (sections 1, 4.2)", claims, text, [note])

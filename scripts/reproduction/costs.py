"""Stages `counting`, `memory`, `latency`, `together` and `switching` (sections 1, 4; Table 1)."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import measure
from benchmarks.models import gpt2, randomise
from data.pairs import target_log_probs
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li

from . import sentences
from .lab import FAILS, HOLDS, OPEN, PARTLY, Answer, Lab, Result, holds, n_bytes, table, verdict
from .methods import TARGETS, attach

FUSED = {"match": r"attn\.c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}


def counting(_: Lab) -> tuple[str, list[Answer]]:
    """GPT-3 175B in GPT-2's layout on the meta device, planned; the rest is multiplication."""
    with torch.device("meta"):
        model = gpt2(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
    whole = sum(p.numel() for p in model.parameters())
    few, small, many = (
        li.plan(model, {"rank": rank, "targets": [FUSED]}).n_trainable for rank in (1, 4, 8)
    )
    # two moments at 16 bits; at 32 bits, and master weights
    narrow, wide = (n_bytes(whole * (2 + 2 + adam)) for adam in (4, 12))
    with_lora = n_bytes(whole * 2 + small * (2 + 2 + 4))
    times = f"{whole / few:,.0f} to {whole / many:,.0f} times fewer"
    files = f"{n_bytes(2 * whole)}; {n_bytes(2 * small)} ({2 * small / 2**20:.0f} MiB)"
    memory = f"{narrow} or {wide}, by how Adam is kept; {with_lora}; both without activations"
    return "", [
        (f"{few:,} to {many:,} of {whole:,}: {times}", holds(whole / many < 10_000 < whole / few)),
        (files, holds(abs(small / 2**19 - 35) < 3.5)),
        (memory, PARTLY),
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "LoRA q, v, r = 4": {"rank": 4, "targets": [r"self_attn\.[qv]_proj"]},
    "LoRA all linears, r = 8": {"rank": 8, "targets": [r"(self_attn|mlp)\.\w+_proj"]},
}
PARTS = ("weights", "gradients", "optimizer", "without activations", "peak")


def memory(lab: Lab) -> tuple[str, list[Answer]]:
    """Bytes, counted and not sampled, and speed of a training step (section 4.2)."""
    result = lab.run(steps)
    full, small, *_ = result.values()
    n_tokens = math.prod(lab.sizes.memory_tokens)
    rows = [
        (title, f"{v['trained']:,}", *(n_bytes(v[part]) for part in PARTS),
         f"{n_tokens / statistics.median(v['seconds']):.0f}")
        for title, v in result.items()
    ]  # fmt: skip
    static = [sum(v[part] for part in PARTS[:3]) for v in (full, small)]
    ratios = measure.paired(full["seconds"], small["seconds"])
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    share = small["peak"] / full["peak"]
    less = f"{share:.2f} at the peak, {static[1] / static[0]:.2f} without activations"
    faster = f"{middle:.2f} (rounds from {least:.2f} to {most:.2f})"
    return table(("", "trained", *PARTS, "tokens/s"), rows), [
        (less, HOLDS if share < 0.4 else f"{FAILS} at this batch"),
        (faster, verdict(middle, (most - least) / 2 / len(ratios) ** 0.5, 1.25)),
    ]


def steps(lab: Lab) -> Result:
    """Each variant's bytes, then the times of all in turn."""
    shape = lab.sizes.memory_tokens
    tokens = torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, : shape[1] * 3 // 4] = -100  # the prompt's share in the pairs, near enough
    runs, found = {}, {}
    for title, config in VARIANTS.items():
        model, _ = lab.decoder()
        if config:
            li.inject(model, config)
        runs[title], found[title] = training_step(model, tokens, labels)
    for title, seconds in measure.interleave(runs, lab.sizes.rounds).items():
        found[title]["seconds"] = seconds
    return found


def training_step(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Callable[[], None], Result]:
    """A step with AdamW, and the bytes that it takes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def loss() -> Tensor:
        return -target_log_probs(model, tokens, labels).mean()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer makes its state in the first
    moments = [t for state in optimizer.state.values() for t in state.values()]
    kinds = {"weights": model.parameters(), "gradients": trained, "optimizer": moments}
    found = {kind: sum(t.nbytes for t in tensors) for kind, tensors in kinds.items()}
    found["without activations"] = measure.saved_bytes(model, loss)
    found["peak"] = found["weights"] + found["optimizer"] + measure.peak_bytes(step)
    return step, found | {"trained": sum(p.numel() for p in trained)}


SHARE = 0.031  # of the parameters in adapter layers: 11 M of GPT-2 medium's 355 M
PLAIN, AGAIN, MERGED = "plain", "plain again", "LoRA merged"


def latency(lab: Lab) -> tuple[str, list[Answer]]:
    """What a forward costs, merged, not merged, and with adapter layers (Table 1)."""
    found = lab.run(forwards)
    names = [name for name in next(iter(found.values())) if name != PLAIN]
    more = {at: {name: added(times, name) for name in names} for at, times in found.items()}
    rows = [
        (at, f"{1000 * statistics.median(found[at][PLAIN]):.1f}",
         *("{:+.1f} % ± {:.1f}".format(*cell) for cell in by_name.values()))
        for at, by_name in more.items()
    ]  # fmt: skip
    merged, again = ([by_name[name] for by_name in more.values()] for name in (MERGED, AGAIN))
    quiet = all(
        abs(x) <= 2 * error + abs(noise) + 2 * its_error and error < 3
        for (x, error), (noise, its_error) in zip(merged, again, strict=True)
    )
    said = ", ".join(f"{x:+.1f} %" for x, _ in merged)
    answers = [(f"{said}; the same classes and shapes as plain", HOLDS if quiet else OPEN)]
    for name in ("Adapter-L", "Adapter-H"):
        middle, error = list(more.values())[-1][name]
        said = f"{middle:+.1f} % ± {error:.1f} (more than 5 % counts as much)"
        answers.append((said, verdict(middle, error, 5.0)))
    return table(("batch x length", "plain, ms", *names), rows), answers


def forwards(lab: Lab) -> Result:
    """Seconds of every round, by setting and variant."""
    layers, dim = lab.sizes.latency_model
    sizes = {"n_layer": layers, "n_embd": dim, "n_head": max(2, dim // 64), "vocab_size": 1000}
    plain = gpt2(**sizes).transformer.eval()
    unmerged, one, two = (copy.deepcopy(plain) for _ in range(3))
    li.inject(unmerged, {"rank": 4, "alpha": 32, "targets": [FUSED]})
    randomise(li.adapter_parameters(unmerged).values())
    merged = copy.deepcopy(unmerged)
    li.merge(merged, undo=False)
    li.eject(merged)
    body = sum(p.numel() for p in plain.h.parameters())
    wide = max(1, round(SHARE * body / (layers * 2 * dim)))
    after_mlp = [f"h.{i}.mlp.c_proj" for i in range(layers)]
    both = [f"h.{i}.attn.c_proj" for i in range(layers)] + after_mlp
    attach(one, after_mlp, dim, wide, normed=True)
    attach(two, both, dim, max(1, wide // 2), normed=False)
    models = {PLAIN: plain, AGAIN: plain, MERGED: merged, "LoRA not merged": unmerged}
    models |= {"Adapter-L": one, "Adapter-H": two}
    times = {}
    for rows, length in lab.sizes.latency:
        ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
        calls = {n: partial(torch.inference_mode()(model), ids) for n, model in models.items()}
        # short forwards are repeated, so that the clock's grain and its owner's switches even out
        rounds = lab.sizes.rounds * (4 if rows == 1 else 1)
        times[f"{rows} x {length}"] = measure.interleave(calls, rounds)
    return times


def added(times: Mapping[str, list[float]], name: str) -> tuple[float, float]:
    """Percent that a variant adds to the plain model, median over rounds, and its noise."""
    ratios = [100 * (ratio - 1) for ratio in measure.paired(times[name], times[PLAIN])]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (high - low) / len(ratios) ** 0.5


def together(lab: Lab) -> tuple[str, list[Answer]]:
    """LoRA with prefix tuning, and LoRA of full rank (appendix E, section 4.1)."""
    base, full, half = lab.run(full_rank).values()
    prefix, lora, both = sentences.scores(lab, ("prefix", "lora-qv-r8", "both"))
    over = [sentences.gap(both, one) for one in (prefix, lora)]
    others = f"the base {base:.2f}, half the rank {half:.2f}"
    off = f"outputs {full:.0e} off those of an arbitrary dense update ({others})"
    return "", [
        (off, holds(full < 1e-9)),
        (f"{over[0]} points over the prefix alone", verdict(*over[0])),
        (f"{over[1]} points over LoRA alone", verdict(*over[1])),
    ]


def full_rank(lab: Lab) -> Result:
    """Distance of outputs from an encoder whose every matrix and bias was changed at random.

    An adapter of full rank and with `bias: all` gets the changes, and another half the rank.
    """
    base = lab.encoder()[0].double()
    rank = base.config.hidden_size
    config = {"rank": rank, "alpha": rank, "targets": TARGETS["all"], "bias": "all"}
    matrices = {site.weight for site in li.plan(base, config).sites}
    target, full, half = (copy.deepcopy(base) for _ in range(3))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in matrices or name.endswith("bias"):
                scale = parameter.std() / 2 if name in matrices else 0.1
                parameter.add_(scale * torch.randn_like(parameter))
        li.inject(full, config)
        for name, parameter in li.adapter_parameters(full).items():
            site, _, factor = name.partition(".lora_")
            wanted = target.get_parameter(f"{site}.weight" if factor else name)
            if factor:  # one of A and B is the change, the other the identity
                n_out, n_in = wanted.shape
                change = wanted - base.get_parameter(f"{site}.weight")
                wanted = change if (factor == "B") == (n_out > n_in) else torch.eye(rank)
            parameter.copy_(wanted)
    li.install(half, li.truncate(li.adapter_state(full), rank=rank // 2).state)
    ids = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(ids).last_hidden_state for model in (base, full, half)]
        wanted = target(ids).last_hidden_state
    distances = [float((found - wanted).norm() / wanted.norm()) for found in outputs]
    return dict(zip(("base", "full", "half"), distances, strict=True))


TASKS = ("movies", "products", "editorials")
ON_TASKS = "lora-qv-r8"


def switching(lab: Lab) -> tuple[str, list[Answer]]:
    """Three kinds of sentences on one base against three full copies (sections 1, 4.2)."""
    for task in TASKS:
        sentences.run(lab, ON_TASKS, 0, task)
    off, exact, activate, load, copied, adapter, full = lab.run(switch).values()
    ways = f"{1e4 * activate:.0f} µs to activate, {1000 * load:.1f} ms to load from disk"
    sizes = f"{n_bytes(full + 3 * adapter)} instead of {n_bytes(3 * full)}"
    smaller = f"{n_bytes(adapter)} for each task, {full / adapter:.0f} times smaller"
    mixed = f"its last states are within {off:.0e} of those of the task alone"
    return "", [
        (f"{ways}; a full copy {1000 * copied:.1f} ms", HOLDS if load < copied else PARTLY),
        (f"{sizes}: {smaller}", HOLDS),
        (f"a row for each task: {mixed}", holds(off < 1e-5)),
        ("bit for bit" if exact else "not bit for bit", holds(exact)),
    ]


def switch(lab: Lab) -> Result:
    """What a mixed batch is off, whether W0 comes back, seconds of each way, bytes of each file."""
    paths = {task: sentences.kept(lab, ON_TASKS, 0, task) for task in TASKS}
    off = mixed_off(lab, paths)
    model = sentences.Classifier(*lab.encoder()).eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    full = lab.folder / "full.safetensors"
    save_file(plain, full)
    for task, path in paths.items():
        li.load_adapter(model, path, task)
    li.activate(model, TASKS[0])
    li.merge(model)
    li.unmerge(model)
    after = model.state_dict()
    exact = all(torch.equal(after[n], v) for n, v in plain.items() if not n.startswith("head."))
    tasks, names = itertools.cycle(TASKS), (f"again {n}" for n in itertools.count())
    ways = {
        "activate": measure.many(lambda: li.activate(model, next(tasks)), 100),
        "load": lambda: li.load_adapter(model, paths[next(tasks)], next(names)),
        "copy": lambda: model.load_state_dict(load_file(full)),
    }
    seconds = {way: statistics.median(s) for way, s in measure.interleave(ways, 15).items()}
    sizes = {"adapter_bytes": paths[TASKS[0]].stat().st_size, "full_bytes": full.stat().st_size}
    return {"mixed_off": off, "exact": exact, **seconds, **sizes}


def mixed_off(lab: Lab, paths: Mapping[str, Path]) -> float:
    """How far the states of a batch of mixed tasks are from those of each task alone, at most.

    The heads are left out: a head is a whole matrix for each task, which rows cannot share.
    """
    encoder, tokenizer = lab.encoder()
    model = sentences.Classifier(encoder, tokenizer).eval()
    for task, path in paths.items():
        li.install(model, li.AdapterState(li.read_adapter(path).sites), task)
    rows = sentences.encode(lab, tokenizer, [lab.sentences(task).test[0] for task in TASKS])
    inputs = tokenizer.pad(rows, return_tensors="pt")
    del inputs["labels"]
    with torch.inference_mode():
        with li.routed(model, list(TASKS)):
            mixed = encoder(**inputs).last_hidden_state
        for row, task in enumerate(TASKS):
            li.activate(model, task)
            mixed[row] -= encoder(**inputs).last_hidden_state[row]
    return mixed[inputs["attention_mask"].bool()].abs().max().item()

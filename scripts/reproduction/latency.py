"""Stage `latency`: what a forward costs, merged, not merged, and with adapter layers (Table 1)."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks import measure
from torch import Tensor, nn

import lora_inject

from . import adapter_layers
from .document import FAILS, HOLDS, OPEN, Claim, Section, table
from .lab import Lab, Result

# batch x length: added latency in % of Adapter-L and Adapter-H
PAPER = {"32 x 512": (2.2, 3.0), "16 x 256": (5.0, 8.4), "1 x 128": (20.7, 30.3)}
QUIET = 3.0  # percent; more noise than this decides nothing
SHARE = 0.031  # of the parameters in adapter layers: 11 M of GPT-2 medium's 355 M
PLAIN, AGAIN = "plain", "plain again"
MERGED, UNMERGED = "LoRA merged", "LoRA not merged"

# what `__main__.py` chooses: of one thread the processor's, which leaves out waiting for a core
CLOCK = {True: "processor time", False: "time by the clock"}


def do(lab: Lab) -> None:
    """All settings, each variant in turn."""
    settings = lab.settings("latency", "rounds")
    lab.run("latency/gpt2", settings, lambda: compare(lab))


def compare(lab: Lab) -> Result:
    """Seconds of every round, by setting and variant."""
    (layers, dim), batches = lab.sizes.latency
    models, widths = variants(layers, dim)
    times = {}
    for rows, length in batches:
        ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
        calls = {name: forward(model, ids) for name, model in models.items()}
        # short forwards are repeated, so that the clock's grain and its owner's switches even out
        rounds = lab.sizes.rounds * (4 if rows == 1 else 1)
        times[f"{rows} x {length}"] = measure.interleave(calls, rounds)
    return {
        "times": times,
        "widths": widths,
        "threads": torch.get_num_threads(),
        "clock": CLOCK[torch.get_num_threads() == 1],
    }


def variants(layers: int, dim: int) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """GPT-2-shaped models of random weights, all from the same, and the adapter layers' widths."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=dim, n_head=max(2, dim // 64), vocab_size=1000)
    plain: Any = GPT2Model(config).eval()
    body = sum(p.numel() for p in plain.h.parameters())
    lora = {
        "rank": 4,
        "alpha": 32,
        "targets": [{"match": r"attn\.c_attn", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}],
    }
    unmerged = lora_inject.inject(copy.deepcopy(plain), lora)
    for parameter in lora_inject.adapter_parameters(unmerged).values():
        nn.init.normal_(parameter, std=0.02)
    merged = copy.deepcopy(unmerged)
    lora_inject.merge(merged, undo=False)
    lora_inject.eject(merged)
    wide = max(1, round(SHARE * body / (layers * 2 * dim)))
    one, two = copy.deepcopy(plain), copy.deepcopy(plain)
    after_mlp = [f"h.{i}.mlp.c_proj" for i in range(layers)]
    after_attention = [f"h.{i}.attn.c_proj" for i in range(layers)]
    adapter_layers.attach(one, after_mlp, dim, wide, normed=True)
    adapter_layers.attach(two, after_attention + after_mlp, dim, max(1, wide // 2), normed=False)
    models: dict[str, nn.Module] = {PLAIN: plain, AGAIN: plain, MERGED: merged, UNMERGED: unmerged}
    models |= {"Adapter-L": one, "Adapter-H": two}
    if {type(m) for m in merged.modules()} != {type(m) for m in plain.modules()}:
        raise RuntimeError("a merged model should have the plain model's classes")
    return models, {"Adapter-L": wide, "Adapter-H": max(1, wide // 2)}


def forward(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """One forward without a graph."""

    def call() -> None:
        with torch.inference_mode():
            model(ids)

    return call


def added(times: Mapping[str, list[float]], name: str) -> tuple[float, float]:
    """Percent that a variant adds to the plain model, median over rounds, and its noise."""
    ratios = [100 * (a / b - 1) for a, b in zip(times[name], times[PLAIN], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (quartiles[2] - quartiles[0]) / len(ratios) ** 0.5


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    record = lab.record("latency/gpt2")
    if record is None:
        return None
    result = record["result"]
    names = (AGAIN, MERGED, UNMERGED, "Adapter-L", "Adapter-H")
    rows = []
    for setting, times in result["times"].items():
        cells = ["{:+.1f} % ± {:.1f}".format(*added(times, name)) for name in names]
        rows.append((setting, f"{1000 * statistics.median(times[PLAIN]):.1f}", *cells))
    last = list(result["times"].values())[-1]
    claims = [
        _merged_claim(result["times"]),
        _adapters_claim("Adapter-L", last, 20.7),
        _adapters_claim("Adapter-H", last, 30.3),
    ]
    (layers, dim), _ = lab.sizes.latency
    widths = result["widths"]
    text = [
        (
            f"A GPT-2 of {layers} layers of {dim} with random weights, forward without a graph; "
            "LoRA on "
            f"q and v at r = 4; adapter layers of about {SHARE:.0%} of the layers' parameters, "
            "as in "
            f"the paper (widths {widths['Adapter-L']} and {widths['Adapter-H']}). Each "
            "round runs all variants in turn. The table has the median time of the plain model, "
            "and the median of what each variant adds to it; ± is the distance of the quartiles "
            "over the root of the number of rounds. *Plain again* is the plain model measured a "
            "second time: the noise."
        ),
        table(("batch x length", "plain, ms", *names), rows),
        "In the paper (GPT-2 medium on a GPU), Adapter-L and Adapter-H add "
        + ", ".join(f"{a} % and {b} % at {setting}" for setting, (a, b) in PAPER.items())
        + ".",
    ]
    clock = record["result"].get("clock", CLOCK[False])
    note = f"{result['threads']} thread(s); {clock}."
    return Section("Latency (Table 1)", claims, text, [note])


def _merged_claim(times: Mapping[str, Mapping[str, list[float]]]) -> Claim:
    found = [added(one, MERGED) for one in times.values()]
    noise = [abs(added(one, AGAIN)[0]) + 2 * added(one, AGAIN)[1] for one in times.values()]
    quiet = all(abs(x) <= 2 * e + n for (x, e), n in zip(found, noise, strict=True))
    quiet = quiet and max(e for _, e in found) < QUIET
    return Claim(
        "A merged LoRA adds no latency, by construction (Table 1)",
        "0 %",
        ", ".join(f"{x:+.1f} %" for x, _ in found) + "; the same classes and shapes as plain",
        HOLDS if quiet else OPEN,
    )


def _adapters_claim(name: str, times: Mapping[str, list[float]], paper: float) -> Claim:
    middle, error = added(times, name)
    verdict = HOLDS if middle - 2 * error > 5 else FAILS if middle + 2 * error < 5 else OPEN
    return Claim(
        f"{name} adds much to the latency of one short row (Table 1)",
        f"{paper:+.1f} %",
        f"{middle:+.1f} % ± {error:.1f} (more than 5 % counts as much)",
        verdict,
    )

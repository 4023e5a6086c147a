"""Results as JSON, as the table of the page, and as its picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import AGAIN, BARE, Line, Result, noise_of

OURS = "lora_inject"
# The table: what is said, the row, its case, and its metric with the unit that is shown.
TABLE = (
    ("training step, Llama 124M, over a frozen base", "step", "Llama 124M bf16", "time / floor"),
    ("kept for the backward, Llama 124M", "saved-bytes", "Llama 124M bf16", "MiB over floor"),
    ("kernel launches of a layer, forward and backward", "launches", "bf16", "launches"),
    ("bytes moved by that layer", "launches", "bf16", "GiB moved"),
    ("step through eight experts", "experts", "8 experts, 1024 to 3584, 512 tokens, bf16",
     "time / floor"),
    ("its memory over the start", "experts", "8 experts, 1024 to 3584, 512 tokens, bf16",
     "peak, MiB"),
    ("eight runs of 32 tokens, over one after the other", "trials",
     "8 trials bf16, 32 tokens each", "time / in turn"),
    ("a decoded token, each layer", "decode", "24 layers of width 768, bfloat16",
     "us a layer over nn.Linear"),
    ("16 rows with 8 adapters, decoded", "routed", "16 rows, 8 adapters, decode",
     "time / no adapter"),
    ("switch among adapters on 560 sites", "switch", "560 sites", "ms"),
    ("inject into 5,000 sites", "inject", "5,000 sites of width 32", "s"),
    ("load an adapter onto 5,000 sites", "load", "5,000 sites of width 32", "s"),
)  # fmt: skip
# The picture: what an adapter adds to the time of the same work without one.
BARS = (
    ("training step, GPT-2, bf16", "step", "GPT-2 124M bf16"),
    ("training step, Llama, bf16", "step", "Llama 124M bf16"),
    ("training step, Llama, float32", "step", "Llama 124M fp32"),
    ("the same compiled, bf16", "compile", "3 blocks of width 768 bf16, compiled"),
    ("eight experts, bf16", "experts", "8 experts, 1024 to 3584, 512 tokens, bf16"),
    ("decode, 8 adapters in a batch", "routed", "16 rows, 8 adapters, decode"),
    ("prefill, 8 adapters in a batch", "routed", "16 rows, 8 adapters, length 64"),
)


def machine(device: str) -> dict[str, Any]:
    """Say where the numbers come from."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    except OSError:
        models = []
    return {
        "processor": gpu or (models or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def add(path: Path, here: Mapping[str, Any], name: str, result: Result, about: Any) -> None:
    """Put a row into a file in the place of its old one; a file is of one machine."""
    found = {"machine": here, "rows": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    if found["machine"]["processor"] != here["processor"]:
        there = found["machine"]["processor"]
        raise SystemExit(f"error: {path} was measured on {there}. Name another file.")
    found["machine"] = here
    found["rows"][name] = {**about, "lines": [vars(line) for line in result.lines]}
    path.write_text(as_text(found), encoding="utf-8")


def as_text(found: Mapping[str, Any]) -> str:
    """JSON with one line for each number."""
    rows = []
    for name, row in found["rows"].items():
        head = json.dumps({key: value for key, value in row.items() if key != "lines"})
        lines = ",\n   ".join(map(json.dumps, row["lines"]))
        rows.append(f'  {json.dumps(name)}: {head[:-1]}, "lines": [\n   {lines}]}}')
    joined = ",\n".join(rows)
    return f'{{"machine": {json.dumps(found["machine"])},\n "rows": {{\n{joined}\n}}}}\n'


def lines_of(found: Mapping[str, Any], row: str, case: str, metric: str) -> dict[str, Line]:
    """Return the lines of a case whose metric begins so, by who did it."""
    lines = [Line(**line) for line in found["rows"].get(row, {"lines": ()})["lines"]]
    return {ln.variant: ln for ln in lines if ln.case == case and ln.metric.startswith(metric)}


def table(found: Mapping[str, Any]) -> str:
    """Return the table of the page in Markdown, of the rows that there are."""
    head = ("in bfloat16, on one thread", "unit", OURS, BARE, "PEFT", "error")
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    for about, row, case, metric in TABLE:
        if lines := lines_of(found, row, case, metric):
            control = lines.get(AGAIN) or lines.get("in turn again")
            values = [
                f"{lines[who].mid:.4g}" if who in lines else "" for who in (OURS, BARE, "PEFT")
            ]
            error = f"{noise_of(control):.2g}" if control and "peak" not in metric else ""
            rows.append((about, metric.removesuffix(" over floor"), *values, error))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw what an adapter adds to the time of the same work without one, beside PEFT."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "", "font.size": 9})
    # As wide as a phone shows it at the size of its text: what a line is about stands above it.
    figure, axis = plt.subplots(figsize=(4.4, 0.62 * len(BARS) + 0.9), layout="constrained")
    for y, (about, row, case) in enumerate(reversed(BARS)):
        ratios = {who: line.mid for who, line in lines_of(found, row, case, "time / ").items()}
        # Less than a percent is noise.
        ours, peer = (max(100 * (ratios[who] - 1), 1.0) for who in (OURS, "PEFT"))
        axis.plot([ours, peer], [y, y], color="#b0b6c3", linewidth=2, zorder=1)
        axis.scatter([peer], [y], color="#8a8f99", s=42, label="PEFT" if y == 0 else None)
        axis.scatter([ours], [y], color="#3949ab", s=42, label=OURS if y == 0 else None)
        for value, shift, align in ((max(ours, peer), 7, "left"), (min(ours, peer), -7, "right")):
            axis.annotate(
                f"{value:.0f}", (value, y), (shift, -3.5), textcoords="offset points", ha=align
            )
        axis.annotate(about, (1.4, y), (0, 8), textcoords="offset points", fontweight="bold")
    axis.set(xscale="log", xlabel="% that an adapter adds to the time (log scale)", yticks=[])
    axis.set_xlim(1.4, 1500)
    axis.set_xticks([2, 10, 100, 1000], ["2", "10", "100", "1000"])
    axis.set_ylim(-0.5, len(BARS) - 0.4)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

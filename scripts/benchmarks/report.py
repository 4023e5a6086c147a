"""Results as JSON, Markdown and plots.

The JSON file is the result, everything else is made from it. Rows that are measured again
replace their old numbers there, and each row says when it ran and how busy the machine was.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import AGAIN, BARE, Line, Result, noise_of, verdict

PACKAGES = ("lora-inject", "torch", "transformers", "peft", "loralib", "safetensors")
OURS, PEERS = "lora_inject", (BARE, "PEFT", "loralib")
# Rows whose numbers do not depend on the machine are shown whole, of others time and memory.
EXACT = ("launches", "errors")
UNITS = (
    "time / floor",
    "time / compiled floor",
    "time / no adapter",
    "time / memcpy",
    "us a layer over nn.Linear",
    "MiB over floor",
    "peak, MiB",
    "s",
    "ms",
)
# Ways of ours that no peer has, or that only explain another number.
ONLY_JSON = (
    "general path",
    "compute: base",
    "merged",
    "merged and ejected",
    "no adapter active",
    "one for all rows",
    "disabled()",
    "eager",
)
# The picture: what is said of a case, its row, its name there, and how we and PEFT do it.
BARS = (
    ("training step, GPT-2, bf16", "step-bf16", "GPT-2 124M bf16, 1 thread", ""),
    ("training step, Llama, bf16", "step-bf16", "Llama 124M bf16, 1 thread", ""),
    ("training step, Llama, float32", "step-fp32", "Llama 124M fp32", ""),
    ("the same compiled, bf16", "compile", "3 blocks of width 768 bf16, compiled", ""),
    ("eight experts, bf16", "experts", "8 experts, 1024 to 3584, 512 tokens, bf16", ""),
    ("decode, 8 adapters in a batch", "routed", "16 rows, decode", ", 8 adapters"),
    ("prefill, 8 adapters in a batch", "routed", "16 rows, length 64", ", 8 adapters"),
)
# The result, first on the page: what is said, its row, its case, its metric, and the unit.
HEADLINES = (
    ("inject into 5,000 sites", "inject", "5,000 sites of width 32", "s", "s"),
    ("load an adapter onto 5,000 sites", "load", "5,000 sites of width 32", "s", "s"),
    ("switch among adapters on 560 sites", "switch", "560 sites", "ms", "ms"),
    ("kept for the backward, Llama 124M in bf16", "saved-bytes", "Llama 124M bf16",
     "MiB over floor", "MiB"),
    ("a step through eight experts in bf16: memory over the start", "experts",
     "8 experts, 1024 to 3584, 512 tokens, bf16", "peak, MiB", "MiB"),
    ("launches of a bf16 layer, forward and backward", "launches", "bf16", "launches", ""),
    ("bytes moved by that layer", "launches", "bf16", "GiB moved", "GiB"),
)  # fmt: skip
# What stands below this line in the document is written by hand, and kept.
BY_HAND = "<!-- Below this line: written by hand, kept by scripts/bench.py -->"


def machine(device: str) -> dict[str, Any]:
    """Say where the numbers come from."""
    on_cuda = torch.device(device).type == "cuda"
    gpu = {"gpu": torch.cuda.get_device_name(device)} if on_cuda else {}
    return {
        **gpu,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_dict(title: str, result: Result, **about: Any) -> dict[str, Any]:
    """Return a row's result as plain data."""
    lines = [{**vars(line), "reached": line.reached} for line in result.lines]
    return {"title": title, **about, "lines": lines, "notes": result.notes}


def merged_into(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file holds, with the rows that were measured now in place of the old ones."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    return {**found, "rows": {**old["rows"], **found["rows"]}}


def other_machine(path: Path, here: Mapping[str, Any]) -> str | None:
    """Return the processor, or the GPU, that measured what a file holds if it is not this one's."""
    there = json.loads(path.read_text(encoding="utf-8"))["machine"] if path.exists() else here
    which = [there.get(key) for key in ("processor", "gpu")]
    same = which == [here.get(key) for key in ("processor", "gpu")]
    return None if same else str(which[1] or which[0])


def lines_of(row: Mapping[str, Any]) -> list[Line]:
    """Return the lines of a row of the JSON file."""
    return [Line(**{k: v for k, v in line.items() if k != "reached"}) for line in row["lines"]]


def summary(rows: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the final table: every number that has a target.

    Counts and errors of many cases stand in one line, with the worst of them.
    """
    table = [("row", "case", "what", "target", "median", "min - max", "reached")]
    for name, row in rows.items():
        groups: dict[tuple[Any, ...], list[Line]] = {}
        for line in lines_of(row):
            if line.target is not None:
                apart = line.case if line.n > 1 else ""
                key = (line.variant, line.metric, line.target, apart)
                groups.setdefault(key, []).append(line)
        for lines in groups.values():
            worst = max(lines, key=lambda line: line.mid)
            case = worst.case if len(lines) == 1 else f"worst of {len(lines)} cases"
            what = f"{worst.variant}: {worst.metric}"
            cells = (f"{worst.target:.3g}", number(worst.mid), spread(worst))
            table.append((name, case, what, *cells, _judged(worst, row)))
    return table


def _judged(line: Line, row: Mapping[str, Any]) -> str:
    if line.n == 1:
        return verdict(line)
    if row["quick"]:
        return "not judged"
    same = [c for c in lines_of(row) if c.case == line.case and c.variant.endswith("again")]
    return verdict(line, noise_of(same[0]) if same else 0.0)


def spread(line: Line) -> str:
    """Return the smallest and the largest value, where there was more than one round."""
    return f"{number(line.low)} - {number(line.high)}" if line.n > 1 else ""


def number(value: float) -> str:
    """Return a value with as many digits as mean something."""
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if abs(value) < 1e-2 or abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def plain(table: Sequence[tuple[str, ...]]) -> str:
    """Return a table for a terminal."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def markdown(table: Sequence[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "|" + " --- |" * len(table[0]), *body])


def document(found: Mapping[str, Any], path: Path, method: str, raw: Path | None) -> str:
    """Return docs/performance.md: the times, what is exact, what is judged, what is by hand."""
    here, rows = found["machine"], found["rows"]
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items())
    where = (
        f"Machine: {here.get('gpu', here['processor'])}, {here['cores']} cores, "
        f"{here['memory_gib']} GiB, {here['capability']}. Python {here['python']}, {versions}."
    )
    if raw is not None:
        where += f" Every number: [{raw.name}]({os.path.relpath(raw, path.parent)})."
    method = method.replace("<!-- result -->", markdown(_headlines(rows)))
    parts = ["# Performance", method, where, "## Times and bytes", markdown(_times(rows))]
    when = markdown([("row", "measured"), *((name, _when(row)) for name, row in rows.items())])
    parts.append(_folded("When each row was measured", when))
    for name in (name for name in rows if name in EXACT):
        parts += [f"## {name.capitalize()}", rows[name]["title"], *rows[name]["notes"]]
        parts.append(_folded("The tables", *_tables(rows[name])))
    parts += [
        "## What is judged",
        _folded("Every number that has a target", markdown(summary(rows))),
    ]
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    by_hand = old.split(BY_HAND, 1)[1].strip() if BY_HAND in old else ""
    return "\n\n".join([*parts, BY_HAND, *([by_hand] if by_hand else [])]) + "\n"


def _headlines(rows: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the numbers that most readers come for, ours and PEFT's."""
    table = [("", OURS, "PEFT")]
    for about, name, case, metric, unit in HEADLINES:
        if name in rows:
            lines = [ln for ln in lines_of(rows[name]) if (ln.case, ln.metric) == (case, metric)]
            values = {ln.variant: f"{number(ln.mid)} {unit}".strip() for ln in lines}
            if values:  # a quick row has other cases
                table.append((about, values[OURS], values["PEFT"]))
    return table


def _folded(title: str, *parts: str) -> str:
    return "\n\n".join([f'<details markdown="1"><summary>{title}</summary>', *parts, "</details>"])


def _when(row: Mapping[str, Any]) -> str:
    return f"{row['date']}, {row['threads']}, load {row['load']:.1f}"


def _times(rows: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one line for each case and way of ours, with the peers that did the same."""
    table = [("row", "case", "unit", OURS, *PEERS, "error")]
    for name, row in rows.items():
        found = {(ln.case, ln.metric, ln.variant): ln.mid for ln in lines_of(row)}
        controls = [ln for ln in lines_of(row) if ln.variant == AGAIN]
        errors = {(ln.case, ln.metric): noise_of(ln) for ln in controls}
        for (case, unit, variant), value in found.items():
            ours, _, way = variant.partition(", ")
            if unit not in UNITS or ours != OURS or way in ONLY_JSON:
                continue
            same = [found.get((case, unit, f"{peer}, {way}")) for peer in PEERS]
            plain = [found.get((case, unit, peer)) for peer in PEERS]
            others = same[1:] if any(same[1:]) else plain[1:]
            peers = [same[0] or plain[0], *others]
            numbers = (value, *peers, errors.get((case, unit)))
            cells = ("" if one is None else number(one) for one in numbers)
            table.append((name, f"{case}; {way}" if way else case, unit, *cells))
    return table


def _tables(row: Mapping[str, Any]) -> list[str]:
    """Return one table for each number: cases in rows, variants in columns."""
    by_metric: dict[str, list[Line]] = {}
    for line in lines_of(row):
        by_metric.setdefault(line.metric, []).append(line)
    found = []
    for metric, lines in by_metric.items():
        variants, cases = (
            list(dict.fromkeys(x))
            for x in zip(*((ln.variant, ln.case) for ln in lines), strict=True)
        )
        cells = {(ln.case, ln.variant): number(ln.mid) for ln in lines}
        table = [(metric, *variants)]
        table += [(case, *(cells.get((case, v), "") for v in variants)) for case in cases]
        found.append(markdown(table))
    return found


def picture(rows: Mapping[str, Any], path: Path) -> None:
    """Draw what an adapter adds to the time of the same work without one, compared with PEFT."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "", "font.size": 9})
    # As wide as a phone shows it at the size of its text: what a line is about stands above it.
    figure, axis = plt.subplots(figsize=(4.4, 0.62 * len(BARS) + 0.9), layout="constrained")
    for y, (about, name, case, way) in enumerate(reversed(BARS)):
        # The ratios of a case are all to its floor; less than a percent is noise.
        found = {
            ln.variant: ln.mid for ln in lines_of(rows[name]) if ln.case == case and _ratio(ln)
        }
        ours, peer = (max(100 * (found[who + way] - 1), 1.0) for who in (OURS, "PEFT"))
        axis.plot([ours, peer], [y, y], color="#b0b6c3", linewidth=2, zorder=1)
        axis.scatter([peer], [y], color="#8a8f99", s=42, label="PEFT" if y == 0 else None)
        axis.scatter([ours], [y], color="#3949ab", s=42, label=OURS if y == 0 else None)
        higher, lower = sorted((ours, peer), reverse=True)
        axis.annotate(f"{higher:.0f}", (higher, y), (7, -3.5), textcoords="offset points")
        axis.annotate(
            f"{lower:.0f}", (lower, y), (-7, -3.5), textcoords="offset points", ha="right"
        )
        axis.annotate(about, (1.4, y), (0, 8), textcoords="offset points", fontweight="bold")
    axis.set_yticks([])
    axis.set(xscale="log", xlabel="% that an adapter adds to the time (log scale)")
    axis.set_xlim(1.4, 1500)
    axis.set_xticks([2, 10, 100, 1000], ["2", "10", "100", "1000"])
    axis.set_ylim(-0.5, len(BARS) - 0.4)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _ratio(line: Line) -> bool:
    return line.metric in UNITS[:3]

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

from benchmarks.measure import Line, Result, noise_of, verdict

PACKAGES = ("lora-inject", "torch", "transformers", "peft", "loralib", "safetensors")
# What stands below this line in the document is written by hand, and kept.
BY_HAND = "<!-- Below this line: written by hand, kept by scripts/bench.py -->"


def machine(device: str) -> dict[str, Any]:
    """Say where the numbers come from."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
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
    return verdict(line, noise_of(line, same[0]) if same else 0.0)


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
    """Return docs/performance.md: a table for each number of each row, then what is by hand."""
    here = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items())
    where = (
        f"Machine: {here.get('gpu', here['processor'])}, {here['cores']} cores, "
        f"{here['memory_gib']} GiB, {here['capability']}. Python {here['python']}, {versions}."
    )
    if raw is not None:
        relative = os.path.relpath(raw, path.parent)
        where += f" All numbers: [{raw.name}]({relative})."
    parts = ["# Performance", method, where]
    for name, row in found["rows"].items():
        parts += [f"## {name}", _about(row), *_tables(row), *row["notes"]]
    parts += ["## What is judged", markdown(summary(found["rows"]))]
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    by_hand = old.split(BY_HAND, 1)[1].strip() if BY_HAND in old else ""
    return "\n\n".join([*parts, BY_HAND, *([by_hand] if by_hand else [])]) + "\n"


def _about(row: Mapping[str, Any]) -> str:
    title = row["title"].rstrip(".")
    return (
        f"{title}. ({row['date']}, {row['threads']}, {row['clock']} time, load {row['load']:.1f})"
    )


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


def plots(rows: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw one PNG for each row: a bar for each variant, its range, and the target."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, row in rows.items():
        groups: dict[tuple[str, str], list[Line]] = {}
        for line in lines_of(row):
            groups.setdefault((line.case, line.metric), []).append(line)
        wide = {key: lines for key, lines in groups.items() if len(lines) > 1}
        if not wide:
            continue
        heights = [len(lines) for lines in wide.values()]
        figure, axes = plt.subplots(
            len(wide),
            1,
            figsize=(8, 1.0 * len(wide) + 0.32 * sum(heights)),
            squeeze=False,
            gridspec_kw={"height_ratios": heights},
            layout="constrained",
        )
        for ((case, metric), lines), axis in zip(wide.items(), axes[:, 0], strict=True):
            _bars(axis, case, metric, lines)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        made.append(path)
    return made


def _bars(axis: Any, case: str, metric: str, lines: Sequence[Line]) -> None:
    lines = list(reversed(lines))
    middle = [line.mid for line in lines]
    reach = [
        [line.mid - line.low for line in lines],
        [line.high - line.mid for line in lines],
    ]
    names = [line.variant for line in lines]
    axis.barh(names, middle, xerr=reach, color="#7a9cc6", ecolor="#333333")
    for target in {line.target for line in lines if line.target is not None}:
        axis.axvline(target, color="#b03a2e", linestyle="--", linewidth=1)
    if metric.startswith("time / "):
        axis.axvline(1.0, color="#333333", linewidth=0.8)
        axis.set_xlim(left=min(0.9, *[line.low for line in lines]))
    axis.set_title(f"{case} ({metric})", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)

"""The main job on real input: plan, inject, train, save, load, merge, and check every step.

A stage is a command of its own with one product, and its record (what it depended on, how
long it took, how much memory it needed, what it found) is written last. A stage whose record still
fits is reused; without one it is done again from nothing. So the demo may be stopped at any moment
and started again: finished stages are kept, an interrupted training starts over.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import smollm2
from demo_files import DemoError, digest, discard, folder_bytes, write_json
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
CONFIG = Path("configs/smollm2_135m.yaml")
FREE_BYTES = 2 * 10**9  # two checkpoints of 538 MB, one of them twice for a moment

ADAPTED_BOUND = 0.8  # adapted perplexity over that of the base
ROUNDING_BOUND = 2e-4  # nats, merged against adapted, the worst target token (float32)

console = Console()


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: Name of its record.
        title: What it does, as the heading.
        command: What to run, without the interpreter: `("stages", ...)` or `("lora-inject", ...)`.
        after: Names of the stages whose products it reads.
        product: What it writes, or None.
        injects: Whether it runs code of lora_inject, so that a change of that makes it run again.
    """

    name: str
    title: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    product: Path | None = None
    injects: bool = False


@dataclass(frozen=True)
class Record:
    """What a finished stage left behind.

    Attributes:
        key: Digest of all that it depended on.
        seconds: Wall time.
        peak_bytes: Peak resident memory of its process.
        result: What it found.
        reused: Whether an earlier run of the demo did it.
    """

    key: str
    seconds: float
    peak_bytes: int
    result: dict[str, Any]
    reused: bool = False


def stages(args: argparse.Namespace) -> list[Stage]:
    """All stages in their order."""
    out = args.out
    base, pairs, adapter, merged = (out / n for n in ("base", "pairs.json", "adapter", "merged"))

    def measure(model: Path, *options: str) -> tuple[str, ...]:
        held_out = ("--pairs", str(pairs), "--n-pairs", str(args.n_pairs))
        return ("stages", "measure", "--model", str(model), *held_out, *options)

    learn = ("--pairs", str(pairs), "--config", str(args.config), "--steps", str(args.steps))
    learn += ("--minutes", f"{args.minutes:g}", "--lr", f"{args.lr:g}")
    return [
        Stage(
            "base",
            "Base: SmolLM2-135M-Instruct out of its GGUF file",
            ("stages", "base", "--output", str(base)),
            product=base,
        ),
        Stage(
            "pairs",
            "Data: a function's code, and what its docstring says",
            ("stages", "pairs", "--output", str(pairs)),
            product=pairs,
        ),
        Stage(
            "plan",
            "Plan: what the config means for this model",
            ("lora-inject", "plan", str(args.config), str(base)),
            after=("base",),
            injects=True,
        ),
        Stage(
            "before",
            "Before: the base, with the prompt alone",
            measure(base, "--shots"),
            after=("base", "pairs"),
        ),
        Stage(
            "train",
            "Train: inject, loss on the target tokens only, save",
            ("stages", "train", "--base", str(base), *learn, "--output", str(adapter)),
            after=("base", "pairs"),
            product=adapter,
            injects=True,
        ),
        Stage(
            "adapted",
            "Adapted: the adapter, loaded into a fresh model",
            measure(base, "--adapter", str(adapter)),
            after=("base", "pairs", "train"),
            injects=True,
        ),
        Stage(
            "merge",
            "Merge: fold the adapter into the checkpoint, on disk",
            ("lora-inject", "merge", str(base), str(adapter), "--output", str(merged)),
            after=("base", "train"),
            product=merged,
            injects=True,
        ),
        Stage(
            "merged",
            "Merged: loaded by plain transformers alone",
            measure(merged, "--compare", str(base)),
            after=("base", "pairs", "merge"),
        ),
    ]


# --------------------------------------------------------------------------------------- running


def run_all(todo: Sequence[Stage], out: Path, shared: str) -> dict[str, Record]:
    """Run or reuse every stage.

    Args:
        todo: The stages in order.
        out: Where products and records are.
        shared: Digest of what every stage depends on.
    """
    records: dict[str, Record] = {}
    package = digest((REPO / "lora_inject").rglob("*.py"))
    for number, stage in enumerate(todo, 1):
        console.rule(f"[bold]{number}/{len(todo)}[/]  {stage.title}", align="left")
        upstream = [records[name].key for name in stage.after]
        key = digest([], shared, *stage.command, *upstream, package if stage.injects else "")
        records[stage.name] = reuse(stage, out, key) or run(stage, out, key)
    return records


def reuse(stage: Stage, out: Path, key: str) -> Record | None:
    """The record of an earlier run, if all that the stage depends on is as it was."""
    path = out / "records" / f"{stage.name}.json"
    if not path.is_file() or (stage.product and not stage.product.exists()):
        return None
    record = Record(**json.loads(path.read_text(encoding="utf-8")), reused=True)
    if record.key != key:
        return None
    console.print(f"[dim]done before, in {record.seconds:.0f} s[/]")
    return record


def run(stage: Stage, out: Path, key: str) -> Record:
    """Run a stage in a process of its own, and write its record last."""
    path = out / "records" / f"{stage.name}.json"
    result = out / "records" / f"{stage.name}.result"
    for old in (path, result, stage.product):
        if old is not None:
            discard(old)
    if stage.command[0] == "lora-inject":
        console.print(
            f"$ {shlex.join(stage.command)}", style="bold green", markup=False, highlight=False
        )
        argv = [sys.executable, "-m", "lora_inject", *stage.command[1:]]
    else:
        script = str(HERE / "demo_stages.py")
        argv = [sys.executable, script, "--result", str(result), *stage.command[1:]]
    start = time.perf_counter()
    try:
        peak_bytes = wait(stage, argv)
    except BaseException:
        if stage.product:
            discard(stage.product)
        raise
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    record = Record(key, time.perf_counter() - start, peak_bytes, found)
    kept = {name: getattr(record, name) for name in ("key", "seconds", "peak_bytes", "result")}
    write_json(path, kept)
    discard(result)
    return record


def wait(stage: Stage, argv: list[str]) -> int:
    """Run a command to its end; return its peak resident memory in bytes.

    Raises:
        DemoError: It failed.
        KeyboardInterrupt: The user stopped the demo; the command is gone by then.
    """
    # threads that wait asleep: beside other work, ones that spin cost 3 to 5 times the time
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    # a group of its own: Ctrl-C reaches the demo alone; open files: it holds the lock, too
    process = subprocess.Popen(argv, cwd=REPO, env=environment, process_group=0, close_fds=False)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        end(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGKILL:
        raise DemoError(
            f"stage {stage.name!r}",
            "its process was killed, most likely because memory ran out",
            "About 3 GB must be free",
        )
    if process.returncode:
        found = f"its command ended with exit code {process.returncode}"
        raise DemoError(f"stage {stage.name!r}", found, "The reason is printed above")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a command at once; it may be stopped anywhere, as nobody uses what it leaves."""
    process.terminate()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    console.show_cursor()  # a progress bar hides it


# --------------------------------------------------------------------------------------- results


def check(records: dict[str, Record]) -> list[tuple[bool, str, str]]:
    """Everything that must hold: whether it does, what it is, and what was found."""
    before, adapted, merged = (records[n].result for n in ("before", "adapted", "merged"))
    ratio = adapted["perplexity"] / before["perplexity"]
    apart = max(
        abs(a - b)
        for one, other in zip(adapted["log_probs"], merged["log_probs"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    n_changed, n_sites = len(merged["changed"]), len(records["train"].result["weights"])
    right = sorted(records["train"].result["weights"]) == merged["changed"]
    return [
        (
            ratio < ADAPTED_BOUND,
            f"adapted below {ADAPTED_BOUND} of before",
            f"{ratio:.3f}",
        ),
        (
            apart < ROUNDING_BOUND,
            "merged equals adapted within rounding",
            f"{apart:.0e} nats at worst, bound {ROUNDING_BOUND:g}",
        ),
        (
            right,
            "merging changed the adapted weights only",
            f"{n_changed} tensors, {n_sites} sites",
        ),
        (
            adapted["disabled_is_base"],
            "disabled(model) is the base",
            "one batch of logits, bit for bit",
        ),
        (
            merged["without_lora_inject"] and before["without_lora_inject"],
            "before and merged are plain transformers",
            "lora_inject not imported",
        ),
    ]


def generations(records: dict[str, Record]) -> Group:
    """A few functions of held-out modules, and what each model says of them."""
    names = ("before", "adapted", "merged")
    shown: list[Any] = []
    columns = [records[name].result["generations"] for name in names]
    for rows in zip(*columns, strict=True):
        said = Table.grid(padding=(0, 2))
        said.add_row("[dim]human[/]", Text(rows[0]["human"], "dim"))
        for name, style, row in zip(
            ("base", *names[1:]), ("red", "green", "green"), rows, strict=True
        ):
            said.add_row(name, Text(row["model"] or "(nothing)", style))
        code = Syntax(rows[0]["code"], "python", theme="ansi_dark", word_wrap=True)
        title = f"[dim]{rows[0]['module']}[/]"
        shown.append(Panel(Group(code, "", said), title=title, title_align="left"))
    return Group(*shown)


def curve(values: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Draw a series with block characters, each column the mean of its share of the values.

    Args:
        values: At least one number.
        width: Columns at most.
        height: Lines.
    """
    width = min(width, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]  # no column is empty
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    eighths = [round(8 + (height * 8 - 8) * (m - low) / ((high - low) or 1)) for m in means]
    lines = []
    for line in reversed(range(height)):
        bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, e - 8 * line))] for e in eighths)
        label = {height - 1: f"{high:.2f}", 0: f"{low:.2f}"}.get(line, "")
        lines.append(f"{label:>6} {bars}")
    return "\n".join(lines)


def show(todo: Sequence[Stage], records: dict[str, Record], out: Path) -> bool:
    """Print what came out, one summary table last; return whether every check holds."""
    trained = records["train"].result
    console.rule("[bold]Results[/]", align="left")
    console.print(generations(records))
    steps = len(trained["losses"])
    console.print(f"\n[bold]Training loss[/], nats per target token, {steps} steps")
    console.print(curve(trained["losses"]), style="cyan", highlight=False)
    console.print(costs(todo, records))
    console.print(summary(records, out))
    checks = check(records)
    for good, what, found in checks:
        mark = "[green]ok  [/]" if good else "[red bold]FAIL[/]"
        console.print(f"{mark} {what}: [bold]{found}[/]", highlight=False)
    return all(good for good, _, _ in checks)


def costs(todo: Sequence[Stage], records: dict[str, Record]) -> Table:
    """Time and memory of each stage."""
    table = Table(title="Stages", title_justify="left", title_style="bold")
    for name in ("stage", "seconds", "peak memory", ""):
        table.add_column(name, justify="left" if name in ("stage", "") else "right")
    for stage in todo:
        record = records[stage.name]
        peak = f"{record.peak_bytes / 1e9:.2f} GB"
        note = "reused" if record.reused else ""
        table.add_row(stage.name, f"{record.seconds:.1f}", peak, f"[dim]{note}[/]")
    total = sum(record.seconds for record in records.values())
    most = max(record.peak_bytes for record in records.values())
    table.add_section()
    table.add_row("all", f"{total:.1f}", f"{most / 1e9:.2f} GB", f"{total / 60:.1f} min")
    return table


def summary(records: dict[str, Record], out: Path) -> Table:
    """Perplexities and sizes."""
    before, adapted, merged = (records[n].result for n in ("before", "adapted", "merged"))
    full, small = folder_bytes(out / "base"), folder_bytes(out / "adapter")
    n_trained, n_base = (records["train"].result[n] for n in ("n_trained", "n_base"))
    caption = (
        f"{before['n_pairs']} pairs of modules never trained on, {before['n_tokens']:,} target "
        f"tokens. The adapter: {n_trained:,} of {n_base:,} parameters ({n_trained / n_base:.2%}), "
        f"{full / small:.0f} times smaller on disk than a checkpoint."
    )
    table = Table(title="Summary", title_justify="left", title_style="bold", caption=caption)
    table.caption_justify = "left"
    for name in ("model", "perplexity", "of before", "better on", "on disk"):
        table.add_column(name, justify="left" if name == "model" else "right")

    def row(name: str, value: float, result: dict[str, Any] | None, n_bytes: int | None) -> None:
        wins = "" if result is None else f"{better(before, result)} of {result['n_pairs']}"
        share = f"{value / before['perplexity']:.3f}"
        table.add_row(
            name, f"{value:.2f}", share, wins, f"{n_bytes / 1e6:.1f} MB" if n_bytes else ""
        )

    row("before: prompt alone", before["perplexity"], None, full)
    row("before: 4 examples ahead", before["with_shots"], None, None)
    row("adapted: base and adapter", adapted["perplexity"], adapted, small)
    merged_bytes = folder_bytes(out / "merged")
    row("merged: plain transformers", merged["perplexity"], merged, merged_bytes)
    return table


def better(before: dict[str, Any], after: dict[str, Any]) -> int:
    """On how many pairs the target became more probable."""
    both = zip(before["log_probs"], after["log_probs"], strict=True)
    return sum(sum(new) > sum(old) for old, new in both)


# ------------------------------------------------------------------------------------------ main


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a lock on the folder, which goes with this process and its command, however they end.

    Raises:
        DemoError: Another demo works in the same folder.
    """
    (out / "records").mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = "another demo is running there"
            raise DemoError(f"folder {out}", found, "Wait for it, or give another --out") from error
        os.set_inheritable(file.fileno(), True)
        clear(out)
        try:
            yield
        finally:
            clear(out)


def clear(out: Path) -> None:
    """Remove what a stopped stage has begun to write."""
    for partial in (*out.glob("*.partial"), *out.glob("records/*.partial")):
        discard(partial)


def forget(out: Path) -> None:
    """Remove what the demo writes, and nothing else that may lie in the folder."""
    for name in ("records", "base", "pairs.json", "adapter", "merged"):
        discard(out / name)
    (out / "records").mkdir()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 steps, 32 held-out pairs")
    parser.add_argument("--steps", type=int, help="training steps of 8 pairs (64)")
    parser.add_argument(
        "--minutes", type=float, default=4, help="train no longer than this (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="adapter config (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="work folder (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="reuse nothing of earlier runs")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be 1 or more")
    if not args.minutes > 0:
        parser.error("--minutes must be above 0")
    args.steps = args.steps or (20 if args.quick else 64)
    args.n_pairs = 32 if args.quick else 96
    return args


def demo(args: argparse.Namespace) -> int:
    """Run the demo; return the exit code."""
    if not args.config.is_file():
        raise DemoError(f"--config {args.config}", "there is no such file", "See configs/")
    with alone(args.out):
        if args.fresh:
            forget(args.out)
        gguf = smollm2.find()
        if not (args.out / "merged").exists() and shutil.disk_usage(args.out).free < FREE_BYTES:
            raise DemoError(f"folder {args.out}", "the disk has less than 2 GB left", "Free some")
        console.print(
            f"{gguf.name}: SHA-256 as expected ({smollm2.SHA256[:12]}...)", highlight=False
        )
        sources = [HERE / f"{n}.py" for n in ("demo_stages", "objective", "pairs", "smollm2")]
        versions = [f"{n} {version(n)}" for n in ("torch", "transformers", "gguf")]
        shared = digest([*sources, args.config], smollm2.SHA256, sys.version, *versions)
        todo = stages(args)
        records = run_all(todo, args.out, shared)
        if not show(todo, records, args.out):
            console.print("[red bold]error:[/] a check failed; see above", highlight=False)
            return 1
        console.print(f"everything is in {args.out}: base, adapter, merged", style="dim")
        return 0


def main() -> int:
    """Run the demo and turn the ways it can end into exit codes."""
    for stop in (signal.SIGTERM, signal.SIGHUP):  # stopping is stopping; nohup ignores the second
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, signal.default_int_handler)
    try:
        return demo(parse())
    except DemoError as error:
        console.print(f"[red bold]error:[/] {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print(
            "\n[yellow]stopped.[/] Finished stages are kept; start the demo again to go on."
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())

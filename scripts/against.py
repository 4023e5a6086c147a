"""What one decoded token costs here, and in another checkout of the package: both in turn.

    python scripts/against.py /path/of/another/checkout
    python scripts/against.py /path/of/another/checkout --rounds 200 --widths 768 --layers 4

A stack whose weights fit into the cache of a core is less disturbed by what else runs.

Each checkout runs in a process of its own with the same torch. The two take turns, a few
milliseconds at a time, so that what else the machine does meets both. A line shows the time of a
layer in microseconds, least, median and largest of the rounds: that of a plain stack of linear
layers, that with an adapter, and their difference, which is what the adapter adds. The last column
is ours over theirs, of the least times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK, CALLS = 8, 10
HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    """Compare, or serve as the process of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the root of another checkout")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.widths, args.layers)
        return
    checkouts = {"here": HERE, "there": args.other.resolve()}
    workers = {name: start(root, args.widths, args.layers) for name, root in checkouts.items()}
    for width in args.widths:
        times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
        for n in range(args.rounds):
            order = list(workers) if n % 2 else list(workers)[::-1]
            for name in order:
                for what, seconds in ask(workers[name], width).items():
                    times[name].setdefault(what, []).append(1e6 * seconds)
        print(f"width {width}, one token, {args.layers} layers, microseconds a layer")
        show(times)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def show(times: dict[str, dict[str, list[float]]]) -> None:
    """Print what was measured at one width."""
    for of_one in times.values():
        pairs = zip(of_one["adapted"], of_one["plain"], strict=True)
        of_one["added"] = [adapted - plain for adapted, plain in pairs]
    for what in ("plain", "adapted", "added"):
        cells = []
        least = {name: min(of_one[what]) for name, of_one in times.items()}
        if what == "added":  # of the least times: a difference of two rounds may be noise
            least = {n: min(one["adapted"]) - min(one["plain"]) for n, one in times.items()}
        for name, of_one in times.items():
            many = of_one[what]
            cells.append(
                f"{name} {least[name]:6.2f} {statistics.median(many):6.2f} {max(many):7.2f}"
            )
        print(f"  {what:8} {'   '.join(cells)}   {least['here'] / least['there']:.2f}")


# ------------------------------------------------------------------------------ of one checkout


def start(root: Path, widths: list[int], layers: int) -> Any:
    """Start the process of a checkout."""
    command = [sys.executable, __file__, str(root), "--serve", "--layers", str(layers)]
    command += ["--widths", *map(str, widths)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert worker.stdout is not None
    where = worker.stdout.readline().strip()
    if Path(where) != root:
        raise SystemExit(f"asked for the package of '{root}', found that of '{where}'")
    return worker


def ask(worker: Any, width: int) -> dict[str, float]:
    """Return the seconds of a layer, in one round of a process."""
    worker.stdin.write(f"{width}\n")
    worker.stdin.flush()
    answer: dict[str, float] = json.loads(worker.stdout.readline())
    return answer


def serve(widths: list[int], layers: int) -> None:
    """Time a round for each width that is asked for."""
    import torch
    from torch import nn

    import lora_inject

    torch.set_num_threads(1)
    stacks = {}
    for width in widths:
        torch.manual_seed(0)
        plain, adapted = (
            nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).eval()
            for _ in range(2)
        )
        lora_inject.inject(adapted, {"rank": RANK, "targets": [r"\d+"]})
        stacks[width] = {"plain": plain, "adapted": adapted}, torch.randn(1, 1, width)
    print(Path(lora_inject.__file__).resolve().parent.parent, flush=True)
    for line in sys.stdin:
        both, x = stacks[int(line)]
        print(json.dumps({name: seconds(stack, x) for name, stack in both.items()}), flush=True)


def seconds(stack: Any, x: Any) -> float:
    """Return the least time of a layer among a few calls of a stack."""
    import torch

    best = float("inf")
    with torch.no_grad():
        for _ in range(CALLS):
            begin = time.perf_counter()
            stack(x)
            best = min(best, time.perf_counter() - begin)
    return best / len(stack)


if __name__ == "__main__":
    main()

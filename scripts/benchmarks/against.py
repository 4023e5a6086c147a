"""Compare the verbs and a decoded token of two source trees, in turn on one machine.

    python scripts/benchmarks/against.py OTHER_TREE [--sites 20176] [--rounds 7]

Each run is a process of its own that imports one of the trees; runs alternate. Times are those of
the process, since others may use the machine. The ratio of the minima is the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[2]
RUN = r"""
import json, sys, time
start = time.process_time()
import torch
from torch import nn
torch_alone = time.process_time() - start
n_sites = int(sys.argv[1])
torch.set_num_threads(1)
import lora_inject as li

def timed(run):
    start = time.process_time()
    run()
    return time.process_time() - start

def linears(n, width):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(n)])

def decode(width, n_layers=24, rounds=200):
    plain, adapted = linears(n_layers, width).eval(), linears(n_layers, width).eval()
    li.inject(adapted, config)
    x = torch.randn(1, 1, width)
    with torch.no_grad():
        times = [[timed(lambda: net(x)) for net in (plain, adapted)] for _ in range(rounds)]
    without, with_adapter = map(min, zip(*times))
    return (with_adapter - without) / n_layers * 1e6

config = {"rank": 2, "targets": [r"\d+"]}
li.inject(linears(4, 4), config)
first = time.process_time() - start
model, small = linears(n_sites, 4), linears(n_sites // 4, 4)
times = {
    "import torch and first inject, over import torch": first / torch_alone,
    f"inject, {n_sites:,} sites": timed(lambda: li.inject(model, config)),
}
li.inject(small, config)
state = li.adapter_state(small)
times |= {
    f"second adapter, {n_sites // 4:,} sites": timed(lambda: li.install(small, state, "b")),
    f"plan, {n_sites // 4:,} sites": timed(lambda: li.plan(linears(n_sites // 4, 4), config)),
} | {f"decode at width {n}, us a layer over nn.Linear": decode(n) for n in (64, 768)}
print(json.dumps(times))
"""


def run(tree: Path, n_sites: int) -> dict[str, float]:
    """Return the times of one process that imports the package from a tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(n_sites)]
    done = subprocess.run(command, env=env, cwd="/", stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--sites", type=int, default=20_176)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    trees = (HERE, options.other.resolve())
    runs = [[run(tree, options.sites) for tree in trees] for _ in range(options.rounds)]
    print(f"here, there (min, median, max) and the ratio of minima; {options.rounds} rounds")
    for case in runs[0][0]:
        here, there = ([pair[i][case] for pair in runs] for i in range(2))
        cells = [f"{min(t):.3f} {median(t):.3f} {max(t):.3f}" for t in (here, there)]
        print(f"{case:50} {cells[0]:24} {cells[1]:24} {min(here) / min(there):.2f}")


if __name__ == "__main__":
    main()

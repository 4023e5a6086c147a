"""Compare the verbs and a decoded token of two source trees, in turn on one machine.

The model has the names of a mixture of 128 experts: 52 layers are 20,176 sites.

    python scripts/benchmarks/against.py OTHER_TREE [--layers 52] [--rounds 7]

Each run is a process of its own that imports one of the trees; runs alternate. Times are those of
the process, since others may use the machine. The ratio of the minima is the figure. Sources are
compiled in the first round, as those of an installed package are.
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
import json, sys, tempfile, time
start = time.process_time()
import torch
from torch import nn
torch_alone = time.process_time() - start
n_layers = int(sys.argv[1])
torch.set_num_threads(1)
import lora_inject as li

def timed(run):
    start = time.process_time()
    run()
    return time.process_time() - start

def tree(names, width=32):
    root = nn.Module()
    for name in names:
        module, (*parents, last) = root, name.split(".")
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.add_module(last, nn.Linear(width, width, bias=False))
    return root

def mixture(n_layers):
    attention = [f"self_attn.{n}_proj" for n in "qkvo"]
    experts = [f"mlp.experts.{i}.{n}_proj" for i in range(128) for n in ("gate", "up", "down")]
    layers = range(n_layers)
    return tree(f"model.layers.{i}.{name}" for i in layers for name in (*attention, *experts))

def decode(width, n_layers=24, rounds=200):
    nets = (nn.Sequential(*[nn.Linear(width, width) for _ in range(n_layers)]) for _ in range(2))
    plain, adapted = (net.eval() for net in nets)
    li.inject(adapted, {"rank": 2, "targets": [r"\d+"]})
    x = torch.randn(1, 1, width)
    with torch.no_grad():
        times = [[timed(lambda: net(x)) for net in (plain, adapted)] for _ in range(rounds)]
    without, with_adapter = map(min, zip(*times))
    return (with_adapter - without) / n_layers * 1e6

config = {
    "rank": 2,
    "targets": [
        r"self_attn\.(q_proj|k_proj|v_proj|o_proj)",
        r"mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)",
    ],
}
li.inject(mixture(1), config)
first = time.process_time() - start
n_quarter = n_layers // 4
times = {"import torch and first inject, over import torch": first / torch_alone}
for n_layers in (n_layers, n_quarter, 2):  # one model at a time, as an injected one knows of others
    model, n_sites = mixture(n_layers), f"{388 * n_layers:,} sites"
    if n_layers != 2:
        times[f"plan, {n_sites}"] = timed(lambda: li.plan(model, config))
    times[f"inject, {n_sites}"] = timed(lambda: li.inject(model, config))
    if n_layers <= n_quarter:
        with tempfile.TemporaryDirectory() as folder:
            path = folder + "/a"
            times[f"save_adapter, {n_sites}"] = timed(lambda: li.save_adapter(model, path))
            for i, which in enumerate(("first", "again")):
                load = lambda: li.load_adapter(model, path, f"loaded{i}")
                times[f"load_adapter, {which}, {n_sites}"] = timed(load)
times |= {f"decode at width {n}, us a layer over nn.Linear": decode(n) for n in (64, 768)}
print(json.dumps(times))
"""


def run(tree: Path, n_layers: int) -> dict[str, float]:
    """Return the times of one process that imports the package from a tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", RUN, str(n_layers)]
    done = subprocess.run(
        command,
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--layers", type=int, default=52, help="388 sites each")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    trees = (HERE, options.other.resolve())
    runs = [[run(tree, options.layers) for tree in trees] for _ in range(options.rounds)]
    print(f"here, there (min, median, max) and the ratio of minima; {options.rounds} rounds")
    for case in runs[0][0]:
        here, there = ([pair[i][case] for pair in runs] for i in range(2))
        cells = [f"{min(t):.3f} {median(t):.3f} {max(t):.3f}" for t in (here, there)]
        print(f"{case:50} {cells[0]:24} {cells[1]:24} {min(here) / min(there):.2f}")


if __name__ == "__main__":
    main()

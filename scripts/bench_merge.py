"""How fast and how small merging a checkpoint is, compared with PEFT's own path and a plain copy.

    python scripts/bench_merge.py [--size 1.3] [--rounds 3] [--folder bench-merge]

Makes a Llama of random bfloat16 weights of about so many GB and a LoRA adapter on all of its
projections, runs each way of merging in a process of its own, in turn, and prints medians and their
spread as Markdown. The page cache is warm. What is spent waiting for the disk (fsync) is shown
apart, as neither PEFT nor cp waits for it. PEFT is left out above 4 GB: it holds the whole model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # size in GB: hidden, inner, layers, heads, key-value heads
    0.01: (64, 128, 2, 4, 2),
    0.3: (1024, 2816, 8, 8, 2),
    1.3: (1536, 4096, 22, 12, 2),
    8.0: (4096, 11008, 21, 32, 8),
}
MAKE = """
import sys, torch, transformers, lora_inject as li
hidden, inner, layers, heads, kv = map(int, sys.argv[2:7])
config = transformers.LlamaConfig(
    hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv, vocab_size=32000,
    tie_word_embeddings=False, dtype="bfloat16")
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
size = sum(p.nbytes for p in model.parameters())
model.save_pretrained(sys.argv[1] + "/base", max_shard_size=size // 3)
li.inject(model, {"rank": 16, "alpha": 32, "targets": [".*_proj"]})
for parameter in li.adapter_parameters(model).values():
    torch.nn.init.normal_(parameter, std=0.02)
li.save_adapter(model, sys.argv[1] + "/adapter")
"""
PEFT = """
import sys, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
"""
OURS = """
import os, runpy, sys, time
fsync = os.fsync
def timed(file):
    began = time.perf_counter()
    fsync(file)
    print("fsync", time.perf_counter() - began, file=sys.stderr)
os.fsync = timed
runpy.run_module("lora_inject", run_name="__main__")
"""


def timed(command: list[str]) -> dict[str, float]:
    """Run a command in a process of its own; return seconds and peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("\n".join([f"{command[:3]} failed", *said]))
    waited = sum(float(line.split()[1]) for line in said if line.startswith("fsync "))
    busy = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "busy": busy, "MiB": usage.ru_maxrss / 1024, "less": wall - waited}


def bench(folder: Path, size: float, rounds: int) -> None:
    """Run all ways of merging on one size, in turn, and print their table."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python, shape = sys.executable, map(str, SHAPES[size])
    # In a process of its own: what this one holds would count into every child's peak.
    subprocess.run([python, "-c", MAKE, str(folder), *shape], check=True)
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    ways = {
        "cp -r": ["cp", "-r", base, out],
        "import torch": [python, "-c", "import torch"],
        "lora_inject": [python, "-c", OURS, "merge", base, adapter, "-o", out],
        "PEFT": [python, "-c", PEFT, base, adapter, out],
    }
    if size > 4:
        del ways["PEFT"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what the one before left to write is not charged to the next
            for path in [*Path(base).iterdir()] * 2:  # so that it is in the page cache and stays
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            runs[name].append(timed(command))
    shutil.rmtree(folder)
    print(f"\n{size} GB of bfloat16, {rounds} rounds in turn; median [least - most]\n")
    print("| | seconds | without fsync | processor seconds | peak MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, found in runs.items():
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        walls = [row["wall"] for row in found]
        seconds = f"{middle['wall']:.2f} [{min(walls):.2f} - {max(walls):.2f}]"
        cells = (seconds, f"{middle['less']:.2f}", f"{middle['busy']:.2f}", f"{middle['MiB']:.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, action="append", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"))
    arguments = parser.parse_args()
    for size in arguments.size or [0.3, 1.3, 8.0]:
        bench((arguments.folder / str(size)).resolve(), size, arguments.rounds)


if __name__ == "__main__":
    main()

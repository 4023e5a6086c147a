"""How fast and how small merging a checkpoint is, compared with PEFT's own path and a plain copy.

Makes a Llama of random bfloat16 weights of each size asked for and a LoRA adapter on all of its
projections, then runs each way of merging in a process of its own, in turn, so that whatever else
the machine does affects all of them alike. Prints medians and their spread as Markdown.

    python scripts/bench_merge.py                               all sizes; needs 40 GB of disk
    python scripts/bench_merge.py --size 1.3 --rounds 5 --folder /tmp/bench
    python scripts/bench_merge.py --size 0.3 --size 8 --only lora_inject --only "cp -r"
    python scripts/bench_merge.py --json runs.json              every run as JSON too

The page cache is warm in every run. What is spent waiting for the disk (fsync) is shown apart, as
neither PEFT nor cp waits for it. PEFT is left out above 4 GB: it holds the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
VOCAB = 32000
SHARDS = 3
MOST_FOR_PEFT = 4.0
Runs = dict[str, list[dict[str, float]]]
"""Way of merging to its runs."""

PEFT = """
import sys
import torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size=sys.argv[4])
print("{}")
"""


def make_base(folder: Path, size: float) -> tuple[int, int]:
    """Write the checkpoint and the adapter; returns bytes and number of sites."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, heads, kv = SHAPES[size]
    width = kv * hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": VOCAB, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    g = torch.Generator().manual_seed(0)
    sites = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "lm_head.weight": (VOCAB, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    adapter = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, cols) in sites.items():
            shapes[f"{at}.{name}.weight"] = (rows, cols)
            key = f"base_model.model.{at}.{name}"
            adapter[f"{key}.lora_A.weight"] = torch.randn(16, cols, generator=g) / cols**0.5
            adapter[f"{key}.lora_B.weight"] = 0.02 * torch.randn(rows, 16, generator=g)
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(config))
    names, weight_map, total = sorted(shapes), {}, 0
    per_shard = -(-len(names) // SHARDS)
    for s in range(SHARDS):
        tensors = {
            n: (0.02 * torch.randn(shapes[n], generator=g)).bfloat16()
            for n in names[s * per_shard : (s + 1) * per_shard]
        }
        file = f"model-{s + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    leaves = [name.rpartition(".")[2] for name in sites]
    lora = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none"}
    lora |= {"task_type": "CAUSAL_LM", "target_modules": leaves}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    return total, len(adapter) // 2


def timed(command: list[str]) -> dict[str, float]:
    """Run a command in a process of its own; wall and processor seconds, peak memory, its words."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed")
    row = {"wall": wall, "user": usage.ru_utime, "sys": usage.ru_stime}
    row["rss"] = usage.ru_maxrss / 1024
    words = json.loads(said or "{}")
    row["fsync"] = words.pop("fsync_seconds", 0.0)
    return row | {key: value for key, value in words.items() if isinstance(value, int)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, action="append", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"))
    parser.add_argument("--only", action="append")
    parser.add_argument("--json", type=Path, help="file to write every run into")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        n_bytes, n_sites = make_base(arguments.make, arguments.size[0])
        print(json.dumps({"bytes": n_bytes, "sites": n_sites}))
        return
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}, load at the start {load}, {arguments.rounds} rounds in "
        "turn; median [least - most]."
    )
    runs = {size: bench(arguments, size) for size in arguments.size or [0.3, 1.3, 8.0]}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


def bench(arguments: argparse.Namespace, size: float) -> Runs:
    """Run all ways of merging on one size, in turn, and print their table."""
    folder = (arguments.folder / f"{size}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    # In a process of its own: what this one holds would count into every child's peak.
    made = timed([sys.executable, __file__, "--make", str(folder), "--size", str(size)])
    ways = commands(folder, int(made["bytes"]))
    if size > MOST_FOR_PEFT:
        del ways["PEFT"]
    if arguments.only:
        ways = {name: ways[name] for name in arguments.only if name in ways}
    runs: Runs = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, command in ways.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()  # what the one before left to write is not charged to the next
            warm(folder / "base")
            runs[name].append(timed(command))
    shutil.rmtree(folder)
    heading = f"{made['bytes'] / 1e9:.2f} GB of bfloat16 in {SHARDS} shards, {made['sites']} sites"
    print(f"\n## {heading}\n\n" + "\n".join(table(size, runs)), flush=True)
    return runs


def commands(folder: Path, n_bytes: int) -> dict[str, list[str]]:
    """Return each way of merging as a command."""
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    python = sys.executable
    return {
        "cp -r": ["cp", "-r", base, out],
        "import torch": [python, "-c", "import torch"],
        "lora_inject": [python, "-m", "lora_inject", "merge", base, adapter, "-o", out, "--json"],
        "PEFT": [python, "-c", PEFT, base, adapter, out, f"{n_bytes // 3_000_000}MB"],
    }


def warm(folder: Path) -> None:
    """Read all files of a folder twice, so that they are in the page cache and stay there."""
    for path in [*folder.iterdir()] * 2:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def table(size: float, runs: Runs) -> list[str]:
    """Return the runs of one size as lines of a Markdown table."""
    lines = ["| | seconds | without fsync | processor seconds | peak MiB | GB/s |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, found in runs.items():
        walls = [row["wall"] for row in found]
        seconds = statistics.median(row["wall"] - row["fsync"] for row in found)
        spread = f"{statistics.median(walls):.2f} [{min(walls):.2f} - {max(walls):.2f}]"
        busy = statistics.median(row["user"] + row["sys"] for row in found)
        rate = "" if name == "import torch" else f"{size / seconds:.2f}"
        peak = max(row["rss"] for row in found)
        lines.append(f"| {name} | {spread} | {seconds:.2f} | {busy:.2f} | {peak:.0f} | {rate} |")
    return lines


if __name__ == "__main__":
    main()

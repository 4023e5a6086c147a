"""The main job on real input: plan, inject, train, save, load, merge, and check every step."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost other work much
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from data import pairs, smollm2
from data.packaged import refusal, write_json
from data.pairs import Example, Pair
from demo_options import parse
from demo_page import Said, draw_loss, draw_sizes, nearest, write_page
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

BATCH = 8
MAX_TOKENS = 160  # of a pair; what is longer is left out
SHOWN_CHARS = 240  # of a function that is shown
N_SAID = 8  # functions that each model puts into words
ADAPTED_BOUND = 0.8  # adapted perplexity over that of the base
ROUNDING_BOUND = 2e-4  # nats, merged against adapted, the worst target token (float32)


def demo(args: argparse.Namespace) -> bool:
    """Run everything; return whether every check holds."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    base, adapter, merged = (out / name for name in ("base", "adapter", "merged"))
    print("\n== Base: SmolLM2-135M-Instruct out of its GGUF file, float32", flush=True)
    if not base.exists():
        print(f"perplexity {smollm2.save(smollm2.find(), base):.2f} on two sentences about Paris")
    print("\n== Data: a function's code, and what its docstring says", flush=True)
    split = pairs.collect()
    print(f"{len(split.train):,} pairs to train on, {len(split.held_out):,} of other modules")
    print(f"{split.held_out[0].code}\n  -> {split.held_out[0].summary}")
    print("\n== Plan: what the config means for this model", flush=True)
    command("lora-inject", "plan", args.config, base)
    print("\n== Before: the base by plain transformers", flush=True)
    before = in_a_process(base, out / "before.json", args.pairs)
    print("\n== Train: inject, loss on the target's tokens only, save", flush=True)
    run = train(args, base, adapter, split.train)
    print("\n== Adapted: the adapter, loaded into a fresh model", flush=True)
    adapted = measure(base, args.pairs, adapter)
    print("\n== Merge: fold the adapter into the checkpoint, on disk", flush=True)
    shutil.rmtree(merged, ignore_errors=True)
    command("lora-inject", "merge", base, adapter, "--output", merged)
    print("\n== Merged: by plain transformers", flush=True)
    after = in_a_process(merged, out / "merged.json", args.pairs)
    print("\n== Look inside: what each layer learned", flush=True)
    pictures = out / "pictures"
    wanted = ("--base", base, "--report", out / "analysis.html", "--pictures", pictures)
    command("lora-inject", "analyze", adapter, *wanted)
    draw_loss(run.losses, pictures / "loss.png")
    draw_sizes(run.sizes, pictures / "layers.png")
    print("\n== Results")
    said = show_words(before, adapted)
    for name, measured in (("base", before), ("adapter", adapted), ("merged", after)):
        size = n_bytes(out / name) / 1e6
        print(f"{name:8} perplexity {measured['perplexity']:7.2f}  {size:7.1f} MB")
    holds = check(before, adapted, after, run.weights, out)
    tiles = [
        (f"{before['perplexity']:.1f}", "perplexity before"),
        (f"{adapted['perplexity']:.1f}", "perplexity after"),
        (f"{n_bytes(adapter) / 1e6:.1f} MB", f"adapter, of a base of {n_bytes(base) / 1e6:.0f} MB"),
        (f"{rounding(adapted, after):.0e}", "nats that merging cost, at the worst token"),
    ]
    shown = {"said": nearest(said), "n_asked": len(said)}
    write_page(out / "report.html", steps=args.steps, tiles=tiles, **shown)
    print(f"\nLook at {out / 'report.html'}, and at the pictures in {pictures}:")
    print(f"  {', '.join(sorted(file.name for file in pictures.iterdir()))}")
    return holds


class Run(NamedTuple):
    """What training left: the adapted weights' names, each step's loss, each update's size."""

    weights: list[str]
    losses: list[float]
    sizes: dict[str, list[float]]  # by kind of layer, from the first layer on: |D| / |W|


def train(args: argparse.Namespace, base: Path, adapter: Path, rows: Sequence[Pair]) -> Run:
    """Fine-tune the base, and save the adapter."""
    import lora_inject as li

    torch.manual_seed(0)
    model, tokenizer = load(base)
    li.inject(model, args.config)
    print(li.summary(model))
    examples = take(rows, tokenizer, args.steps * BATCH, ended=True)
    optimizer = torch.optim.AdamW(li.parameter_groups(model, lr=args.lr), weight_decay=0.01)
    # the paper's: linear up over a tenth of the steps, then down to nothing
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    losses, start = [], time.perf_counter()
    model.train()
    for step, batch in enumerate(pairs.batches(examples, BATCH), 1):
        tokens, labels = pairs.collate(batch, tokenizer.pad_token_id)
        loss = -pairs.target_log_probs(model, tokens, labels).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 8 == 0 or step == args.steps:
            left = (time.perf_counter() - start) * (args.steps - step) / step
            mean = fmean(losses[-8:])
            print(
                f"step {step:3d} of {args.steps}: loss {mean:.3f}, {left:3.0f} s to go", flush=True
            )
    li.save_adapter(model, adapter, overwrite=True)
    sites = li.adapter_state(model).sites
    sizes: dict[str, list[float]] = {}
    for name, site in sites.items():
        weight = model.get_parameter(site.spec.weight)
        size = site.scale * (site.B @ site.A).norm() / weight.norm()
        sizes.setdefault(name.rpartition(".")[2], []).append(float(size))
    return Run(sorted(site.spec.weight for site in sites.values()), losses, sizes)


def measure(folder: Path, n: int, adapter: Path | None = None) -> dict[str, Any]:
    """Perplexity of the held-out targets and a few generations, with an adapter or plain."""
    split = pairs.collect()
    model, tokenizer = load(folder)
    examples = take(split.held_out, tokenizer, n, ended=False)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        if adapter is not None:
            import lora_inject as li

            tokens = torch.tensor([examples[0].tokens])
            plain = model(tokens).logits
            li.load_adapter(model, adapter)
            with li.disabled(model):
                found["disabled_is_base"] = torch.equal(model(tokens).logits, plain)
        batches = (pairs.collate(batch, tokenizer.pad_token_id)
                   for batch in pairs.batches(examples, BATCH))  # fmt: skip
        scores = torch.cat([pairs.target_log_probs(model, *batch) for batch in batches]).double()
        small = [pair for pair in split.held_out if len(pair.code) <= SHOWN_CHARS][:N_SAID]
        found["said"] = [(p.code, p.summary, say(model, tokenizer, p)) for p in small]
    found |= {"perplexity": float((-scores.mean()).exp()), "log_probs": scores.tolist()}
    found["plain"] = "lora_inject" not in sys.modules
    print(f"perplexity of {len(scores):,} target tokens: {found['perplexity']:.2f}")
    return found


def say(model: Any, tokenizer: Any, pair: Pair) -> str:
    """The model's own summary of a function: greedy, up to the end of the line."""
    tokens = torch.tensor([tokenizer.encode(pairs.prompt_of(pair.code))])
    written = model.generate(tokens, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
    return str(text).strip().split("\n")[0].strip()


def take(found: Sequence[Pair], tokenizer: Any, n: int, *, ended: bool) -> list[Example]:
    """The first `n` pairs that are short enough, as tokens."""
    encoded = (pairs.encode(tokenizer, pair, ended) for pair in found)
    examples = list(islice((e for e in encoded if len(e.tokens) <= MAX_TOKENS), n))
    if len(examples) < n:
        raise refusal(f"{n} pairs", f"only {len(examples)} were found", "Ask for fewer --steps")
    return examples


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def show_words(before: Any, adapted: Any) -> list[Said]:
    """Print two of the functions in the words of human, base and adapter; return all of them."""
    both = zip(before["said"], adapted["said"], strict=True)
    said = [Said(*plain, tuned) for plain, (*_, tuned) in both]
    for row in nearest(said, 2):
        print(row.code)
        print(f"  human:   {row.human}\n  base:    {row.before}\n  adapted: {row.after}\n")
    return said


def rounding(adapted: Any, merged: Any) -> float:
    """The largest distance of a target token's log-probability, adapter and merged checkpoint."""
    scores = zip(adapted["log_probs"], merged["log_probs"], strict=True)
    return max(abs(a - b) for a, b in scores)


def n_bytes(folder: Path) -> int:
    """Size of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check(before: Any, adapted: Any, merged: Any, weights: list[str], out: Path) -> bool:
    """Print each check; return whether all hold."""
    ratio = adapted["perplexity"] / before["perplexity"]
    apart = rounding(adapted, merged)
    plain, folded = (load_file(out / name / "model.safetensors") for name in ("base", "merged"))
    moved = sorted(n for n in folded if n not in plain or not plain[n].equal(folded[n]))
    checks = [
        (ratio < ADAPTED_BOUND, f"adapted below {ADAPTED_BOUND} of before: {ratio:.3f}"),
        (apart < ROUNDING_BOUND, f"merged equals adapted within rounding: {apart:.0e} nats"),
        (moved == weights, f"merging changed the {len(moved)} adapted weights only"),
        (adapted["disabled_is_base"], "disabled(model) is the base, bit for bit"),
        (before["plain"] and merged["plain"], "before and merged never imported lora_inject"),
    ]
    for good, what in checks:
        print(f"{'ok  ' if good else 'FAIL'} {what}")
    return all(good for good, _ in checks)


def command(*words: object) -> None:
    """Run a command of the package as a user would."""
    print(f"$ {shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "lora_inject", *map(str, words[1:])], check=True)


def in_a_process(folder: Path, result: Path, n: int) -> dict[str, Any]:
    """Measure a checkpoint in a process of its own, which has nothing of this one."""
    words = [sys.executable, __file__, "--pairs", str(n), "--measure", folder, result]
    subprocess.run(words, check=True)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def main() -> None:
    args = parse()
    if args.measure:
        write_json(args.measure[1], measure(args.measure[0], args.pairs))
    elif not demo(args):
        raise SystemExit("error: a check failed; see above")


if __name__ == "__main__":
    main()

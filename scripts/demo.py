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
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost other work much
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from data import pairs, smollm2
from data.packaged import refusal, write_json
from data.pairs import Example, Pair
from demo_options import parse
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

BATCH = 8
MAX_TOKENS = 160  # of a pair; what is longer is left out
SHOWN_CHARS = 240
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
    weights = train(args, base, adapter, split.train)
    print("\n== Adapted: the adapter, loaded into a fresh model", flush=True)
    adapted = measure(base, args.pairs, adapter)
    print("\n== Merge: fold the adapter into the checkpoint, on disk", flush=True)
    shutil.rmtree(merged, ignore_errors=True)
    command("lora-inject", "merge", base, adapter, "--output", merged)
    print("\n== Merged: by plain transformers", flush=True)
    after = in_a_process(merged, out / "merged.json", args.pairs)
    return show(before, adapted, after, weights, out)


def train(args: argparse.Namespace, base: Path, adapter: Path, rows: Sequence[Pair]) -> list[str]:
    """Fine-tune the base, save the adapter, and return the names of the adapted weights."""
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
            seconds = time.perf_counter() - start
            print(f"step {step:3d}: loss {fmean(losses[-8:]):.3f}, {seconds:.0f} s")
    li.save_adapter(model, adapter, overwrite=True)
    return sorted(site.spec.weight for site in li.adapter_state(model).sites.values())


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
        small = [pair for pair in split.held_out if len(pair.code) <= SHOWN_CHARS][:4]
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


def show(before: Any, adapted: Any, merged: Any, weights: list[str], out: Path) -> bool:
    """Print what came out; return whether every check holds."""
    print("\n== Results")
    for (code, human, base), (*_, tuned) in zip(before["said"], adapted["said"], strict=True):
        print(f"{code}\n  human:   {human}\n  base:    {base}\n  adapted: {tuned}\n")
    for name, found in (("base", before), ("adapter", adapted), ("merged", merged)):
        n_bytes = sum(file.stat().st_size for file in (out / name).glob("*.safetensors"))
        print(f"{name:8} perplexity {found['perplexity']:7.2f}  {n_bytes / 1e6:7.1f} MB")
    both = zip(adapted["log_probs"], merged["log_probs"], strict=True)
    apart = max(abs(a - b) for a, b in both)
    ratio = adapted["perplexity"] / before["perplexity"]
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

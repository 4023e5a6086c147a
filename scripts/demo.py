"""The main job on real input: plan, inject, train, save, load, merge, and check every step.

demo.sh, which makes the environment, has the options. `train` is what a program of yours would do;
the rest measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost other work much
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from data import models, pairs
from data.packaged import write_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

BATCH = 8
MAX_TOKENS = 160  # of a pair; what is longer is left out
CONFIG = {"rank": 4, "alpha": 8, "targets": [r"self_attn\.[qv]_proj"]}


def demo(args: argparse.Namespace) -> None:
    """Run everything, and end with an error unless every check holds."""
    out: Path = args.out
    base, adapter, merged = (out / name for name in ("base", "adapter", "merged"))
    config = args.config or out / "config.json"
    out.mkdir(parents=True, exist_ok=True)
    if not args.config:
        write_json(config, CONFIG)

    tell("Base: SmolLM2-135M-Instruct out of its GGUF file, float32")
    if not base.exists():
        print(f"perplexity {models.save_decoder(base):.2f} on two sentences about Paris")
    tell("Data: a function's code, and what its docstring says")
    split = pairs.collect()
    print(f"{len(split.train):,} pairs to train on, {len(split.held_out):,} of other modules")

    tell("Plan: what the config means for this model")
    command("plan", config, base)
    tell("Before: the base by plain transformers")
    before = measure_apart(base, args.pairs, out / "before.json")
    tell("Train: inject, loss on the target's tokens only, save")
    sites = train(args, config, base, adapter, split.train)
    tell("Adapted: the adapter, loaded into a fresh model")
    adapted = measure(base, args.pairs, adapter)
    tell("Merge: fold the adapter into the checkpoint, on disk")
    shutil.rmtree(merged, ignore_errors=True)
    command("merge", base, adapter, "--output", merged, "--verify")
    tell("Merged: by plain transformers")
    after = measure_apart(merged, args.pairs, out / "merged.json")
    tell("Look inside: what each layer learned")
    command("analyze", adapter, "--base", base, "--report", out / "analysis.html")

    tell("Results")
    for (code, human, plain), (*_, tuned) in zip(before["said"], adapted["said"], strict=True):
        print(code, f"  human:  {human}", f"  before: {plain}", f"  after:  {tuned}\n", sep="\n")
    print(f"perplexity {before['perplexity']:.1f} before, {adapted['perplexity']:.1f} after")
    ratio = adapted["perplexity"] / before["perplexity"]
    scores = zip(adapted["log_probs"], after["log_probs"], strict=True)
    apart = max(abs(one - two) for one, two in scores)
    one, two = (load_file(folder / "model.safetensors") for folder in (base, merged))
    moved = {n for n in two if n not in one or not one[n].equal(two[n])}
    checks = {
        f"adapted below 0.8 of before: {ratio:.3f}": ratio < 0.8,
        f"merged equals adapted within rounding: {apart:.0e} nats": apart < 2e-4,
        f"merging changed the {len(moved)} adapted weights only": (
            moved == {f"{site}.weight" for site in sites}
        ),
        "disabled(model) is the base, bit for bit": adapted["disabled_is_base"],
        "before and merged never imported lora_inject": before["plain"] and after["plain"],
    }
    for what, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {what}")
    print(f"\nLook at {out / 'analysis.html'}.")
    if not all(checks.values()):
        raise SystemExit("error: a check failed; see above")


def train(
    args: argparse.Namespace, config: Path, base: Path, adapter: Path, rows: list[pairs.Pair]
) -> list[str]:
    """Fine-tune the base and save the adapter; return the names of its sites."""
    import lora_inject as li

    torch.manual_seed(0)
    model, tokenizer = load(base)
    li.inject(model, config)
    print(li.summary(model))
    optimizer = torch.optim.AdamW(li.parameter_groups(model, lr=args.lr), weight_decay=0.01)
    # the paper's: linear up over a tenth of the steps, then down to nothing
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    examples = pairs.examples(tokenizer, rows, args.steps * BATCH, MAX_TOKENS, ended=True)
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
            done = f"step {step} of {args.steps}: loss {fmean(losses[-8:]):.3f}"
            print(f"{done}, {left:.0f} s to go", flush=True)
    li.save_adapter(model, adapter, overwrite=True)
    return list(li.adapter_state(model).sites)


def measure(folder: Path, n: int, adapter: Path | None = None) -> dict[str, Any]:
    """Perplexity of the held-out targets and a few generations, with an adapter or plain."""
    model, tokenizer = load(folder)
    held_out = pairs.collect().held_out
    examples = pairs.examples(tokenizer, held_out, n, MAX_TOKENS, ended=False)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        if adapter is not None:
            import lora_inject as li

            tokens = torch.tensor([examples[0].tokens])
            plain = model(tokens).logits
            li.load_adapter(model, adapter)
            with li.disabled(model):
                found["disabled_is_base"] = torch.equal(model(tokens).logits, plain)
        cut = [pairs.collate(b, tokenizer.pad_token_id) for b in pairs.batches(examples, BATCH)]
        scores = torch.cat([pairs.target_log_probs(model, *batch) for batch in cut]).double()
        short = [pair for pair in held_out if len(pair.code) <= 240][:3]
        found["said"] = [(p.code, p.summary, say(model, tokenizer, p.code)) for p in short]
    found |= {"perplexity": float((-scores.mean()).exp()), "log_probs": scores.tolist()}
    found["plain"] = "lora_inject" not in sys.modules
    print(f"perplexity of {len(scores):,} target tokens: {found['perplexity']:.2f}")
    return found


def measure_apart(folder: Path, n: int, result: Path) -> dict[str, Any]:
    """Measure a checkpoint in a process of its own, which has nothing of this one."""
    words = [sys.executable, __file__, "--pairs", str(n), "--measure", folder, result]
    subprocess.run(words, check=True)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def say(model: Any, tokenizer: Any, code: str) -> str:
    """The model's own summary of a function: greedy, up to the end of the line."""
    tokens = torch.tensor([tokenizer.encode(pairs.prompt_of(code))])
    written = model.generate(tokens, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
    return str(text).strip().split("\n")[0]


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def tell(what: str) -> None:
    print(f"\n== {what}", flush=True)


def command(*words: object) -> None:
    """Run a command of the package as a user would."""
    print(f"$ lora-inject {shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "lora_inject", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        write_json(args.measure[1], measure(args.measure[0], args.pairs))
    else:
        demo(args)


if __name__ == "__main__":
    main()

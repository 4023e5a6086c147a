"""The demo's stages, each run in a process of its own: read, train, measure.

A process per stage makes "a fresh model" and "without lora_inject" true by construction,
gives every stage its own peak of memory, and leaves nothing behind when it is interrupted.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pairs as data
from demo_files import DemoError, write_json
from pairs import Example, Pair, batches, collate, encode, prompt_of, target_of
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

SEED = 0
BATCH = 8
MAX_TOKENS = 160  # of a pair; what is longer is left out
N_SHOWN = 5  # functions whose generated summaries are shown
SHOWN_CHARS = 240
N_SHOTS = 4
SHOT_CHARS = 180

console = Console()


# ---------------------------------------------------------------------------------------- stages


def base(args: argparse.Namespace) -> dict[str, Any]:
    """GGUF file to checkpoint."""
    import smollm2

    quiet()
    with console.status("reading and dequantising 98 MB"):
        perplexity = smollm2.save(smollm2.find(), args.output)
    console.print("the published model minus a rounding to 4 bits, now a plain float32 checkpoint")
    console.print(f"sound: perplexity {perplexity:.2f} on two sentences about Paris")
    return {"perplexity": perplexity}


def pairs(args: argparse.Namespace) -> dict[str, Any]:
    """Python sources to pairs."""
    split = data.collect()
    write_json(args.output, {k: [asdict(p) for p in getattr(split, k)] for k in split.__slots__})
    n_train, n_held_out = len(split.train), len(split.held_out)
    console.print(f"{n_train:,} pairs to train on, {n_held_out:,} held out, no module in common")
    for pair in split.held_out[:1]:
        console.print(f"one of them, from [bold]{pair.module}[/]:")
        console.print(pair.code, style="dim", markup=False, highlight=False)
        console.print(f"  -> {pair.summary}", style="cyan", markup=False, highlight=False)
    return {"train": n_train, "held_out": n_held_out}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Inject, fine-tune on the conditional objective, save the adapter."""
    import torch
    from objective import target_log_probs

    import lora_inject

    torch.manual_seed(SEED)
    model, tokenizer = load(args.base)
    n_base = sum(p.numel() for p in model.parameters())
    lora_inject.inject(model, args.config)
    n_trained = sum(p.numel() for p in lora_inject.adapter_parameters(model).values())
    console.print(f"{n_trained:,} of {n_base:,} parameters train ({n_trained / n_base:.2%})")

    chosen = take(read_pairs(args.pairs)[0], tokenizer, args.steps * BATCH, ended=True)
    optimizer = torch.optim.AdamW(
        lora_inject.parameter_groups(model, lr=args.lr), weight_decay=0.01
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    n_tokens, start = 0, time.perf_counter()
    model.train()
    with progress("loss {task.fields[loss]:.2f}", "{task.fields[speed]:.0f} tokens/s") as bar:
        task = bar.add_task("training", total=args.steps, loss=float("nan"), speed=0.0)
        for step, batch in enumerate(batches(chosen, BATCH)):
            seconds = time.perf_counter() - start
            factor = schedule(step, args.steps, seconds / (60 * args.minutes))
            if factor == 0:
                break
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = -target_log_probs(model, *collate(batch, tokenizer.pad_token_id)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            n_tokens += sum(len(example.tokens) for example in batch)
            speed = n_tokens / (time.perf_counter() - start)
            bar.update(task, advance=1, loss=sum(losses[-10:]) / len(losses[-10:]), speed=speed)
            if losses[-1] != losses[-1]:
                found = f"the loss of step {len(losses)} is not a number"
                raise DemoError("training", found, "Try a lower --lr")
    if len(losses) < args.steps:
        console.print(f"{args.minutes:g} minutes were up after {len(losses)} of {args.steps} steps")
    lora_inject.save_adapter(model, args.output)
    return {
        "losses": losses,
        "tokens_per_second": speed,
        "n_trained": n_trained,
        "n_base": n_base,
        "weights": [s.spec.weight for s in lora_inject.adapter_state(model).sites.values()],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the held-out targets, and a few generations."""
    import torch

    model, tokenizer = load(args.model)
    training, held_out = read_pairs(args.pairs)
    examples = take(held_out, tokenizer, args.n_pairs, ended=False)
    result: dict[str, Any] = {"n_pairs": len(examples)}
    with torch.inference_mode():
        if args.adapter:
            result["disabled_is_base"] = mount(model, args.adapter, batches(examples, BATCH)[0])
        log_probs = evaluate(model, tokenizer, examples, "held-out pairs")
        if args.shots:
            shots = shots_of(training, tokenizer)
            shown = evaluate(model, tokenizer, examples, "with 4 examples", shots)
            result["with_shots"] = perplexity(shown)
        result["generations"] = [
            {
                "code": p.code,
                "module": p.module,
                "human": p.summary,
                "model": say(model, tokenizer, p),
            }
            for p in [p for p in held_out if len(p.code) <= SHOWN_CHARS][:N_SHOWN]
        ]
    result |= {
        "perplexity": perplexity(log_probs),
        "log_probs": [row.tolist() for row in log_probs],
        "n_tokens": sum(map(len, log_probs)),
        "without_lora_inject": "lora_inject" not in sys.modules,
    }
    if args.compare:
        result["changed"] = changed(args.compare, args.model)
    console.print(f"perplexity of the targets: [bold]{result['perplexity']:.2f}[/]")
    return result


# ------------------------------------------------------------------------------------- measuring


def mount(model: PreTrainedModel, adapter: Path, batch: Sequence[Example]) -> bool:
    """Load an adapter into a fresh model; say whether `disabled` gives the base bit for bit."""
    import torch

    import lora_inject

    tokens, _ = collate(batch, 0)
    before = model(tokens).logits
    lora_inject.load_adapter(model, adapter)
    with lora_inject.disabled(model):
        return torch.equal(model(tokens).logits, before)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    title: str,
    shots: list[int] | None = None,
) -> list[Tensor]:
    """Log-probabilities of the targets' tokens, one tensor for each example.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: What to measure on.
        title: What the progress bar says.
        shots: Tokens to put in front of every prompt; they are read once.

    Returns:
        In the order of `batches(examples, BATCH)`, which depends on the examples alone.
    """
    from objective import target_log_probs

    name, cache = ("", None) if shots is None else read_once(model, shots)
    found: list[Tensor] = []
    with progress() as bar:
        task = bar.add_task(title, total=len(examples))
        for batch in batches(examples, BATCH):
            tokens, labels = collate(batch, tokenizer.pad_token_id)
            in_front = {} if shots is None else {name: copies(cache, len(batch))}
            flat = target_log_probs(model, tokens, labels, **in_front)
            found += flat.split([len(e.tokens) - e.n_prompt for e in batch])
            bar.update(task, advance=len(batch))
    return found


def read_once(model: PreTrainedModel, tokens: list[int]) -> tuple[str, Any]:
    """The keys and values of some tokens, and the name of the argument that takes them."""
    import torch
    from transformers import DynamicCache

    decoder = model.get_decoder()
    arguments = inspect.signature(type(decoder).forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # renamed within version 5
    cache = DynamicCache(config=model.config)
    decoder(torch.tensor([tokens]), use_cache=True, **{name: cache})
    return name, cache


def copies(cache: Any, n: int) -> Any:
    """The cache of one row as one of `n` rows; a copy, as a forward writes into it."""
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(n)
    return rows


def shots_of(training: Sequence[Pair], tokenizer: Tokenizer) -> list[int]:
    """A few solved pairs as text: what a user without fine-tuning would put into the prompt."""
    short = [pair for pair in training if len(pair.code) <= SHOT_CHARS][:N_SHOTS]
    text = "".join(f"{prompt_of(p.code)}{target_of(p.summary)}\n\n\n" for p in short)
    return tokenizer.encode(text)


def perplexity(log_probs: Sequence[Tensor]) -> float:
    """Perplexity per token over all targets together."""
    import torch

    return (-torch.cat(list(log_probs)).double().mean()).exp().item()


def say(model: PreTrainedModel, tokenizer: Tokenizer, pair: Pair) -> str:
    """The model's own summary of a function: greedy, up to the end of the line."""
    import torch

    tokens = torch.tensor([tokenizer.encode(prompt_of(pair.code))])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False
    )
    text = tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
    return text.strip().split("\n")[0].strip()


def changed(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same, bit for bit, in two checkpoints of one file."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(one / "model.safetensors", "pt") as a,
        safe_open(other / "model.safetensors", "pt") as b,
    ):
        names = set(a.keys()) | set(b.keys())
        both = set(a.keys()) & set(b.keys())
        same = {name for name in both if torch.equal(a.get_tensor(name), b.get_tensor(name))}
    return sorted(names - same)


# --------------------------------------------------------------------------------------- helpers


def load(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a checkpoint the plain way."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def quiet() -> None:
    """Leave progress bars to this demo."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def read_pairs(path: Path) -> tuple[list[Pair], list[Pair]]:
    """The training and the held-out pairs that the stage `pairs` wrote."""
    split = json.loads(path.read_text(encoding="utf-8"))
    return [Pair(**p) for p in split["train"]], [Pair(**p) for p in split["held_out"]]


def take(pairs: Sequence[Pair], tokenizer: Tokenizer, n: int, *, ended: bool) -> list[Example]:
    """The first `n` pairs that are short enough, as tokens."""
    found: list[Example] = []
    for pair in pairs:
        if len(found) == n:
            break
        example = encode(tokenizer, pair, ended)
        if len(example.tokens) <= MAX_TOKENS:
            found.append(example)
    if len(found) < n:
        raise DemoError(f"{n} pairs", f"only {len(found)} were found", "Ask for fewer --steps")
    return found


def schedule(step: int, steps: int, spent: float) -> float:
    """The paper's schedule, linear up and then down to nothing, for a run that ends in time.

    Args:
        step: Steps taken so far.
        steps: Steps to take if time allows. The rate goes up over the first tenth of them.
        spent: Share of the allowed time that is gone. Where it runs ahead of the steps, on a slow
            or busy machine, the rate comes down by the clock; else the result depends on none.

    Returns:
        The factor on the peak rate, 0 where training is over.
    """
    up = max(1, steps // 10) / steps
    done = max(step / steps, spent)
    return max(0.0, min((step + 1) / steps / up, (1 - done) / (1 - up) if up < 1 else 1 - done))


def progress(*extra: str) -> Progress:
    """A bar with the time left and some more columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, extra),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `demo.py` writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    stages = parser.add_subparsers(required=True)
    options: dict[Any, dict[str, Any]] = {
        base: {"--output": Path},
        pairs: {"--output": Path},
        train: {"--base": Path, "--pairs": Path, "--config": Path, "--steps": int, "--lr": float}
        | {"--minutes": float, "--output": Path},
        measure: {"--model": Path, "--pairs": Path, "--n-pairs": int},
    }
    for stage, required in options.items():
        sub = stages.add_parser(stage.__name__)
        sub.set_defaults(stage=stage)
        for option, kind in required.items():
            sub.add_argument(option, type=kind, required=True)
        if stage is measure:
            sub.add_argument("--adapter", type=Path)
            sub.add_argument("--compare", type=Path)
            sub.add_argument("--shots", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    """Run one stage."""
    args = parse()
    try:
        write_json(args.result, args.stage(args))
    except DemoError as error:
        console.print(f"[red bold]error:[/] {escape(str(error))}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

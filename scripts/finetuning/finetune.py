"""Fine-tune a model of transformers with LoRA, in full, or its head alone: `options` says how."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from data import minilm, smollm2
from data.packaged import refusal, write_json
from finetuning.options import parse
from finetuning.rows import Data, data
from finetuning.tasks import Judgment, Words
from transformers.trainer_utils import get_last_checkpoint

import lora_inject as li

TARGETS = {"smollm2": [r"self_attn\.[qv]_proj"], "minilm": [r"attention\.self\.(query|value)"]}
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
FIRST = os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> None:
    """Read, adapt, train, and say what came of it."""
    args = parse(argv)
    same_run(args)
    rows = data(args)
    torch.manual_seed(args.seed)
    names = sorted({row.target for row in rows.train}) if args.task == "classify" else []
    model, tokenizer = load(args, len(names) or 1)
    adapt(args, model)
    task: Any = Judgment(tokenizer, args.max_tokens, names)
    if args.task == "pairs":
        words = (args.prompt or rows.prompt, args.max_tokens, args.label_smoothing)
        task = Words(tokenizer, *words)
    trainer = build(args, model, task, rows)
    if FIRST:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "arguments.json", noted(args))
    before = measure(args, trainer, task, rows)
    # accelerate marks a model that it evaluated as prepared, and would not wrap it for DDP then:
    # each process would train on its own, and nothing would say so.
    vars(trainer.model).pop("_is_accelerate_prepared", None)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    trainer.train(get_last_checkpoint(str(trainer.args.output_dir)) if args.resume else None)
    found = {"seconds": time.perf_counter() - start, "before": before}
    found["log"] = [e for e in trainer.state.log_history if "train_runtime" not in e]
    found["after"] = measure(args, trainer, task, rows)
    if args.method == "full":
        trainer.save_model(str(args.output / "model"))
    if FIRST:
        if args.method != "full":
            li.save_adapter(trainer.accelerator.unwrap_model(model), args.output / "adapter")
        finish(args, trainer, found)


def load(args: argparse.Namespace, n_labels: int) -> tuple[Any, Any]:
    """Load model and tokenizer: an installed model, a folder, or a name on the hub."""
    name: str | Path = args.model
    if name == "minilm":
        name = minilm.find()
    elif name == "smollm2" and not (name := args.cache / "smollm2").is_dir():
        smollm2.save(smollm2.find(), name)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if args.load_in else torch.float32}
    if args.load_in:
        how = {f"load_in_{args.load_in}": True, "bnb_4bit_quant_type": "nf4"}
        how |= {"bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**how)
    kind: Any = transformers.AutoModelForCausalLM
    if args.task != "pairs":
        kind, options["num_labels"] = transformers.AutoModelForSequenceClassification, n_labels
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name, **options)
    except (OSError, ImportError) as error:
        found, remedy = str(error).splitlines()[0].rstrip("."), f"Or one of: {', '.join(TARGETS)}"
        raise refusal(f"--model {args.model}", found, remedy) from None
    if model.config.pad_token_id is None:  # a decoder judges the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model, tokenizer


def adapt(args: argparse.Namespace, model: Any) -> None:
    """Put on the model what the method trains, in place."""
    prefix = f"{model.base_model_prefix}."
    outside = [n.split(".")[0] for n, _ in model.named_parameters() if not n.startswith(prefix)]
    head = [rf"^{re.escape(n)}\..*" for n in dict.fromkeys(outside)] * (args.task != "pairs")
    if args.method == "head" and not head:
        raise refusal("--method head", "a language model has none", "Use --method lora")
    if args.method == "head":
        li.inject(model, {"targets": [], "train": head})
    if args.method != "lora":
        return
    targets = args.targets or TARGETS.get(args.model)
    if not args.config and not targets:
        raise refusal("which layers to adapt", "nothing", "Pass --targets or --config")
    numbers = {"rank": args.rank, "alpha": args.alpha, "dropout": args.dropout}
    config: Any = {**numbers, "targets": targets, "train": head}
    if args.config:
        config = li.Config.from_yaml(args.config)
    if args.config and head and not config.train:
        remedy = f"Add train: [{', '.join(head)}]"
        raise refusal(f"--config {args.config}", "it does not train the new head", remedy)
    li.inject(model, config)
    if args.init_from is not None:  # all but the head
        mine, start = li.adapter_state(model), li.read_adapter(args.init_from)
        li.swap_adapter(model, replace(start, trained=mine.trained), "default")


def build(args: argparse.Namespace, model: Any, task: Any, rows: Data) -> transformers.Trainer:
    """Return Trainer as it is, with checkpoints of the adapter instead of the model."""
    train = task.encode(rows.train[: args.rows], train=True)
    held_out = task.encode(rows.held_out[: args.eval_rows], train=False)
    steps = max(args.max_steps, 0) or math.ceil(len(train) / args.batch * args.epochs)
    every = args.eval_every or max(1, steps // 10)
    warmup = min(500 if args.task == "pairs" else steps, math.ceil(steps * args.warmup))
    on_cpu, part = not torch.accelerator.is_available(), args.batch // (WORLD * args.accumulate)
    settings: dict[str, Any] = {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}
    if WORLD > 1:
        settings |= {"ddp_find_unused_parameters": False, "ddp_backend": "gloo" if on_cpu else None}
    if args.gradient_checkpointing:
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{word}_checkpointing_enable")()  # renamed within transformers 5
    training = transformers.TrainingArguments(
        str(args.output / "checkpoints"), seed=args.seed, max_steps=args.max_steps,
        num_train_epochs=args.epochs, per_device_train_batch_size=part,
        per_device_eval_batch_size=max(part, 16), gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr, weight_decay=args.weight_decay, lr_scheduler_type="linear",
        warmup_steps=warmup, bf16=args.bf16, eval_strategy="steps", eval_steps=every,
        save_strategy="steps", save_steps=every, save_total_limit=args.keep,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{task.metric}", greater_is_better=task.higher,
        logging_steps=1, logging_nan_inf_filter=False, remove_unused_columns=False,
        label_names=["labels"], report_to=args.report_to, disable_tqdm=args.quiet, **settings,
    )  # fmt: skip
    callbacks: list[Any] = []
    how: dict[str, Any] = {}
    if args.patience:
        callbacks.append(transformers.EarlyStoppingCallback(args.patience))
    if args.method != "full":
        callbacks.append(li.AdapterCheckpoint())
        groups = li.parameter_groups(model, args.lr, b_lr_ratio=args.b_lr_ratio)
        options = {"params": groups, "lr": args.lr, "weight_decay": args.weight_decay}
        how["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, options)
    return transformers.Trainer(
        model, training, train_dataset=train, eval_dataset=held_out, data_collator=task.collate,
        compute_loss_func=task.loss, compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.thin, callbacks=callbacks, **how,
    )  # fmt: skip


def measure(args: argparse.Namespace, trainer: Any, task: Any, rows: Data) -> dict[str, Any]:
    """Return the task's numbers on the held-out rows, and on those to report on."""
    found = {"held_out": trainer.evaluate()}
    if rows.test:
        found["test"] = trainer.evaluate(task.encode(rows.test[: 5 * args.eval_rows], train=False))
    other = re.compile("runtime|second|epoch|time")
    return {part: {key.removeprefix("eval_"): value for key, value in metrics.items()
                   if not other.search(key)} for part, metrics in found.items()}  # fmt: skip


def finish(args: argparse.Namespace, trainer: Any, result: dict[str, Any]) -> None:
    """Write the results and print them."""
    weights = list(trainer.model.parameters())
    n_all, n_trained = (sum(p.numel() for p in weights if p.requires_grad or every)
                        for every in (True, False))  # fmt: skip
    steps, best = trainer.state.global_step, trainer.state.best_global_step
    result |= {"n_trained": n_trained, "n_all": n_all, "steps": steps, "best_step": best}
    write_json(args.output / "results.json", result)
    for part, numbers in result["after"].items():
        for key, value in numbers.items():
            if isinstance(value, float):
                old = result["before"][part][key]
                print(f"{part.replace('_', '-')} {key}: {old:.4g} -> {value:.4g}")
    losses = [entry["loss"] for entry in result["log"] if "loss" in entry]
    n = max(1, min(10, len(losses) // 2))  # windows that do not overlap
    first, last = (sum(window) / n for window in (losses[:n], losses[-n:]))
    print(f"{args.method}, {steps} steps: loss {first:.3f} -> {last:.3f} (means of the first and "
          f"last {n} steps), best at step {best}; {n_trained:,} of {n_all:,} parameters trained, "
          f"{result['seconds']:.0f} s; see {args.output}")  # fmt: skip


def noted(args: argparse.Namespace) -> dict[str, str]:
    """Return what makes a run this one."""
    free = ("resume", "quiet", "output", "report_to")
    return {key: str(value) for key, value in vars(args).items() if key not in free}


def same_run(args: argparse.Namespace) -> None:
    """Refuse options that cannot be meant, and a folder that holds another run."""
    parts, path = WORLD * args.accumulate, args.output / "arguments.json"
    if args.batch % parts:
        raise refusal(f"--batch {args.batch}", f"{parts} parts", f"Choose a multiple of {parts}")
    if args.method != "lora" and (args.config or args.targets or args.init_from):
        raise refusal(f"--method {args.method}", "it adapts no layer", "Use --method lora")
    if not path.is_file():
        return
    if not args.resume:
        remedy = "Pass --resume to go on, or choose another --output"
        raise refusal(f"--output {args.output}", "there is a run already", remedy)
    old = json.loads(path.read_text(encoding="utf-8"))
    for key, value in noted(args).items():
        if old.get(key) != value:
            found = f"{key} was {old.get(key)} and is now {value}"
            raise refusal("--resume", found, "Give the same options, or another --output")


if __name__ == "__main__":
    try:
        main()
    except li.LoraInjectError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)

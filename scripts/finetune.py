"""Fine-tune a model of transformers with LoRA, in full, or its head alone.

    python scripts/finetune.py --model smollm2 --train docstrings --max-steps 64 --output out
    python scripts/finetune.py --model smollm2 --train e2e/train.txt --held-out e2e/valid.txt \\
        --test e2e/test.txt --bleu 100 --output out
    python scripts/finetune.py --model minilm --task classify --train movies --epochs 3 --output out
    torchrun --nproc_per_node 2 scripts/finetune.py ...        (with --fsdp: sharded)

Context-target pairs are learnt by eq. (2) of the LoRA paper: the loss is over the target's tokens
only. What is not said on the command line is as in the paper. A run may be stopped by Ctrl-C, or
killed: the same command with --resume goes on and gives the same losses.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before transformers reads them: no server is asked for anything, and the bar here is enough.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from data.packaged import discard, new_folder, refusal, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from training import arguments, bleu, curves, launch, models, sources, tasks
from training.rows import FIELDS, Fields
from transformers.utils import logging as hub_logging

import lora_inject as li
from lora_inject.integrations.trainer import AdapterCheckpoint

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    args = arguments.parse(__doc__ or "", argv)
    main_process = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not main_process)
    hub_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        return finetune(args, console, main_process)
    except SystemExit as error:
        console.print(escape(str(error)), highlight=False)
        return 1
    except li.LoraInjectError as error:
        console.print(f"[red bold]error:[/] {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped at once; --resume goes on from the last checkpoint")
        return 130


def finetune(args: argparse.Namespace, console: Console, main_process: bool) -> int:
    """Read, adapt, train, and say what came of it."""
    arguments.check_sense(args, launch.world())
    if main_process:
        arguments.check_same(args)
    talk = Console(quiet=console.quiet or args.quiet)
    data = read(args)
    torch.manual_seed(args.seed)
    model, task = prepare(args, data)
    held_out = task.encode(data.held_out[: args.eval_rows], train=False)
    rows = task.encode(data.train[: args.rows], train=True)
    talk.print(f"{len(rows):,} rows to train on, {len(held_out):,} held out")
    trainer, stopper = build(args, model, task, rows, held_out, talk)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_all = sum(p.numel() for p in model.parameters())
    talk.print(f"{n_trained:,} of {n_all:,} parameters train ({n_trained / n_all:.3%})")

    if main_process and not (args.output / "arguments.json").is_file():
        arguments.note_down(args)
    checkpoint = launch.last_checkpoint(args) if args.resume else None
    before = measure_before(args, trainer, task, data, checkpoint)
    began, cpu_began = time.perf_counter(), time.process_time()
    torch.manual_seed(args.seed)
    with stopper:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    if stopper.asked:
        console.print(f"stopped after step {trainer.state.global_step}; --resume goes on")
        return 130
    result = {
        "method": args.method,
        "n_trained": n_trained,
        "n_all": n_all,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": before,
        "log": [e for e in trainer.state.log_history if "train_runtime" not in e],
    }
    result["after"] = measure(args, trainer, task, data)
    keep(args, trainer, main_process)
    if main_process:
        finish(args, task, result, console)
    return 0


# ----------------------------------------------------------------------------------------- before


def read(args: argparse.Namespace) -> sources.Data:
    """The rows, from files or a source that comes with a package."""
    if args.train in sources.BUILT_IN:
        return sources.built_in(args.train, args.task, args.cache)
    fields = FIELDS[args.task]
    if args.fields is not None:
        names = args.fields.split(",")
        if not 2 <= len(names) <= 3:
            raise refusal(f"--fields {args.fields}", f"{len(names)} names", "Give two or three")
        fields = Fields(*names)
    return sources.from_files(Path(args.train), args.held_out, args.test, fields, args.share)


def prepare(args: argparse.Namespace, data: sources.Data) -> tuple[Any, tasks.Task]:
    """The model with what trains of it, and what it is to learn."""
    names = sorted({row.target for row in data.train}) if args.task == "classify" else [""]
    dtype = torch.float32
    model, tokenizer = models.load(args.model, args.task, len(names), args.cache, dtype)
    models.adapt(args, model)
    task: tasks.Task
    if args.task == "pairs":
        prompt = args.prompt or data.prompt
        task = tasks.Pairs(tokenizer, prompt, args.max_tokens, args.label_smoothing)
    elif args.task == "classify":
        task = tasks.Classes(tokenizer, args.max_tokens, names)
    else:
        task = tasks.Numbers(tokenizer, args.max_tokens)
    return model, task


def build(
    args: argparse.Namespace, model: Any, task: tasks.Task, rows: Any, held_out: Any, talk: Console
) -> tuple[Any, Any]:
    """Trainer as it is, with a callback that saves the adapter instead of the model."""
    from training.callbacks import Bar, EarlyStop, StopWhenAsked
    from transformers import PrinterCallback, Trainer

    stopper = StopWhenAsked()
    callbacks: list[Any] = [stopper, Bar(talk)]
    how: dict[str, Any] = {}
    if args.patience is not None:
        callbacks.append(EarlyStop(f"eval_{task.metric}", task.higher, args.patience))
    if args.method != "full":
        callbacks.append(AdapterCheckpoint())
        groups = li.parameter_groups(model, args.lr, args.b_lr_ratio)
        options = {"params": groups, "lr": args.lr, "weight_decay": args.weight_decay}
        how["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, options)
    trainer = Trainer(
        model,
        launch.settings(args, len(rows), task.metric, task.higher),
        data_collator=task.collate,
        train_dataset=rows,
        eval_dataset=held_out,
        compute_loss_func=task.loss,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.thin,
        callbacks=callbacks,
        **how,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, stopper


def measure_before(
    args: argparse.Namespace,
    trainer: Any,
    task: tasks.Task,
    data: sources.Data,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """What the model can do untrained; a run that goes on has it written down."""
    path = args.output / "before.json"
    if checkpoint is not None and path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if args.fsdp:  # accelerate shards a model together with its optimiser, or not at all
        return {}
    found = measure(args, trainer, task, data)
    # accelerate marks a model that it evaluated as prepared, and would not wrap it for DDP then:
    # each process would train on its own, and nothing would say so.
    vars(trainer.model).pop("_is_accelerate_prepared", None)
    if trainer.is_world_process_zero():
        write_json(path, found)
    return found


# ------------------------------------------------------------------------------------------ after


def measure(
    args: argparse.Namespace, trainer: Any, task: tasks.Task, data: sources.Data
) -> dict[str, Any]:
    """The task's numbers on the held-out rows, and on the rows to report on if there are any."""
    found: dict[str, Any] = {"held_out": _numbers(trainer.evaluate())}
    if data.test:
        rows = task.encode(data.test[: 5 * args.eval_rows], train=False)
        found["test"] = _numbers(trainer.evaluate(rows))
    if args.bleu:
        assert isinstance(task, tasks.Pairs)
        asked = bleu.by_context(data.test, args.bleu)
        said = bleu.say(trainer.model, task, list(asked))
        found["bleu"] = bleu.bleu(said, list(asked.values()))
        found["said"] = dict(list(zip(asked, said, strict=True))[:5])
    return found


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    beside = ("runtime", "second", "epoch", "preparation_time")
    plain = {k.removeprefix("eval_"): v for k, v in metrics.items()}
    return {key: value for key, value in plain.items() if not key.endswith(beside)}


def keep(args: argparse.Namespace, trainer: Any, main_process: bool) -> None:
    """Put the best adapter, or the best model, where a user looks for it."""
    if args.method == "full":
        trainer.save_model(str(args.output / "model"))
    elif main_process:
        best = Path(trainer.state.best_model_checkpoint)
        with new_folder(args.output / "adapter") as partial:
            for name in ADAPTER_FILES:
                (partial / name).write_bytes((best / name).read_bytes())


def finish(
    args: argparse.Namespace, task: tasks.Task, result: dict[str, Any], console: Console
) -> None:
    """Write the results and the picture, and print what was done."""
    write_json(args.output / "results.json", result)
    picture = curves.draw(
        {args.method: result["log"]}, f"eval_{task.metric}", args.output / "curves.png"
    )
    discard(args.output / "before.json")
    table = Table("", "before", "after", title=f"{args.method}, {result['steps']} steps")
    before, after = result["before"], result["after"]
    for part in ("held_out", "test"):
        for key in after.get(part, {}):
            old = before.get(part, {}).get(key)
            row = (f"{part.replace('_', '-')} {key}", old, after[part][key])
            table.add_row(row[0], *("-" if v is None else f"{v:,.4g}" for v in row[1:]))
    if "bleu" in after:
        table.add_row("BLEU", *(f"{found['bleu']['score']:.2f}" for found in (before, after)))
    console.print(table)
    losses = [entry["loss"] for entry in result["log"] if "loss" in entry]
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    console.print(
        f"loss {first:.3f} -> {last:.3f} (means of ten steps), best at step {result['best_step']}; "
        f"{result['n_trained']:,} of {result['n_all']:,} parameters trained; "
        f"{result['seconds']:.0f} s ({result['cpu_seconds']:.0f} s of processor), "
        f"peak {result['peak_bytes'] / 2**20:,.0f} MiB",
        highlight=False,
    )
    product = args.output / ("model" if args.method == "full" else "adapter")
    files = [product, args.output / "results.json", *([picture] if picture else [])]
    for file in files:
        console.print(f"  {file}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())

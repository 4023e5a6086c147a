"""The command line of `finetune.py`, with the paper's numbers where nothing is said.

An option that is not given takes the value of the LoRA paper for the task (appendix D:
GPT-2 for pairs, RoBERTa-base for judging texts), and a run that is resumed must be the same run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.packaged import refusal, write_json

from training.models import NAMED
from training.sources import BUILT_IN

__all__ = ["Paper", "check_same", "check_sense", "note_down", "paper", "parse", "warmup_of"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Hyper-parameters of the paper for one kind of task.

    Attributes:
        lr: Peak learning rate; full fine-tuning starts from `full_lr` instead, which is ours.
        full_lr: See `lr`.
        weight_decay: AdamW's.
        batch: Rows of an update.
        epochs: Passes over the rows.
        warmup_steps: Steps until the peak; at most a tenth of all.
        warmup_ratio: The same as a share of all steps, where the paper gives a share.
        label_smoothing: Share of each token's weight that goes to all words alike.
        rank: Of each update.
        alpha: Over rank, the factor on each update.
        dropout: On the input of A.
    """

    lr: float
    full_lr: float
    weight_decay: float
    batch: int
    epochs: float
    warmup_steps: int
    warmup_ratio: float
    label_smoothing: float
    rank: int
    alpha: float
    dropout: float


GPT2 = Paper(2e-4, 5e-5, 0.01, 8, 5, 500, 0.1, 0.1, 4, 32, 0.1)
ROBERTA = Paper(5e-4, 5e-5, 0.1, 16, 30, 10**9, 0.06, 0.0, 8, 8, 0.0)
SCHEDULED = ("warmup_steps", "warmup_ratio", "full_lr")

# What may differ between a run and its continuation.
FREE = {"resume", "quiet"}


def paper(task: str) -> Paper:
    """The paper's numbers for a task."""
    return GPT2 if task == "pairs" else ROBERTA


def parse(doc: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in the paper's numbers."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_data(parser)
    _add_model(parser)
    _add_training(parser)
    _add_run(parser)
    args = parser.parse_args(argv)
    for name in Paper.__slots__:
        if name not in SCHEDULED and getattr(args, name) is None:
            value = getattr(paper(args.task), name)
            full = name == "lr" and args.method == "full"
            setattr(args, name, paper(args.task).full_lr if full else value)
    return args


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--task", choices=("pairs", "classify", "regress"), default="pairs",
                       help="words that follow, a class, or a number (%(default)s)")  # fmt: skip
    group.add_argument("--train", required=True, metavar="FILE|NAME",
                       help="rows as .jsonl, .csv or context||target text; or one of: "
                       + ", ".join(BUILT_IN))  # fmt: skip
    group.add_argument("--held-out", type=Path, metavar="FILE", help="rows to choose by")
    group.add_argument("--test", type=Path, metavar="FILE", help="rows to report on")
    group.add_argument("--fields", metavar="TEXT,TARGET[,SECOND]", help="names of the columns")
    group.add_argument("--share", type=float, default=0.1,
                       help="of the texts to hold out, if no --held-out (%(default)s)")  # fmt: skip
    group.add_argument("--rows", type=int, metavar="N", help="train on the first N rows")
    group.add_argument("--eval-rows", type=int, default=200, metavar="N",
                       help="held-out rows to evaluate on (%(default)s)")  # fmt: skip
    group.add_argument("--prompt", help="how a context is put, with {text} in it")
    group.add_argument("--max-tokens", type=int, default=256, help="of a row (%(default)s)")
    group.add_argument("--bleu", type=int, default=0, metavar="N",
                       help="let the model answer N contexts before and after")  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and adapter")
    group.add_argument("--model", required=True, metavar="FOLDER|NAME",
                       help=f"a folder of transformers, or one of: {', '.join(NAMED)}")  # fmt: skip
    group.add_argument("--method", choices=("lora", "full", "head"), default="lora",
                       help="what trains (%(default)s)")  # fmt: skip
    group.add_argument("--config", type=Path, metavar="YAML", help="what to adapt and how")
    group.add_argument("--targets", nargs="+", metavar="PATTERN", help="instead of a config")
    group.add_argument("--rank", type=int, help="of --targets")
    group.add_argument("--alpha", type=float, help="of --targets")
    group.add_argument("--dropout", type=float, help="of --targets")
    group.add_argument("--init-from", type=Path, metavar="ADAPTER", help="start from another one")
    group.add_argument("--leave-out", nargs="*", metavar="PATTERN",
                       help="of --init-from; by default the head")  # fmt: skip


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (the paper's numbers by default)")
    group.add_argument("--lr", type=float, help="peak learning rate; it falls linearly to 0")
    group.add_argument("--b-lr-ratio", type=float, default=1.0, metavar="X",
                       help="LoRA+: B learns X times faster (%(default)s)")  # fmt: skip
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--label-smoothing", type=float, help="for pairs")
    group.add_argument("--warmup", type=int, metavar="STEPS")
    group.add_argument("--batch", type=int, help="rows of an update, over all processes")
    group.add_argument("--accumulate", type=int, default=1, metavar="N",
                       help="parts that a batch is computed in (%(default)s)")  # fmt: skip
    group.add_argument("--epochs", type=float)
    group.add_argument("--max-steps", type=int, default=-1, metavar="N", help="instead of epochs")
    group.add_argument("--patience", type=int, metavar="N",
                       help="stop after N evaluations without a better one")  # fmt: skip
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2")
    group.add_argument("--seed", type=int, default=0)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    group.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    group.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="and save; by default ten times"
    )
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints (%(default)s)")
    group.add_argument("--cache", type=Path, default=Path(".finetune"), metavar="FOLDER",
                       help="for what is downloaded or converted (%(default)s)")  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="print the summary only")


def warmup_of(args: argparse.Namespace, steps: int) -> int:
    """Steps until the peak."""
    if args.warmup is not None:
        return int(args.warmup)
    numbers = paper(args.task)
    return min(numbers.warmup_steps, math.ceil(steps * numbers.warmup_ratio))


def check_sense(args: argparse.Namespace, world: int) -> None:
    """Refuse options that cannot be meant.

    Raises:
        SystemExit: Says which.
    """
    parts = world * args.accumulate
    if args.batch % parts:
        found = f"{world} processes and --accumulate {args.accumulate} make {parts} parts"
        raise refusal(f"--batch {args.batch}", found, f"Choose a multiple of {parts}")
    if args.bleu and (args.task != "pairs" or args.test is None):
        raise refusal("--bleu", "it needs pairs and --test", "Give both, or leave it away")
    if args.bleu and world > 1:
        raise refusal("--bleu", f"there are {world} processes", "Measure it in one process")
    if args.fsdp and world == 1:
        raise refusal("--fsdp", "there is one process", "Start several with torchrun")
    if args.init_from is not None and args.method != "lora":
        raise refusal("--init-from", f"--method is {args.method}", "Use --method lora")
    if (args.config or args.targets) and args.method != "lora":
        raise refusal(f"--method {args.method}", "it adapts no layer", "Use --method lora")


def _noted(args: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """Return where a run says what it is, and what it says there."""
    now = {k: str(v) for k, v in vars(args).items() if k not in FREE | {"output"}}
    return args.output / "arguments.json", now


def note_down(args: argparse.Namespace) -> None:
    """Write down what the run is: from here on there is one in the folder."""
    path, now = _noted(args)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def check_same(args: argparse.Namespace) -> None:
    """Check that a run in the folder, if there is one, is this one and is to go on.

    Raises:
        SystemExit: There is another run in the folder, or the same one and no --resume.
    """
    path, now = _noted(args)
    if not path.is_file():
        return
    if not args.resume:
        remedy = "Pass --resume to go on, or choose another --output"
        raise refusal(f"--output {args.output}", "there is a run already", remedy)
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differ = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
    if differ:
        first = differ[0]
        found = f"{first} was {before.get(first)} and is now {now.get(first)}"
        raise refusal("--resume", found, "Give the same options, or another --output")

"""Fine-tune a model of transformers with LoRA, in full, or its head alone.

  finetune.sh --model smollm2 --train docstrings --max-steps 64 --output out
  finetune.sh --model org/name --train chat.jsonl --targets all-linear --output out
  finetune.sh --model minilm --task classify --train movies --epochs 3 --output out

The loss of pairs and conversations is over the target's tokens only, eq. (2) of the LoRA paper;
what is not given is as in the paper. Stopped by Ctrl-C or killed, a run goes on by --resume from
its last checkpoint, with the same losses. PROCESSES=2 finetune.sh ... runs two processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.rows import INSTALLED

# The paper's numbers, appendix D: GPT-2 on E2E, and RoBERTa-base on GLUE
PAPER = {"lr": (2e-4, 5e-4), "weight_decay": (0.01, 0.1), "batch": (8, 16), "epochs": (5, 30),
         "warmup": (0.1, 0.06), "label_smoothing": (0.1, 0.0), "rank": (4, 8), "alpha": (32, 8),
         "dropout": (0.1, 0.0)}  # fmt: skip
FULL_LR = 5e-5  # ours


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and fill in the paper's numbers."""
    usage, raw = "%(prog)s --model MODEL --train ROWS [options]", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("finetune.sh", usage, __doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=("pairs", "classify", "regress"), default="pairs", help="(pairs)")
    files = ".jsonl, .parquet, .csv, or lines of context||target"
    add("--train", required=True, metavar="ROWS", help=f"{files}; or: {', '.join(INSTALLED)}")
    add("--held-out", type=Path, metavar="FILE", help="rows to choose the best checkpoint by")
    add("--test", type=Path, metavar="FILE", help="rows to report on")
    add("--fields", metavar="A,B[,C]", help="columns of text, target and a second text")
    add("--share", type=float, default=0.1, metavar="X", help="of texts to hold out (0.1)")
    add("--rows", type=int, metavar="N", help="train on the first N rows")
    add("--eval-rows", type=int, default=200, metavar="N", help="held-out rows to measure (200)")
    add("--prompt", metavar="TEXT", help="how a context is put, with {text} in it")
    add("--max-tokens", type=int, default=256, metavar="N", help="of a row (256)")
    add = parser.add_argument_group("model and adapter").add_argument
    add("--model", required=True, help="a folder, a name on the hub, smollm2 or minilm")
    add("--load-in", choices=("4bit", "8bit"), help="quantize the base with bitsandbytes")
    add("--method", choices=("lora", "full", "head"), default="lora", help="what trains (lora)")
    add("--config", type=Path, metavar="YAML", help="what to adapt and how, or:")
    add("--targets", nargs="+", metavar="PATTERN", help="layers to adapt")
    for name, what in (("--rank", int), ("--alpha", float), ("--dropout", float)):
        add(name, type=what, metavar="X", help="of --targets")
    add("--init-from", type=Path, metavar="ADAPTER", help="start from another adapter")
    add = parser.add_argument_group("training; as in the paper by default").add_argument
    for name in ("--lr", "--weight-decay", "--label-smoothing", "--epochs", "--warmup"):
        add(name, type=float, metavar="X", help="share of the steps" if "warm" in name else None)
    add("--b-lr-ratio", type=float, default=1.0, metavar="X", help="LoRA+: B learns faster (1)")
    add("--batch", type=int, metavar="N", help="rows of an update, over all processes")
    add("--accumulate", type=int, default=1, metavar="N", help="parts of a batch (1)")
    add("--max-steps", type=int, default=-1, metavar="N", help="instead of epochs")
    add("--patience", type=int, metavar="N", help="stop after N evaluations without a better one")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--gradient-checkpointing", action="store_true")
    add("--seed", type=int, default=0, metavar="N")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--resume", action="store_true", help="go on where the run was stopped")
    add("--eval-every", type=int, metavar="N", help="steps; measure and save (a tenth of all)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints (2)")
    add("--report-to", nargs="+", default="none", metavar="NAME", help="wandb, tensorboard, ...")
    add("--cache", type=Path, default=Path(".finetune"), metavar="FOLDER", help="for downloads")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    for name, numbers in PAPER.items():
        if getattr(args, name) is None:
            full = name == "lr" and args.method == "full"
            setattr(args, name, FULL_LR if full else numbers[args.task != "pairs"])
    return args


if __name__ == "__main__":
    parse(["--help"])  # for finetune.sh, by any Python: nothing here needs the environment

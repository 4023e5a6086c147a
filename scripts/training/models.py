"""The model that is fine-tuned, and what of it trains.

A method is a config of lora_inject: low-rank updates, a head alone, or, for full
fine-tuning, no config at all. What is a head is told by the model: whatever is not its base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from data import minilm, smollm2
from data.packaged import refusal

import lora_inject as li

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["NAMED", "adapt", "config_of", "head_of", "load", "start_from"]

NAMED = {
    "smollm2": (r"self_attn\.[qv]_proj",),
    "minilm": (r"attention\.self\.(query|value)",),
}


def load(
    name: str, task: str, n_labels: int, cache: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: One of `NAMED`, or a folder of transformers.
        task: `pairs`, `classify` or `regress`.
        n_labels: Outputs of the head.
        cache: Where the checkpoint is kept that is made of a GGUF file.
        dtype: Of the weights.

    Raises:
        SystemExit: There is no such model.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    folder = _folder(name, cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "pairs":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, num_labels=n_labels
    )
    if model.config.pad_token_id is None:  # a decoder judges the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model, tokenizer


def _folder(name: str, cache: Path) -> Path:
    if name == "minilm":
        return minilm.find()
    if name == "smollm2":
        folder = cache / "smollm2"
        if not folder.is_dir():
            smollm2.save(smollm2.find(), folder)
        return folder
    if not (Path(name) / "config.json").is_file():
        found = f"no config.json in {name!r}"
        raise refusal("the model", found, f"Give a folder, or one of: {', '.join(NAMED)}")
    return Path(name)


def head_of(model: PreTrainedModel) -> list[str]:
    """Patterns of what a model has beside its base: the head that judges."""
    base = f"{model.base_model_prefix}."
    outside = [name for name, _ in model.named_parameters() if not name.startswith(base)]
    return [rf"^{re.escape(name)}\..*" for name in dict.fromkeys(n.split(".")[0] for n in outside)]


def config_of(args: Any, model: PreTrainedModel) -> dict[str, Any]:
    """What to inject, from a file of the user's or from the options.

    Raises:
        SystemExit: Neither says which layers to adapt, or a new head would never train.
    """
    head = [] if args.task == "pairs" else head_of(model)
    if args.method == "head":
        if not head:
            raise refusal("--method head", "a language model has none", "Use --method lora")
        return {"targets": [], "train": head}
    if args.config is not None:
        config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        if head and not (isinstance(config, dict) and config.get("train")):
            found = "it trains nothing beside low-rank updates, and the head is new"
            raise refusal(f"{args.config}", found, f"Add train: [{', '.join(head)}]")
        return config
    targets = args.targets or NAMED.get(args.model)
    if not targets:
        raise refusal("which layers to adapt", "nothing", "Pass --targets or --config")
    rules = {"rank": args.rank, "alpha": args.alpha, "dropout": args.dropout}
    return {**rules, "targets": list(targets), "train": head}


def adapt(args: Any, model: PreTrainedModel) -> None:
    """Make of a model what the method trains, in place."""
    if args.method == "full":
        return
    config = config_of(args, model)
    li.inject(model, config if args.config is None else str(args.config))
    if args.init_from is not None:
        start_from(model, args.init_from, args.leave_out, args.task)


def start_from(
    model: PreTrainedModel, path: Path, leave_out: Sequence[str] | None, task: str
) -> int:
    """Give the model's adapter the values of another one, but for its head.

    Args:
        model: It carries the adapter `default`.
        path: The other adapter, made on the same base.
        leave_out: Patterns of what not to take; by default the head, where the task has one.
        task: What is learnt.

    Returns:
        How many tensors were taken.

    Raises:
        SystemExit: The other adapter holds something that the model's has no place for.
    """
    if leave_out is None:
        leave_out = [] if task == "pairs" else head_of(model)
    li.load_adapter(model, path, "start", leave_out=leave_out)
    try:
        source, target = (li.adapter_parameters(model, name) for name in ("start", "default"))
        wrong = [k for k, t in source.items() if k not in target or t.shape != target[k].shape]
        if wrong:
            found = f"{len(wrong)} of its tensors have no place here, of which {wrong[0]!r}"
            raise refusal(f"start from {path}", found, "Use its config, or --leave-out")
        with torch.no_grad():
            for key, tensor in source.items():
                target[key].copy_(tensor)
    finally:
        li.eject(model, "start")
    return len(source)

"""What the tests of training share: tiny models and tokenizers, runs of Trainer, and curves."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.models import tiny_llama
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lora_inject as li

CONFIG = {
    "rank": 2,
    "alpha": 4,
    "dropout": 0.1,
    "targets": ["q_proj", "v_proj", "down_proj"],
    "train": [r"model\.norm"],
}


def llama(vocab: int = 17, **changes: Any) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=vocab, **changes)


def injected(config: dict[str, Any] | None = None, **changes: Any) -> LlamaForCausalLM:
    return li.inject(llama(**changes), config or CONFIG)


def rows(n: int = 12, vocab: int = 17) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (n, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class KilledError(Exception):
    """Ends a run in the middle of a step, as a kill would."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


def trainer(
    out: Path, model: Any, *callbacks: TrainerCallback, checkpoint: Any = None, **changes: Any
) -> Trainer:
    """Trainer as a user sets it up; three steps to an epoch of twelve rows."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "use_cpu": True}
    settings |= {"report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True}
    checkpoint = li.AdapterCheckpoint() if checkpoint is None else checkpoint
    return Trainer(
        model,
        TrainingArguments(str(out), **settings | changes),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
        callbacks=[*callbacks, *([checkpoint] if checkpoint else [])],
    )


def curve(record: Sequence[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """Every loss that was logged, with its step."""
    return [(e["step"], k, e[k]) for e in record for k in ("loss", "eval_loss") if k in e]


def tokenizer(out: Path) -> Path:
    """A tokenizer of single characters."""
    words = ["<end>", "<pad>", "<unk>", *string.printable]
    inside = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inside.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inside, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    made.save_pretrained(out)
    return out


def llama_folder(out: Path, **changes: Any) -> Path:
    changes |= {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    llama(vocab=103, **changes).save_pretrained(out)
    return tokenizer(out)


def as_peft(model: Any, start: dict[str, torch.Tensor], **options: Any) -> Any:
    """The same model under PEFT, with equal A and B."""
    options |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
    held = {k.replace(".default.weight", ""): p for k, p in wrapped.named_parameters()}
    held = {k.replace("agnitude_vector", ""): p for k, p in held.items()}
    with torch.no_grad():
        for key, tensor in start.items():
            held[f"base_model.model.{key}"].copy_(tensor)
    return wrapped

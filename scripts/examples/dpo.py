"""DPO with TRL: the reference is the same model without its adapter, so no second base is loaded.

    python scripts/examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

Each line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lora_inject as li


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", default="dpo-adapter")
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    li.inject(model, {"rank": 8, "targets": ["all-linear"]})

    rows = [json.loads(line) for line in asked.data.read_text().splitlines() if line.strip()]
    settings = DPOConfig(
        f"{asked.out}-run",
        max_steps=asked.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model,
        ref_model=li.reference(model),  # shares the weights, runs under `disabled`
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # At the start both models are one, so the first loss is log 2.
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    trainer.save_model(asked.out)


if __name__ == "__main__":
    main()

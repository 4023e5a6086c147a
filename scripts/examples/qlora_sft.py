r"""QLoRA with TRL's SFTTrainer: a base in four bits, an adapter on every linear layer, chat rows.

    python scripts/examples/qlora_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data chat.jsonl

Each line of the data is {"messages": [{"role": "user", "content": ...}, ...]}.
The adapter is a folder that PEFT and vLLM read as well.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import lora_inject as li

CONFIG = {"rank": 8, "alpha": 16, "dropout": 0.05, "targets": ["all-linear"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines with `messages`")
    parser.add_argument("--out", default="qlora-adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    asked = parser.parse_args(arguments)

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, quantization_config=nf4, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    li.inject(model, CONFIG)  # quantize first, inject second
    print(li.summary(model))

    rows = [json.loads(line) for line in asked.data.read_text().splitlines() if line.strip()]
    settings = SFTConfig(
        f"{asked.out}-run",
        max_steps=asked.steps,
        per_device_train_batch_size=asked.batch,
        learning_rate=2e-4,
        logging_steps=max(1, asked.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(asked.out)  # the adapter alone
    tokenizer.save_pretrained(asked.out)
    print(f"saved {asked.out}: load it with li.load_adapter(the same base, {asked.out!r})")


if __name__ == "__main__":
    main()

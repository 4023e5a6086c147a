"""Lightning's Trainer on an adapted model; only the adapter is written to its checkpoints.

python scripts/examples/lightning_fit.py --model HuggingFaceTB/SmolLM2-135M --data text.txt
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_inject as li


class Tuning(lightning.LightningModule):
    """A causal language model and its adapter.

    Args:
        model: An adapted model.
        lr: The learning rate of A; B gets four times as much (LoRA+).
    """

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.losses: list[float] = []
        self.strict_loading = False  # a checkpoint holds the adapter, not the base

    def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(li.parameter_groups(self.model, lr=self.lr, b_lr_ratio=4))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]  # the adapter's tensors, and what they mean
        checkpoint["state_dict"] = {key: value for key, value in state.items() if "lora_" in key}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--data", required=True, type=Path, help="a text file")
    parser.add_argument("--out", default="lightning-adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    asked = parser.parse_args(arguments)

    lightning.seed_everything(0)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    ids = torch.tensor(tokenizer(asked.data.read_text())["input_ids"])
    rows = ids[: len(ids) // asked.length * asked.length].view(-1, asked.length)
    if not len(rows):
        parser.error(f"--data has {len(ids)} tokens, less than one row of --length {asked.length}")

    li.inject(model, {"rank": 8, "targets": ["all-linear"]})
    tuning = Tuning(model, lr=1e-3)
    trainer = lightning.Trainer(
        max_steps=asked.steps,
        default_root_dir=f"{asked.out}-run",
        logger=False,
        enable_progress_bar=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(tuning, torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True))
    li.save_adapter(model, asked.out)
    print(f"loss {tuning.losses[0]:.3f} -> {tuning.losses[-1]:.3f}; saved {asked.out}")


if __name__ == "__main__":
    main()

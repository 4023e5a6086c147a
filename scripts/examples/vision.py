"""A vision transformer with a new head: the head trains with the adapter and travels with it.

    python scripts/examples/vision.py --model google/vit-base-patch16-224-in21k [--steps 100]

The data here is made: is the upper or the lower half of the picture brighter?
"""

import argparse

import torch
from transformers import AutoModelForImageClassification

import lora_inject as li

# Older releases of transformers call the two layers query and value.
TARGETS = [r"attention\.([qv]_proj|query|value)"]
CONFIG = {"rank": 8, "targets": TARGETS, "train": ["classifier"]}


def batch(size: int, channels: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (rows, channels, size, size) and labels (rows,) in {0, 1}."""
    labels = torch.randint(0, 2, (rows,))
    pictures = torch.randn(rows, channels, size, size)
    half = size // 2
    pictures[:, :, :half] += labels.view(-1, 1, 1, 1)
    pictures[:, :, half:] += 1 - labels.view(-1, 1, 1, 1)
    return pictures, labels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--out", default="vision-adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    asked = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(asked.model, num_labels=2)
    li.inject(model, CONFIG)
    print(li.summary(model))
    optimizer = torch.optim.AdamW(li.parameter_groups(model, lr=asked.lr))
    size, channels = model.config.image_size, model.config.num_channels
    for step in range(asked.steps):
        pictures, labels = batch(size, channels, asked.rows)
        out = model(pixel_values=pictures, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        right = (out.logits.argmax(-1) == labels).float().mean().item()
        print(f"step {step + 1}: loss {out.loss.item():.3f}, {right:.0%} right")
    li.save_adapter(model, asked.out)


if __name__ == "__main__":
    main()

"""Several adapters trained in one batch: one pass of the base, each row under its own adapter.

    python scripts/examples/many_adapters.py [--tasks 4] [--steps 100]

Four tasks, four adapters, one base. An adapter gets its gradient from its own rows only: the end
compares one adapter with the same adapter trained alone.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import lora_inject as li


def rows_of(task: int, width: int, step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """A batch of one task: x, and x turned by an angle of that task."""
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, x.roll(task + 1, dims=1)


def train(model: nn.Module, tasks: dict[str, int], width: int, steps: int) -> dict[str, float]:
    """Train one adapter for each task, all in each batch.

    Returns:
        The last loss of each.
    """
    optimizer = torch.optim.AdamW(li.parameter_groups(model, lr=1e-2))
    losses = {}
    for step in range(steps):
        batches = [rows_of(task, width, step) for task in tasks.values()]
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        n = len(tasks)
        names = [name for name, (rows, _) in zip(tasks, batches, strict=True) for _ in rows]
        with li.routed(model, names):
            out = model(x)
        # A mean over each task's own rows: a mean over the batch would mix their scales.
        each = [(a - b).square().mean() for a, b in zip(out.chunk(n), y.chunk(n), strict=True)]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        losses = dict(zip(tasks, (loss.item() for loss in each), strict=True))
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=16)
    asked = parser.parse_args(arguments)

    torch.manual_seed(0)
    width, hidden = asked.width, 4 * asked.width
    base = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).double()
    tasks = {f"turn-{i + 1}": i for i in range(asked.tasks)}

    model = copy.deepcopy(base)
    for name, seed in tasks.items():
        torch.manual_seed(seed)
        li.inject(model, {"rank": 4, "targets": ["all-linear"]}, name)
    li.train_only(model, tasks)
    together = train(model, tasks, width, asked.steps)
    for name, loss in together.items():
        print(f"{name}: {loss:.4f}")

    name = next(iter(tasks))
    alone = copy.deepcopy(base)
    torch.manual_seed(tasks[name])
    li.inject(alone, {"rank": 4, "targets": ["all-linear"]}, name)
    train(alone, {name: tasks[name]}, width, asked.steps)
    pairs = zip(
        li.adapter_parameters(model, name).values(),
        li.adapter_parameters(alone, name).values(),
        strict=True,
    )
    furthest = max((a - b).abs().max().item() for a, b in pairs)
    print(f"{name} trained with the others differs from the same trained alone by {furthest:.1e}")
    if furthest > 1e-9:
        raise SystemExit("the other rows leaked into this adapter")


if __name__ == "__main__":
    main()

"""A model that no library knows: plan, inject, train, merge, compare with the dense weight.

    python scripts/examples/own_module.py [--steps 200] [--width 32]

The model reads one of its weights (`mix`) and calls the others; both kinds are adapted. The task:
the running sum of the reversed sequence.
"""

import argparse

import torch
from torch import Tensor, nn

import lora_inject as li


class Block(nn.Module):
    """Attention with one head, and a matrix that is read, never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Wq, self.Wk, self.Wv = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.Wq(x) @ self.Wk(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return self.norm(x + scores.softmax(-1) @ self.Wv(x) @ self.mix)


CONFIG = {
    "rank": 4,
    "alpha": 8,
    "targets": [
        "W[qv]",  # layers that are called: the update is added to their output
        {"match": "mix", "layout": "in_out"},  # a parameter that is read: it reads as W + delta
    ],
    "expect": {"sites": 6},  # an error if the model ever has more or fewer
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=32)
    asked = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(Block(asked.width), Block(asked.width))
    inputs = torch.randn(64, 6, asked.width)
    targets = inputs.flip(1).cumsum(1).tanh()

    print(li.plan(model, CONFIG))  # before anything changes
    # The probe runs the model once: a layer that takes no part would be an error.
    li.inject(model, CONFIG, probe=lambda: model(inputs[:1]))
    print(li.summary(model))

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    optimizer = torch.optim.AdamW(li.parameter_groups(model, lr=1e-2, b_lr_ratio=4), fused=True)
    first = loss().item()
    for _ in range(asked.steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    print(f"loss {first:.3f} -> {loss().item():.3f}")

    # What the adapter means: the plain model with W + scale * B @ A in place of W.
    with torch.no_grad():
        adapted = model(inputs)
        state = li.adapter_state(model)
        li.eject(model)
        for name, site in state.sites.items():
            weight = model.get_parameter(name if name.endswith("mix") else f"{name}.weight")
            delta = site.scale * site.B @ site.A
            weight += delta.T if name.endswith("mix") else delta
        difference = (model(inputs) - adapted).abs().max().item()
    print(f"dense W + delta differs from the adapted model by {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the adapted model is not the dense one")


if __name__ == "__main__":
    main()

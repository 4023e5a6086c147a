"""Programs that serve adapters, one file for each: start it on a base, give it an adapter's file.

Each file has `CHECK`, its name for `lora-inject check --for` (None if it has none); `FILES`, the
formats that it is given; `version()`; and `start(base)`, which returns a function from an adapter
(None for the base alone) to what `outputs` gives for transformers' or diffusers' model. A refusal
is an exception. `versioned()`, if there is one, is the name with a version.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPTextModel

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [300, 7, 8, 9, 7, 200]])
sys.path.append(str(Path(__file__).parents[2]))  # cases.py has a model from there
SOURCES = Path()  # of a program that is not installed
Outputs = Callable[[Path | None], Tensor]


def base_model(base: Path) -> Any:
    """Load a model of transformers or diffusers in float32."""
    config = json.loads((base / "config.json").read_text())
    if "_class_name" not in config:
        kind: Any = CLIPTextModel if base.name == "clip" else AutoModelForCausalLM
        return kind.from_pretrained(base, dtype=torch.float32).eval()
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_pretrained(base).eval()


def outputs(model: Any) -> Tensor:
    """Return log-probabilities after each token, or the output of an image model."""
    numbers = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    with torch.no_grad():
        if hasattr(model, "lm_head"):
            return model(IDS).logits.log_softmax(-1)
        if isinstance(model, CLIPTextModel):
            return model(IDS).last_hidden_state
        if hasattr(model, "conv_in"):
            return model(noise(1, 4, 8, 8), 10, noise(1, 5, 16)).sample
        if "caption_projection_dim" in model.config:
            return model(noise(1, 4, 8, 8), noise(1, 5, 16), noise(1, 16), torch.ones(1)).sample
        text, image = torch.zeros(5, 3), torch.cartesian_prod(*map(torch.arange, (1.0, 2.0, 2.0)))
        return model(
            noise(1, 4, 64), noise(1, 5, 32), noise(1, 32), torch.tensor([0.5]), image, text
        ).sample


def with_updates(base: Path, updates: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs of the base with `updates` added to its modules' weights."""
    model = base_model(base)
    if updates.keys() & {"lm_head", "model.embed_tokens"}:
        untie(model)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update
    return outputs(model)


def untie(model: Any) -> None:
    """Give the head a weight of its own: an adapter of one tied layer is not the other's."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())

"""PEFT, on transformers' model."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from programs import Outputs, base_model, outputs

CHECK = "peft"
FILES = ("peft", "portable", "merged")


def version() -> str:
    return "PEFT " + importlib.metadata.version("peft")


def start(base: Path) -> Outputs:
    from peft import PeftModel

    def run(path: Path | None) -> torch.Tensor:
        model = base_model(base)
        return outputs(model if path is None else PeftModel.from_pretrained(model, path).eval())

    return run

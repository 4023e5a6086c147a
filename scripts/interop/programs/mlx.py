"""mlx-lm, on a CPU."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from programs import IDS, Outputs

CHECK = "mlx"
FILES = ("mlx", "merged")


def version() -> str:
    return "mlx-lm " + importlib.metadata.version("mlx-lm")


def start(base: Path) -> Outputs:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    def run(path: Path | None) -> torch.Tensor:
        model = load_model(base)[0]
        if path is not None:
            model = load_adapters(model, str(path))
        model.eval()
        logits = model(mx.array(IDS.numpy())).astype(mx.float32)
        return torch.tensor(logits.tolist()).log_softmax(-1)

    return run

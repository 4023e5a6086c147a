"""torchtune's own exporter to PEFT, on the files that it would have written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import torch

from programs import Outputs, with_updates
from programs.cases import CASES as ALL

CHECK = None
FILES = ("torchtune",)
CASES = {name: case for name, case in ALL.items() if case.base == "llama"}


def version() -> str:
    return "torchtune " + importlib.metadata.version("torchtune")


def start(base: Path) -> Outputs:
    # Its package wants an older torchao; this file of it needs torch only.
    file = importlib.metadata.distribution("torchtune").locate_file("torchtune")
    spec = importlib.util.spec_from_file_location(
        "convert_weights", Path(str(file)) / "models/convert_weights.py"
    )
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)

    def run(path: Path | None) -> torch.Tensor:
        if path is None:
            return with_updates(base, {})
        tensors = torch.load(path / "adapter_model.pt", weights_only=True)
        found = theirs.tune_to_peft_adapter_weights(tensors, num_heads=2, num_kv_heads=1, dim=128)
        found = {key: tensor.float() for key, tensor in found.items()}
        said = json.loads((path / "adapter_config.json").read_text())
        names = [key.removesuffix(".lora_A.weight") for key in found if ".lora_A." in key]
        scale = said["lora_alpha"] / said["r"]
        updates = {
            name.removeprefix("base_model.model."): scale
            * (found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"])
            for name in names
        }
        return with_updates(base, updates)

    return run

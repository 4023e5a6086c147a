"""litgpt, live and after its own merge; the worse of the two counts."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from programs import IDS, Outputs, base_model
from programs.cases import CASES as ALL
from programs.cases import SIZES

CHECK = None
FILES = ("litgpt",)
CASES = {name: case for name, case in ALL.items() if case.base == "llama"}


def version() -> str:
    return "litgpt " + importlib.metadata.version("litgpt")


def start(base: Path) -> Outputs:
    import yaml
    from litgpt.lora import GPT, Config, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    def run(path: Path | None) -> torch.Tensor:
        said: dict[str, Any] = {}
        if path is not None:
            said = yaml.safe_load((path / "hyperparameters.yaml").read_text())
        config = Config(
            n_layer=SIZES["num_hidden_layers"], n_embd=SIZES["hidden_size"],
            n_head=SIZES["num_attention_heads"], n_query_groups=SIZES["num_key_value_heads"],
            intermediate_size=SIZES["intermediate_size"], vocab_size=SIZES["vocab_size"],
            padded_vocab_size=SIZES["vocab_size"], bias=False, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False,
            norm_eps=1e-6, block_size=64,
            **{key: value for key, value in said.items() if key.startswith("lora_")},
        )  # fmt: skip
        state: dict[str, torch.Tensor] = {}
        copy_weights_hf_llama(config, {}, state, dict(base_model(base).state_dict()))
        model = GPT(config)
        if path is not None:
            state |= torch.load(path / "lit_model.pth.lora", weights_only=True)["model"]
        model.load_state_dict(state, strict=True)
        model.eval()
        with torch.no_grad():
            live = model(IDS).log_softmax(-1)
            merge_lora_weights(model)
            merged = model(IDS).log_softmax(-1)
        torch.testing.assert_close(merged, live, rtol=0, atol=1e-4)
        return live

    return run

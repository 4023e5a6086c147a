"""Reads the folder of torchtune's adapter checkpoints: `adapter_model.pt` and a config.

Names are torchtune's (`layers.0.attn.q_proj.lora_a.weight`), and the rows of B of q and k have the
order of Meta's code if torchtune permutes them. All sites have one rank and one alpha. A folder
that also has `adapter_model.safetensors`, which it writes for models of transformers, is PEFT's.

Source: torchtune 0.6.1, models/convert_weights.py (`tune_to_peft_adapter_weights`, `_FROM_HF`),
training/checkpointing/_checkpointer.py, modules/peft/_utils.py.
"""

from __future__ import annotations

from pathlib import Path

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_table
from lora_inject.errors import FormatError
from lora_inject.formats.decoder_names import Decoder
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import plain_site
from lora_inject.formats.pickles import read_pickle

FILES, CONFIG = ("adapter_model.pt", "adapter_0.pt"), "adapter_config.json"
_NAMES = {
    "lm_head": "output",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
_ENDS = (".lora_a.weight", ".lora_b.weight")
IN_PAIRS = {"llama": True, "mistral": True, "qwen2": False}
"""By `model_type`: whether torchtune's rows of q and k are in pairs."""


def detects(files: Files) -> bool:
    """Whether a path is such a folder."""
    return files.has(*FILES) and not files.has("adapter_model.safetensors")


def read(
    path: Path, facts: ModelFacts, *, alpha: float | None = None, allow_pickle: bool = False
) -> AdapterState:
    """Read an adapter checkpoint of torchtune, under transformers' names.

    `alpha` is the recipe's `lora_alpha`, for folders without an adapter_config.json, `allow_pickle`
    as in `pickles.read_pickle`.
    """
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise FormatError("", f"there is no {FILES[0]} in it", "Give the folder of an epoch")
    tensors = read_pickle(file, allow=allow_pickle)
    if alpha is None and (path / CONFIG).is_file():
        alpha = parse_table((path / CONFIG).read_bytes(), CONFIG).get("lora_alpha")
    if type(alpha) not in (int, float):
        raise FormatError("", f"no {CONFIG} says its alpha", "Pass alpha=..., as in the recipe")
    remedy = "DoRA and modules of several parts are not read"
    pairs = _decoder(facts).read(tensors, facts, remedy)
    return AdapterState({n: plain_site(n, a, b, alpha) for n, (a, b) in pairs.items()})


def _decoder(facts: ModelFacts) -> Decoder:
    others = "; for others torchtune writes PEFT folders"
    kind = facts.model_type(IN_PAIRS, "the order of the rows of q and k", others)
    return Decoder(_NAMES, "layers.{}.", _ENDS, IN_PAIRS[kind])

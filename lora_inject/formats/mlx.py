"""The folder of mlx-lm: `adapters.safetensors` and `adapter_config.json`.

Pairs are transposed: `NAME.lora_a` is `(in, r)` and `NAME.lora_b` is `(r, out)`, for an embedding
`(tokens, r)` and `(r, width)`. The config has one rank and one scale (not alpha) for all of them.
Names are those of transformers for the models that mlx-lm loads unchanged; a name that its model
lacks is an error there. With full names as keys mlx-lm adapts exactly these layers, whatever its
config's number of layers.

Source: mlx-lm 0.32.2, tuner/utils.py (`load_adapters`, `linear_to_lora_layers`), tuner/lora.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import is_positive, parse_table
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import leaf
from lora_inject.errors import FormatError
from lora_inject.formats.format import Files, part_of_folder
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import matrices, plain_site, plain_sites

FILE, CONFIG = "adapters.safetensors", "adapter_config.json"


def detects(files: Files) -> bool:
    """Whether a path is such a folder, or its file of tensors, which is known by its keys."""
    keys = files.tensor_names()
    return files.has(FILE) or (bool(keys) and all(k.endswith((".lora_a", ".lora_b")) for k in keys))


def write(
    state: AdapterState, _path: Path, facts: ModelFacts, *, dtype: str | None = None
) -> dict[str, bytes]:
    """Write an adapter of linear layers and embeddings as a folder of mlx-lm.

    If sites differ in rank or scale, ranks are padded with zeros and scales folded into B. If an
    embedding or a head is adapted, the base's config is needed: mlx-lm computes the head of a tied
    model with the adapted embedding, and has no layer for an adapter of such a head.
    """
    kinds = ("linear", "embedding")
    sites = plain_sites(state, "mlx-lm", kinds, dtype=dtype, one_rank=True, alpha="one")
    for name, site in sites.items():
        if site.spec.kind == "embedding" or leaf(name) == "lm_head":
            facts.refuse_tied(name, "mlx-lm")
    tensors = {f"{n}.lora_a": s.A.T for n, s in sites.items()}
    tensors |= {f"{n}.lora_b": s.B.T for n, s in sites.items()}
    first = next(iter(sites.values()))
    numbers = {"rank": first.spec.rank, "scale": first.scale, "dropout": 0.0}
    said = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {**numbers, "keys": sorted(sites)},
    }
    content = (json.dumps(said, indent=2) + "\n").encode()
    return {FILE: serialize(tensors, {"format": "mlx"}), CONFIG: content}


def read(path: Path, facts: ModelFacts) -> AdapterState:
    """Read a folder of mlx-lm; embeddings are recognized when it is loaded onto a model.

    If the base is known, an adapter of an embedding that is tied to the head is refused.
    """
    rank, scale = _numbers(path)
    tensors, _ = read_tensors(path / FILE)
    sites = {}
    remedy = "Fuse it with mlx_lm.fuse; experts and DoRA are not read"
    for name, (a, b) in matrices(tensors, (".lora_a", ".lora_b"), remedy).items():
        if a.shape[1] != rank:
            problem = f"its tensors have rank {a.shape[1]}, {CONFIG} says {rank}"
            remedy = "The two do not belong together; fetch them again"
            raise FormatError(f"site '{name[:200]}'", problem, remedy)
        if facts.config and re.search("emb|wte", leaf(name)):
            facts.refuse_tied(name, "mlx-lm")
        sites[name] = plain_site(name, a.T.contiguous(), b.T.contiguous(), scale * rank)
    return AdapterState(sites)


def _numbers(path: Path) -> tuple[int, float]:
    """Return the rank and the scale of all sites."""
    file = part_of_folder(path, CONFIG, "It holds the rank and the scale; give a folder with it")
    config = parse_table(file.read_bytes(), CONFIG)
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise FormatError(CONFIG, f"fine_tune_type is {kind!r}", "Fuse it with mlx_lm.fuse")
    said = config.get("lora_parameters")
    numbers: dict[str, Any] = said if isinstance(said, dict) else {}
    rank: Any = numbers.get("rank")
    scale: Any = numbers.get("scale")
    if type(rank) is int and is_positive(rank) and is_positive(scale):
        return rank, float(scale)
    problem = f"'lora_parameters' gives rank {str(rank)[:40]} and scale {str(scale)[:40]}"
    raise FormatError(CONFIG, problem, "Correct the file; both are needed")

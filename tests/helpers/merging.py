"""Small checkpoints, merges into them, and the textbook formula that each merge is held to.

What a merge wrote is read by safetensors alone, and compared with `W + weight * scale * B A`,
formed in float64 from the base's file and the adapter's A and B, and rounded once.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers.states import Site, effect, linear, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
Tensors = Mapping[str, Tensor]


def llama_tensors(
    layers: int = 2, hidden: int = 16, inner: int = 24, vocab: int = 32,
    dtype: torch.dtype = torch.bfloat16, head: bool = True, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, hidden),
        "model.norm": (hidden,),
    }
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj": (hidden, hidden),
            f"model.layers.{i}.self_attn.v_proj": (hidden // 2, hidden),
            f"model.layers.{i}.mlp.up_proj": (inner, hidden),
            f"model.layers.{i}.mlp.down_proj": (hidden, inner),
            f"model.layers.{i}.input_layernorm": (hidden,),
        }
    if head:
        shapes["lm_head"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(seed)
    values = {name: 0.05 * torch.randn(*s, generator=generator) for name, s in shapes.items()}
    return {f"{name}.weight": tensor.to(dtype) for name, tensor in values.items()}


def save_checkpoint(
    folder: Path, tensors: Tensors, shards: int = 1, config: Any = None, stem: str = "model"
) -> Path:
    """Write a checkpoint as transformers does: one file, or several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors", {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for s in range(shards):
        part = {name: tensors[name] for name in list(tensors)[s::shards]}
        file = f"{stem}-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Read all tensors with the reference library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def adapter_of(tensors: Tensors, *ends: str, seed: int = 1, **rule: Any) -> li.AdapterState:
    """An adapter on the matrices of a checkpoint whose names end so, each a linear layer's."""
    names = [name.removesuffix(".weight") for name in tensors]
    rows = [
        linear(name, *reversed(tensors[f"{name}.weight"].shape), **rule)
        for name in names
        if name.endswith(ends or ("q_proj", "v_proj", "down_proj"))
    ]
    return state_of(*rows, seed=seed, size=0.3)


def dense(
    tensors: Tensors, *weighted: tuple[li.AdapterState, float], turned: tuple[str, ...] = (),
    rows: tuple[Site, ...] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """Every tensor with the updates of adapters in it.

    `turned` are the square weights that lie (in, out), `rows` the sites with slices.
    """
    known = {row.name: row for row in rows}
    sums: dict[str, Any] = {}
    for state, weight in weighted:
        for name, held in state.sites.items():
            key = name if name in tensors else f"{name}.weight"
            update = effect(held, known.get(name))
            shape = tuple(tensors[key].shape)
            matrix = shape if update.dim() == 3 else (shape[0], math.prod(shape[1:]))
            update = update.mT if name in turned or tuple(update.shape) != matrix else update
            sums[key] = sums.get(key, 0) + weight * update.reshape(shape)
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for key, update in sums.items():
        out[key] = (tensors[key].double() + update).to(tensors[key].dtype)
    return out


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance of floats of sixteen bits in units in the last place, element by element."""

    def ordered(t: Tensor) -> Tensor:
        wide = t.contiguous().view(torch.int16).long()
        return torch.where(wide < 0, torch.iinfo(torch.int16).min - wide, wide)

    return (ordered(a) - ordered(b)).abs()


def same_tensors(found: Tensors, wanted: Tensors, touched: Any) -> None:
    """Untouched tensors have the same bits; touched ones are at most one ulp off, and rarely."""
    assert found.keys() == wanted.keys()
    off = total = 0
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if name not in touched:
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
        elif tensor.dtype in {torch.float32, torch.float64}:  # sums differ in the last bits
            bound = 1e-6 if tensor.dtype == torch.float32 else 1e-14
            assert torch.allclose(found[name], tensor, rtol=bound, atol=bound), name
        else:
            distance = ulps(found[name], tensor)
            # Where W and its update cancel, the sum has the last bits of float32.
            rest = (found[name].double() - tensor.double()).abs() / tensor.double().abs().max()
            assert ((distance <= 1) | (rest < 1e-6)).all(), name
            off, total = off + int((distance > 0).sum()), total + tensor.numel()
    assert off <= 0.001 * total + 1, f"{off} of {total}"


def merge(base: Path, adapters: Any, out: Path, progress: Any = None, **options: Any) -> Any:
    """Merge and verify; returns the report."""
    said = li.classes.MergeOptions(**{"verify": True, **options})
    return li.merge_checkpoint(base, adapters, out, options=said, progress=progress)


def merged(
    parent: Path, tensors: Tensors, *adapters: Any, shards: int = 1, config: Any = None,
    **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Merge adapters into a checkpoint of such tensors; return the tensors that come out."""
    base = save_checkpoint(parent / "base", tensors, shards, config)
    merge(base, [*adapters], parent / "out", **options)
    return load_checkpoint(parent / "out")


def hold_merged(
    out: Path, tensors: Tensors, *adapters: li.AdapterState | tuple[li.AdapterState, float],
    **how: Any,
) -> None:  # fmt: skip
    """Hold that a folder has what the formula makes of adapters, and all else as it was."""
    weighted = [given if isinstance(given, tuple) else (given, 1.0) for given in adapters]
    names = {name for state, _ in weighted for name in state.sites}
    touched = names | {f"{name}.weight" for name in names}
    same_tensors(load_checkpoint(out), dense(tensors, *weighted, **how), touched)


def merged_model(model: Any, adapter: Any, folder: Path) -> Any:
    """Save a model, merge an adapter's files into it, and load the model that comes out."""
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    merge(folder / "base", [adapter], folder / "merged")
    return type(model).from_pretrained(folder / "merged").eval()

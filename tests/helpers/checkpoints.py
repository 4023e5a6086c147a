"""Small checkpoints and adapters, and the dense reference that merges are compared with."""

import json
import math
from pathlib import Path

import torch
from helpers.adapter_states import dense as delta_of
from safetensors.torch import load_file, save_file

from lora_inject.checkpoint import (
    Checkpoint,
    MergeOptions,
    merge_checkpoint,
    read_weighted,
    verify_checkpoint,
)
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


def llama_tensors(layers=2, hidden=16, inner=24, vocab=32, dtype=torch.bfloat16, head=True, seed=0):
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
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
    g = torch.Generator().manual_seed(seed)
    values = {name: 0.05 * torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    return {f"{name}.weight": t.to(dtype) for name, t in values.items()}


def save_checkpoint(folder, tensors, shards=1, config=None, stem="model"):
    """Write a checkpoint as transformers does: one file, or several and an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for s in range(shards):
        part = {name: tensors[name] for name in list(tensors)[s::shards]}
        file = f"{stem}-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def load_checkpoint(folder):
    """Read all tensors with the reference library."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def site(name, weight_shape, rank=2, alpha=4.0, seed=1, size=0.3, **kwargs):
    """Make a site with random A and B; shapes from the weight's, `transposed` and `experts`."""
    g = torch.Generator().manual_seed(seed * 7919 + sum(map(ord, name)))
    experts, transposed = kwargs.get("experts"), kwargs.get("transposed", False)
    matrix = weight_shape[1:] if experts else weight_shape
    rows, cols = matrix[0], math.prod(matrix[1:])
    n_in, n_out = (rows, cols) if transposed else (cols, rows)
    kind = kwargs.pop("kind", "parameter" if experts else "linear")
    spec = SiteSpec(name, kind, n_in, n_out, tuple(weight_shape), rank, alpha, **kwargs)
    A = size * torch.randn(*spec.a_shape, generator=g)
    B = size * torch.randn(*spec.b_shape, generator=g)
    return SiteState(spec, A, B)


def adapter(*sites, **kwargs):
    return AdapterState({s.spec.name: s for s in sites}, **kwargs)


def llama_adapter(tensors, leaves=("q_proj", "v_proj", "down_proj"), seed=1, **kwargs):
    """An adapter on all projections of a checkpoint that end in one of `leaves`."""
    return adapter(
        *(
            site(name.removesuffix(".weight"), tuple(t.shape), seed=seed, **kwargs)
            for name, t in tensors.items()
            if name.removesuffix(".weight").endswith(leaves)
        )
    )


def weight_name(spec):
    return spec.weight or (spec.name if spec.kind == "parameter" else spec.name + ".weight")


def dense(tensors, *weighted):
    """Merge in float64 by the textbook formula and round once: the independent reference."""
    sums = {}
    for state, weight in weighted:
        for s in state.sites.values():
            name = weight_name(s.spec)
            sums[name] = sums.get(name, 0) + weight * delta_of(s)
    out = {name: t.clone() for name, t in tensors.items()}
    for name, delta in sums.items():
        w = tensors[name]
        out[name] = (w.double() + delta.reshape(w.shape)).to(w.dtype)
    return out


def ulps(a, b):
    """Distance of floats of sixteen bits in units in the last place, element by element."""

    def ordered(t):
        wide = t.contiguous().view(torch.int16).long()
        return torch.where(wide < 0, torch.iinfo(torch.int16).min - wide, wide)

    return (ordered(a) - ordered(b)).abs()


def assert_equal_to_dense(found, wanted, touched):
    """Untouched tensors have the same bits; touched ones are at most one ulp off, and rarely."""
    assert found.keys() == wanted.keys()
    off = total = 0
    for name, t in wanted.items():
        assert found[name].dtype == t.dtype, name
        assert found[name].shape == t.shape, name
        if name not in touched:
            assert torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)), name
            continue
        if t.dtype in {torch.float32, torch.float64}:  # sums differ in the last bits
            bound = 1e-6 if t.dtype == torch.float32 else 1e-14
            assert torch.allclose(found[name], t, rtol=bound, atol=bound), name
            continue
        distance = ulps(found[name], t)
        assert int(distance.max()) <= 1, name
        off, total = off + int((distance > 0).sum()), total + t.numel()
    assert off <= 0.001 * total + 1, f"{off} of {total}"


def merge(base, adapters, out, progress=None, **options):
    return merge_checkpoint(base, adapters, out, options=MergeOptions(**options), progress=progress)


def merged(tmp_path, tensors, *adapters, shards=1, config=None, **options):
    """Merge adapters into a checkpoint of such tensors; return the tensors that come out."""
    base = save_checkpoint(tmp_path / "base", tensors, shards, config)
    merge(base, [*adapters], tmp_path / "out", **options)
    return load_checkpoint(tmp_path / "out")


def merged_on_disk(model, adapter, folder):
    """Save a model, merge an adapter's files into it, and load the model that comes out."""
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    base = Checkpoint.open(folder / "base")
    merge(base, [read_weighted(adapter, base)], folder / "merged")
    return type(model).from_pretrained(folder / "merged").eval()


def assert_verified(base, adapters, out, **options):
    assert verify_checkpoint(base, adapters, out, options=MergeOptions(**options)).problems == ()


def assert_merged(out, tensors, *adapters):
    """A folder holds what the dense reference makes of adapters, each a value or with a weight."""
    weighted = [a if isinstance(a, tuple) else (a, 1.0) for a in adapters]
    touched = {weight_name(s.spec) for state, _ in weighted for s in state.sites.values()}
    assert_equal_to_dense(load_checkpoint(out), dense(tensors, *weighted), touched)

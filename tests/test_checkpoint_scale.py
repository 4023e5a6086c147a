"""Large, strange and hostile: 671B parameters, fingerprints, Ctrl-C, memory."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_verified,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    merge,
    save_checkpoint,
    site,
)
from helpers.versions import needs_transformers_5
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_inject.checkpoint import (
    Checkpoint,
    MergeOptions,
    WeightedAdapter,
    merge_checkpoint,
    plan_merge,
    read_weighted,
)
from lora_inject.checkpoint.write import write_shard
from lora_inject.core.adapter.fingerprint import Fingerprint, samples
from lora_inject.core.files.safetensors_file import build_header, read_header
from lora_inject.errors import CheckpointError, LoraInjectError
from lora_inject.formats import write_adapter

# Fingerprints -----------------------------------------------------------------------------------


def with_fingerprint(state, tensors):
    names = [n + ".weight" for n in state.sites]
    shapes = {n: tuple(tensors[n].shape) for n in names}
    return replace(state, fingerprint=Fingerprint(shapes, samples({n: tensors[n] for n in names})))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_base_of_the_same_shape_is_refused(tmp_path, prefix):
    tensors, other = llama_tensors(seed=0), llama_tensors(seed=1)
    state = with_fingerprint(llama_adapter(tensors), tensors)

    def filed(t):
        return {n.removeprefix(prefix): v for n, v in t.items()}

    base = save_checkpoint(tmp_path / "base", filed(other), 1, LLAMA)
    with pytest.raises(CheckpointError, match=r"another base: 6 of 6 weights differ.*any_base"):
        plan_merge(base, [state])
    plan_merge(base, [state], options=MergeOptions(any_base=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_base_in_another_dtype_is_not(tmp_path, dtype):
    tensors = llama_tensors(dtype=torch.float32)
    state = with_fingerprint(llama_adapter(tensors), tensors)
    cast = {n: t.to(dtype) for n, t in tensors.items()}
    plan_merge(save_checkpoint(tmp_path / "base", cast, 1, LLAMA), [state])


# 671 billion parameters -------------------------------------------------------------------------


HEAD = 8192


def deepseek_v3():
    """Names and shapes of DeepSeek-V3's checkpoint, in bfloat16, layer by layer."""
    h, dense_inner, inner, experts = 7168, 18432, 2048, 256
    yield "model.embed_tokens.weight", (129280, h)
    for i in range(61):
        p = f"model.layers.{i}."
        yield p + "self_attn.q_a_proj.weight", (1536, h)
        yield p + "self_attn.q_a_layernorm.weight", (1536,)
        yield p + "self_attn.q_b_proj.weight", (24576, 1536)
        yield p + "self_attn.kv_a_proj_with_mqa.weight", (576, h)
        yield p + "self_attn.kv_b_proj.weight", (32768, 512)
        yield p + "self_attn.o_proj.weight", (h, 16384)
        width = dense_inner if i < 3 else inner
        where = ["mlp."] if i < 3 else ["mlp.shared_experts."]
        where += [] if i < 3 else [f"mlp.experts.{e}." for e in range(experts)]
        for w in where:
            yield p + w + "gate_proj.weight", (width, h)
            yield p + w + "up_proj.weight", (width, h)
            yield p + w + "down_proj.weight", (h, width)
        if i >= 3:
            yield p + "mlp.gate.weight", (experts, h)
    yield "lm_head.weight", (HEAD, h)  # a part of it, as it is written by the test
    yield "model.norm.weight", (h,)


def save_sparse(folder, limit=8 << 30):
    """Write real headers and no data: files full of holes."""
    folder.mkdir()
    shards, room = [[]], limit
    for name, shape in deepseek_v3():
        size = 2 * torch.Size(shape).numel()
        if size > room or name == "lm_head.weight":
            shards.append([])
            room = limit
        shards[-1].append((name, "BF16", shape))
        room -= size
    weight_map = {}
    for k, rows in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        header = build_header(rows, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header.raw)
            out.truncate(header.size_bytes)
        weight_map |= dict.fromkeys((name for name, _, _ in rows), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (folder / "config.json").write_text(json.dumps(config))
    return len(shards)


@needs_transformers_5
@pytest.mark.slow
def test_671b_parameters_are_planned_in_seconds_and_a_shard_is_merged(tmp_path):
    n_shards = save_sparse(tmp_path / "base")
    sites = [
        site(f"model.layers.{i}.self_attn.{leaf}", shape, rank=1)
        for i in range(61)
        for leaf, shape in (("q_a_proj", (1536, 7168)), ("o_proj", (7168, 16384)))
    ]
    sites.append(
        site("model.layers.9.mlp.experts.down_proj", (256, 7168, 2048), rank=1, experts=256)
    )
    sites.append(site("lm_head", (HEAD, 7168), rank=1))
    part = WeightedAdapter(adapter(*sites))
    began = time.process_time()  # others may use the machine
    plan = plan_merge(tmp_path / "base", [part])
    seconds = time.process_time() - began
    print(
        f"{plan.n_bytes / 1e12:.2f} TB, {sum(len(s.header.tensors) for s in plan.shards)} tensors"
    )
    print(f"in {n_shards} shards planned in {seconds:.1f} s, {len(plan.jobs)} tensors to merge")
    assert plan.n_bytes > 1.3e12
    assert len(plan.jobs) == 122 + 256 + 1
    assert seconds < 30
    # The last file (head and norm) is the smallest.
    path = tmp_path / "head.safetensors"
    write_shard(plan.shards[-1], plan, path, lambda _: None)
    entry = read_header(path).tensors["lm_head.weight"]
    s, rows = sites[-1], 50
    with path.open("rb") as file:
        file.seek(entry.start + 2 * 7168 * 1000)
        data = bytearray(file.read(2 * 7168 * rows))
    found = torch.frombuffer(data, dtype=torch.bfloat16).view(rows, 7168)
    wanted = (s.scale * s.B[1000 : 1000 + rows].double() @ s.A.double()).bfloat16()
    assert torch.allclose(found.float(), wanted.float(), rtol=2**-7)


# Processes --------------------------------------------------------------------------------------


def merge_until_interrupted(base, out):
    part = WeightedAdapter(llama_adapter(load_checkpoint(base)))
    options = MergeOptions(workers=2)

    def progress(done, total):
        print("writing", flush=True)

    while True:
        try:
            merge_checkpoint(base, [part], out, options=options, progress=progress)
        except KeyboardInterrupt:
            return
        shutil.rmtree(out)


@pytest.mark.slow
def test_ctrl_c_stops_all_threads_and_leaves_no_half_file(tmp_path, forks):
    tensors = llama_tensors(layers=4, hidden=512, inner=2048, vocab=2048)
    base = save_checkpoint(tmp_path / "base", tensors, 4, LLAMA)
    out = tmp_path / "out"
    run = forks.start(merge_until_interrupted, base, out)
    while run.out().count("writing") < 30:
        assert not run.err()
    os.kill(run.pid, signal.SIGINT)
    run.result()
    assert not out.exists()
    assert not list(tmp_path.rglob("*.partial"))
    part = WeightedAdapter(llama_adapter(tensors))
    merge(base, [part], out)
    assert_verified(base, [part], out)


def peak_of_merging(folder):
    base = Checkpoint.open(folder / "base")
    found = merge_checkpoint(base, [read_weighted(folder / "adapter", base)], folder / "out")
    return found.peak_memory_bytes / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_memory_grows_neither_with_the_base_nor_with_the_adapter(tmp_path, forks):
    """Six times the weights, and an adapter of 75 MB: the same peak within 16 MiB."""
    for n_layers in (2, 12):
        folder = tmp_path / str(n_layers)
        names = [f"layers.{i}.up_proj" for i in range(n_layers)]
        base = {f"{name}.weight": torch.ones(2048, 1024).bfloat16() for name in names}
        save_checkpoint(folder / "base", base, 1)
        sites = (site(name, (2048, 1024), rank=512, size=1e-3) for name in names)
        write_adapter(adapter(*sites), folder / "adapter")
    few, many = (forks.start(peak_of_merging, tmp_path / n).result() for n in ("2", "12"))
    assert abs(many - few) < 16, (few, many)


# Hostile adapters -------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
)
KEYS = [
    *("r", "lora_alpha", "peft_type", "bias", "use_rslora", "use_dora", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "target_modules"),
    *("fan_in_fan_out", "peft_version", "trainable_token_indices", "init_lora_weights"),
]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3))
def test_any_adapter_config_is_merged_or_refused(tmp_path_factory, changes):
    """No traceback but ours, whatever adapter_config.json says."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("fuzz")
    base = save_checkpoint(folder / "base", {"q.weight": torch.zeros(4, 4)})
    (folder / "adapter").mkdir()
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **changes}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    try:
        checkpoint = Checkpoint.open(base)
        merge(checkpoint, [read_weighted(folder / "adapter", checkpoint)], folder / "out")
    except LoraInjectError:
        assert not (folder / "out").exists()

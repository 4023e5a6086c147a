"""Large and hostile: 671B parameters, Ctrl-C, memory, any adapter_config.json."""

import json
import os
import shutil
import signal
import sys
import time

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_inject.checkpoint import MergeOptions, WeightedAdapter, merge_checkpoint, plan_merge
from lora_inject.checkpoint.write import write_shard
from lora_inject.core.files.safetensors_file import build_header, read_header
from lora_inject.errors import LoraInjectError
from lora_inject.formats import write_adapter

# 671 billion parameters -------------------------------------------------------------------------

WIDTH, HEAD, EXPERTS = 7168, 8192, 256
ATTENTION = {
    "q_a_proj": (1536, WIDTH), "q_a_layernorm": (1536,), "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, WIDTH), "kv_b_proj": (32768, 512), "o_proj": (WIDTH, 16384),
}  # fmt: skip


def deepseek_v3():
    """Names and shapes of DeepSeek-V3's checkpoint, a file for each layer."""
    yield {"model.embed_tokens.weight": (129280, WIDTH)}
    for i in range(61):
        shapes = {f"self_attn.{leaf}": shape for leaf, shape in ATTENTION.items()}
        blocks, inner = ["mlp"], 18432
        if i >= 3:
            blocks, inner = [f"mlp.experts.{e}" for e in range(EXPERTS)], 2048
            blocks.append("mlp.shared_experts")
            shapes["mlp.gate"] = (EXPERTS, WIDTH)
        for block in blocks:
            shapes |= dict.fromkeys((f"{block}.gate_proj", f"{block}.up_proj"), (inner, WIDTH))
            shapes[f"{block}.down_proj"] = (WIDTH, inner)
        yield {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
    # The head is a part of the real one, as it is written by the test.
    yield {"lm_head.weight": (HEAD, WIDTH), "model.norm.weight": (WIDTH,)}


def save_sparse(folder):
    """Write real headers and no data: files full of holes."""
    folder.mkdir()
    weight_map = {}
    for k, shapes in enumerate(deepseek_v3()):
        header = build_header([(name, "BF16", s) for name, s in shapes.items()], {"format": "pt"})
        path = folder / f"model-{k + 1:05d}-of-00063.safetensors"
        path.write_bytes(header.raw)
        os.truncate(path, header.size_bytes)
        weight_map |= dict.fromkeys(shapes, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (folder / "config.json").write_text(json.dumps(config))


@needs_transformers_5
@pytest.mark.slow
def test_671b_parameters_are_planned_in_seconds_and_a_shard_is_merged(tmp_path):
    save_sparse(tmp_path / "base")
    sites = [
        site(f"model.layers.{i}.self_attn.{leaf}", ATTENTION[leaf], rank=1)
        for i in range(61)
        for leaf in ("q_a_proj", "o_proj")
    ]
    stack = "model.layers.9.mlp.experts.down_proj"
    sites.append(site(stack, (EXPERTS, WIDTH, 2048), rank=1, experts=EXPERTS))
    sites.append(site("lm_head", (HEAD, WIDTH), rank=1))
    began = time.process_time()  # others may use the machine
    plan = plan_merge(tmp_path / "base", [adapter(*sites)])
    assert time.process_time() - began < 30
    assert plan.n_bytes > 1.3e12
    assert len(plan.jobs) == 122 + EXPERTS + 1
    # The last file (head and norm) is the smallest.
    path = tmp_path / "head.safetensors"
    write_shard(plan.shards[-1], plan, path, lambda _: None)
    s, rows = sites[-1], slice(1000, 1050)
    with path.open("rb") as file:
        file.seek(read_header(path).tensors["lm_head.weight"].start + 2 * WIDTH * rows.start)
        data = bytearray(file.read(2 * WIDTH * 50))
    merged = torch.frombuffer(data, dtype=torch.bfloat16).view(50, WIDTH)
    wanted = (s.scale * s.B[rows].double() @ s.A.double()).bfloat16()
    assert torch.allclose(merged.float(), wanted.float(), rtol=2**-7)


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
    part = llama_adapter(tensors)
    merge(base, [part], out)
    assert_verified(base, [part], out)


def peak_of_merging(folder):
    report = merge_checkpoint(folder / "base", [folder / "adapter"], folder / "out")
    return report.peak_memory_bytes / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_memory_grows_neither_with_the_base_nor_with_the_adapter(tmp_path, forks):
    """Six times the weights, and an adapter of 75 MB: the same peak within 16 MiB."""
    for n_layers in (2, 12):
        folder = tmp_path / str(n_layers)
        names = [f"layers.{i}.up_proj" for i in range(n_layers)]
        base = {f"{name}.weight": torch.ones(2048, 1024).bfloat16() for name in names}
        save_checkpoint(folder / "base", base)
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


@settings(max_examples=30)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3))
def test_any_adapter_config_is_merged_or_refused(tmp_path_factory, changes):
    """No traceback but ours, whatever adapter_config.json says."""
    folder = tmp_path_factory.mktemp("fuzz")
    base = save_checkpoint(folder / "base", {"q.weight": torch.zeros(4, 4)})
    (folder / "adapter").mkdir()
    pair = {"A.weight": torch.ones(2, 4), "B.weight": torch.ones(4, 2)}
    tensors = {f"base_model.model.q.lora_{end}": tensor for end, tensor in pair.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **changes}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    try:
        merge(base, [folder / "adapter"], folder / "out")
    except LoraInjectError:
        assert not (folder / "out").exists()

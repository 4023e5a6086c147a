"""Where adapters land: names, shapes, orientation, experts, quantized bases, nothing left over."""

from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_equal_to_dense,
    assert_merged,
    dense,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    merge,
    merged,
    save_checkpoint,
    site,
)
from helpers.versions import needs_transformers_5
from torch import nn

import lora_inject
from lora_inject.checkpoint import (
    Checkpoint,
    MergeOptions,
    WeightedAdapter,
    plan_merge,
    read_weighted,
)
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.weight import dense_delta
from lora_inject.core.spec.slices import Slices
from lora_inject.errors import CheckpointError, FormatError


def renamed(state, rename):
    """The same adapter under other names."""
    sites = {}
    for s in state.sites.values():
        weight = rename(s.spec.weight or s.spec.name + ".weight")
        spec = replace(s.spec, name=weight.removesuffix(".weight"), weight=weight)
        sites[spec.name] = replace(s, spec=spec)
    return replace(state, sites=sites)


RENAMES = {
    "without model.": (lambda n: n.removeprefix("model."), {"": "model.", "lm_head": "lm_head"}),
    "with model.": (lambda n: "model." + n, {"model.": ""}),
    "text of a vision model": (
        lambda n: n.replace("model.", "model.language_model.", 1),
        {"model.language_model.": "model."},
    ),
}


@pytest.mark.parametrize("case", RENAMES)
def test_names_are_read_as_told(tmp_path, case):
    rename, told = RENAMES[case]
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1)
    state = llama_adapter(tensors, leaves=("q_proj", "lm_head"))
    other = WeightedAdapter(renamed(state, rename))
    with pytest.raises(CheckpointError, match=r"no place in it.*--rename OLD=NEW"):
        plan_merge(base, [other])
    merge(base, [other], tmp_path / "out", rename=told)
    assert_merged(tmp_path / "out", tensors, state)


def test_what_has_no_place_is_listed_and_nothing_is_written(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    state = llama_adapter(tensors)
    stray = site("model.layers.7.self_attn.q_proj", (16, 16))
    state = replace(state, sites={**state.sites, stray.spec.name: stray})
    with pytest.raises(CheckpointError) as error:
        merge(base, [state], tmp_path / "out")
    assert "1 of 7 tensors have no place" in str(error.value)
    assert "model.layers.7.self_attn.q_proj.weight" in str(error.value)
    assert "Nearest names" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    state = adapter(site("model.layers.0.mlp.up_proj", (24, 12)))
    with pytest.raises(CheckpointError, match=r"\[24, 16\].*\[24, 12\]"):
        plan_merge(base, [state])


# Orientation ------------------------------------------------------------------------------------


def test_orientation_follows_the_shape(tmp_path):
    tensors = {"h.0.attn.c_attn.weight": torch.randn(8, 24), "h.0.fc.weight": torch.randn(6, 8)}
    # As a reader of a foreign file assumes: everything is (out, in).
    state = adapter(site("h.0.attn.c_attn", (24, 8)), site("h.0.fc", (6, 8)))
    found = merged(tmp_path, tensors, state)
    s = state.sites["h.0.attn.c_attn"]
    wanted = tensors["h.0.attn.c_attn.weight"] + s.scale * (s.B @ s.A).T
    assert torch.allclose(found["h.0.attn.c_attn.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("said", [False, True])
def test_square_matrix_follows_what_the_adapter_says(tmp_path, said):
    tensors = {"fc.weight": torch.randn(8, 8)}
    s = site("fc", (8, 8), transposed=said, kind="conv1d" if said else "linear")
    found = merged(tmp_path, tensors, adapter(s))["fc.weight"]
    delta = s.scale * s.B @ s.A
    assert torch.allclose(found, tensors["fc.weight"] + (delta.T if said else delta), atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_square_matrix_of_an_adapter_that_is_wrong_elsewhere_is_refused(tmp_path, order):
    tensors = {"a.weight": torch.randn(8, 24), "b.weight": torch.randn(8, 8)}
    base = save_checkpoint(tmp_path / "base", tensors)
    sites = [site("a", (24, 8)), site("b", (8, 8))][::order]
    with pytest.raises(CheckpointError, match=r"square.*orientation for 'a'"):
        plan_merge(base, [adapter(*sites)])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolution_equals_the_adapted_layer(tmp_path, kind, groups):
    """Its update is a matrix over the inputs of one group, as this library trains it."""
    torch.manual_seed(0)
    net = nn.Sequential(kind(4, 8, 3, groups=groups))
    save_checkpoint(tmp_path / "base", net.state_dict())
    lora_inject.inject(net, {"rank": 2, "targets": ["0"]})
    nn.init.normal_(lora_inject.adapter_parameters(net)["0.lora_B"])
    lora_inject.save_adapter(net, tmp_path / "adapter.safetensors", format="native")
    x = torch.randn(2, 4, *(9,) * (net[0].weight.dim() - 2))
    wanted = net(x)
    base = Checkpoint.open(tmp_path / "base")
    part = read_weighted(tmp_path / "adapter.safetensors", base)
    merge(base, [part], tmp_path / "out")
    plain = nn.Sequential(kind(4, 8, 3, groups=groups))
    plain.load_state_dict(load_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(plain(x), wanted)


@pytest.mark.filterwarnings("ignore")
def test_grouped_convolution_of_peft_is_refused_with_the_reason(tmp_path):
    """PEFT's A reads the inputs of all groups: no weight of the layer's shape computes that."""
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    base = save_checkpoint(tmp_path / "base", net.state_dict())
    config = peft.LoraConfig(r=4, target_modules=["0"])
    peft.get_peft_model(net, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match="grouped convolutions have no dense delta"):
        read_weighted(tmp_path / "adapter", Checkpoint.open(base))


def test_slices_leave_the_other_rows_bit_identical(tmp_path):
    tensors = {
        "c_attn.weight": torch.randn(8, 24).bfloat16(),
        "qkv.weight": torch.randn(24, 8).bfloat16(),
    }
    tensors["c_attn.weight"][2, 8:16] = -0.0  # 0.0 added to it would change its sign
    tensors["qkv.weight"][9] = -0.0
    parts = Slices((("q", 8), ("k", 8), ("v", 8)), ("q", "v"))
    c_attn = site("c_attn", (8, 24), transposed=True, kind="conv1d", slices=parts)
    state = adapter(c_attn, site("qkv", (24, 8), slices=parts))
    found = merged(tmp_path, tensors, state)
    for name, rest in (("c_attn", (slice(None), slice(8, 16))), ("qkv", slice(8, 16))):
        a, b = (t[f"{name}.weight"].view(torch.int16)[rest] for t in (found, tensors))
        assert torch.equal(a, b)
    assert_equal_to_dense(found, dense(tensors, (state, 1.0)), set(tensors))


def test_frozen_start_of_derived_inits_is_subtracted(tmp_path):
    tensors = {"q.weight": torch.randn(6, 8)}
    s, start = site("q", (6, 8), seed=1), site("q", (6, 8), seed=2)
    found = merged(tmp_path, tensors, adapter(SiteState(s.spec, s.A, s.B, start.A, start.B)))
    wanted = tensors["q.weight"] + s.scale * (s.B @ s.A - start.B @ start.A)
    assert torch.allclose(found["q.weight"], wanted, atol=1e-5)


# Experts ----------------------------------------------------------------------------------------

E, I, H = 3, 6, 8  # noqa: E741
FUSED = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}
SIZES = {
    "vocab_size": 16, "hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_local_experts": E, "num_experts": E
}  # fmt: skip
FILES = {
    "qwen2_moe": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
}
CONFIGS = {
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **SIZES},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SIZES},
}


def separate(family, fused):
    """The per-expert tensors of a file, from the stacks that the class runs."""
    where, (gate, up, down) = FILES[family]
    out = {}
    for e in range(E):
        out[f"{where}.{e}.{gate}.weight"] = fused["gate_up_proj"][e, :I].clone()
        out[f"{where}.{e}.{up}.weight"] = fused["gate_up_proj"][e, I:].clone()
        out[f"{where}.{e}.{down}.weight"] = fused["down_proj"][e].clone()
    return out


@needs_transformers_5
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("old", [False, True])
def test_stacked_experts_are_cut_into_the_tensors_of_the_file(tmp_path, family, shards, old):
    fused = {name: torch.randn(shape).bfloat16() for name, shape in FUSED.items()}
    tensors = separate(family, fused)
    router = "model.layers.0.mlp.gate.weight"
    in_file = router if family == "qwen2_moe" else "model.layers.0.block_sparse_moe.gate.weight"
    tensors[in_file] = torch.randn(E, H).bfloat16()
    base = save_checkpoint(tmp_path / "base", tensors, shards, CONFIGS[family])
    sites = [
        site(f"model.layers.0.mlp.experts.{n}", shape, experts=E, transposed=old)
        for n, shape in FUSED.items()
    ]
    gate = site("model.layers.0.mlp.gate", (E, H))
    merge(base, [adapter(*sites, gate)], tmp_path / "out")
    named = {s.spec.name.rpartition(".")[2]: s for s in (*sites, gate)}
    full = {n: dense_delta(s.spec, s.A, s.B) for n, s in named.items()}
    wanted = separate(family, {n: (t.double() + full[n]).bfloat16() for n, t in fused.items()})
    wanted[in_file] = (tensors[in_file].double() + full["gate"]).bfloat16()
    assert_equal_to_dense(load_checkpoint(tmp_path / "out"), wanted, set(wanted))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_in_a_stacked_file(tmp_path, transposed):
    shape = (E, H, 2 * I) if transposed else (E, 2 * I, H)
    tensors = {"mlp.experts.gate_up_proj": torch.randn(shape).bfloat16()}
    state = adapter(site("mlp.experts.gate_up_proj", shape, experts=E, transposed=transposed))
    merged(tmp_path, tensors, state)
    assert_merged(tmp_path / "out", tensors, state)


@needs_transformers_5
@pytest.mark.parametrize("family", FILES)
def test_per_expert_adapter_on_a_stacked_file(tmp_path, family):
    fused = {name: torch.randn(shape).bfloat16() for name, shape in FUSED.items()}
    tensors = {f"model.layers.0.mlp.experts.{n}": t for n, t in fused.items()}
    base = save_checkpoint(tmp_path / "base", tensors, 1, CONFIGS[family])
    where, (gate, up, down) = FILES[family]
    sites = [
        site(f"{where}.1.{gate}", (I, H)),
        site(f"{where}.2.{up}", (I, H)),
        site(f"{where}.2.{down}", (H, I)),
    ]
    merge(base, [adapter(*sites)], tmp_path / "out")
    wanted = {n: t.double() for n, t in tensors.items()}
    places = ((1, slice(0, I)), (2, slice(I, 2 * I)), (2, slice(0, H)))
    for s, rows in zip(sites, places, strict=True):
        name = "down_proj" if s is sites[2] else "gate_up_proj"
        wanted[f"model.layers.0.mlp.experts.{name}"][rows] += dense_delta(s.spec, s.A, s.B)
    wanted = {n: t.bfloat16() for n, t in wanted.items()}
    assert_equal_to_dense(load_checkpoint(tmp_path / "out"), wanted, set(wanted))


@needs_transformers_5
def test_missing_expert_is_named(tmp_path):
    fused = {name: torch.randn(shape) for name, shape in FUSED.items()}
    tensors = separate("qwen2_moe", fused)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    base = save_checkpoint(tmp_path / "base", tensors, 1, CONFIGS["qwen2_moe"])
    state = adapter(
        site("model.layers.0.mlp.experts.gate_up_proj", FUSED["gate_up_proj"], experts=E)
    )
    with pytest.raises(CheckpointError, match="expert 2 is not complete"):
        plan_merge(base, [state])


# Refusals ---------------------------------------------------------------------------------------

QUANTIZED = {
    "bitsandbytes": {
        "q.weight": torch.zeros(32, 1, dtype=torch.uint8),
        "q.weight.absmax": torch.zeros(2),
        "q.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8),
    },
    "GPTQ": {
        "q.qweight": torch.zeros(1, 8, dtype=torch.int32),
        "q.scales": torch.zeros(1, 8),
        "q.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    },
    "fp8 with block scales": {
        "q.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.ones(1, 1),
    },
    "MXFP4": {
        "q.weight_blocks": torch.zeros(8, 1, 4, dtype=torch.uint8),
        "q.weight_scales": torch.zeros(8, 1, dtype=torch.uint8),
    },
    "fp8": {"q.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_base_is_recognized_and_the_way_out_is_named(tmp_path, method):
    base = save_checkpoint(tmp_path / "base", QUANTIZED[method])
    with pytest.raises(CheckpointError, match=rf"quantized: {method}.*16-bit checkpoint"):
        plan_merge(base, [adapter(site("q", (8, 8)))])


def test_float_layers_of_a_quantized_base_merge(tmp_path):
    tensors = {**QUANTIZED["GPTQ"], "lm_head.weight": torch.randn(8, 8)}
    state = adapter(site("lm_head", (8, 8)))
    found = merged(tmp_path, tensors, state)
    assert torch.equal(found["q.qweight"], tensors["q.qweight"])
    assert_equal_to_dense(found, dense(tensors, (state, 1.0)), {"lm_head.weight"})


@pytest.mark.parametrize("where", ["A", "B", "trained"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_adapter_is_refused_by_name(tmp_path, where, value):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    state = llama_adapter(tensors, leaves=("q_proj",))
    if where == "trained":
        state = replace(state, trained={"model.norm.weight": torch.full((16,), value)})
        name = "model.norm.weight"
    else:
        name = "model.layers.1.self_attn.q_proj"
        getattr(state.sites[name], where)[0, 0] = value
    with pytest.raises(CheckpointError, match=rf"'{name}.*NaN or Inf"):
        plan_merge(base, [state])


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([], "no adapter"),
        ([AdapterState({})], "holds no tensors"),
        ([WeightedAdapter(adapter(site("q", (4, 4))), 0.0)], "weight is 0"),
        ([WeightedAdapter(adapter(site("q", (4, 4))), float("nan"))], "weight is nan"),
    ],
)
def test_nothing_to_merge_is_refused(tmp_path, parts, found):
    base = save_checkpoint(tmp_path / "base", {"q.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=found):
        plan_merge(base, parts)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"min_kept": 2.0}, "not a share"),
        ({"min_kept": float("nan")}, "not a share"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_impossible_options_are_refused(options, found):
    with pytest.raises(CheckpointError, match=found):
        MergeOptions(**options)


def test_plan_says_what_will_happen(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    plan = plan_merge(base, [WeightedAdapter(llama_adapter(tensors), label="sql")]).to_dict()
    assert plan["output_bytes"] == plan["base_bytes"]
    assert sum(shard["merged"] for shard in plan["shards"]) == 6 == len(plan["tensors"])
    assert all(shard["same_layout"] for shard in plan["shards"])
    assert plan["adapters"] == [
        {"label": "sql", "weight": 1.0, "sites": 6, "names": "names as they are"}
    ]
    assert plan["index"] == "kept"

"""Where adapters land: names, shapes, orientation, experts, quantized bases, nothing left over."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from conftest import fill
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_equal_to_dense,
    assert_merged,
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
from lora_inject.checkpoint import MergeOptions, WeightedAdapter, plan_merge
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.weight import dense_delta
from lora_inject.core.model.base import fingerprint
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


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda n: n.removeprefix("model."), {"": "model.", "lm_head": "lm_head"}),
        (lambda n: "model." + n, {"model.": ""}),
    ],
    ids=["without model.", "with model."],
)
def test_names_are_read_as_told(tmp_path, rename, told):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors)
    state = llama_adapter(tensors, leaves=("q_proj", "lm_head"))
    with pytest.raises(CheckpointError, match=r"no place in it.*--rename OLD=NEW"):
        plan_merge(base, [renamed(state, rename)])
    merge(base, [renamed(state, rename)], tmp_path / "out", rename=told)
    assert_merged(tmp_path / "out", tensors, state)


def test_what_has_no_place_is_listed_and_nothing_is_written(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    stray = site("model.layers.7.self_attn.q_proj", (16, 16))
    state = adapter(*llama_adapter(tensors).sites.values(), stray)
    words = r"1 of 7 tensors have no place(?s:.*)layers\.7\.self_attn(?s:.*)Nearest names"
    with pytest.raises(CheckpointError, match=words):
        merge(base, [state], tmp_path / "out")
    narrow = adapter(site("model.layers.0.mlp.up_proj", (24, 12)))
    with pytest.raises(CheckpointError, match=r"\[24, 16\].*\[24, 12\]"):
        merge(base, [narrow], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Orientation ------------------------------------------------------------------------------------


def test_orientation_follows_the_shape(tmp_path):
    tensors = {"h.0.attn.c_attn.weight": torch.randn(8, 24), "h.0.fc.weight": torch.randn(6, 8)}
    # As a reader of a foreign file assumes: everything is (out, in).
    fused = site("h.0.attn.c_attn", (24, 8))
    written = merged(tmp_path, tensors, adapter(fused, site("h.0.fc", (6, 8))))
    wanted = tensors["h.0.attn.c_attn.weight"] + fused.scale * (fused.B @ fused.A).T
    assert torch.allclose(written["h.0.attn.c_attn.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("said", [False, True])
def test_square_matrix_follows_what_the_adapter_says(tmp_path, said):
    s = site("fc", (8, 8), transposed=said, kind="conv1d" if said else "linear")
    delta = s.scale * s.B @ s.A
    written = merged(tmp_path, {"fc.weight": torch.ones(8, 8)}, adapter(s))["fc.weight"]
    assert torch.allclose(written, 1 + (delta.T if said else delta), atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_square_matrix_of_an_adapter_that_is_wrong_elsewhere_is_refused(tmp_path, order):
    tensors = {"a.weight": torch.ones(8, 24), "b.weight": torch.ones(8, 8)}
    sites = [site("a", (24, 8)), site("b", (8, 8))][::order]
    with pytest.raises(CheckpointError, match=r"square.*orientation for 'a'"):
        merged(tmp_path, tensors, adapter(*sites))


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_convolution_equals_the_adapted_layer(tmp_path, groups):
    """Its update is a matrix over the inputs of one group, as this library trains it."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups))
    plain = copy.deepcopy(net)
    base = save_checkpoint(tmp_path / "base", net.state_dict())
    fill(lora_inject.inject(net, {"rank": 2, "targets": ["0"]}))
    path = lora_inject.save_adapter(net, tmp_path / "adapter.safetensors", format="native")
    merge(base, [path], tmp_path / "out")
    plain.load_state_dict(load_checkpoint(tmp_path / "out"))
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(plain(x), net(x))


@pytest.mark.filterwarnings("ignore")
def test_grouped_convolution_of_peft_is_refused_with_the_reason(tmp_path):
    """PEFT's A reads the inputs of all groups: no weight of the layer's shape computes that."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    base = save_checkpoint(tmp_path / "base", net.state_dict())
    config = peft.LoraConfig(r=4, target_modules=["0"])
    peft.get_peft_model(net, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match="grouped convolutions have no dense delta"):
        merge(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_leave_the_other_rows_bit_identical(tmp_path, transposed):
    W = torch.randn(24, 8).bfloat16()
    W[9] = -0.0  # 0.0 added to it would change its sign
    tensors = {"qkv.weight": W.T.contiguous() if transposed else W}
    parts = Slices((("q", 8), ("k", 8), ("v", 8)), ("q", "v"))
    shape = tuple(tensors["qkv.weight"].shape)
    state = adapter(site("qkv", shape, transposed=transposed, slices=parts))
    written = merged(tmp_path, tensors, state)["qkv.weight"]
    rows = written.T if transposed else written
    assert torch.equal(rows[8:16].view(torch.int16), W[8:16].view(torch.int16))
    assert_merged(tmp_path / "out", tensors, state)


def test_frozen_start_of_derived_inits_is_subtracted(tmp_path):
    s, start = site("q", (6, 8), seed=1), site("q", (6, 8), seed=2)
    derived = SiteState(s.spec, s.A, s.B, start.A, start.B)
    written = merged(tmp_path, {"q.weight": torch.ones(6, 8)}, adapter(derived))["q.weight"]
    assert torch.allclose(written, 1 + s.scale * (s.B @ s.A - start.B @ start.A), atol=1e-5)


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
    router = f"{FILES[family][0].removesuffix('.experts')}.gate.weight"
    tensors = separate(family, fused) | {router: torch.randn(E, H).bfloat16()}
    sites = {
        n: site(f"model.layers.0.mlp.experts.{n}", shape, experts=E, transposed=old)
        for n, shape in FUSED.items()
    }
    gate = site("model.layers.0.mlp.gate", (E, H))
    state = adapter(*sites.values(), gate)
    written = merged(tmp_path, tensors, state, shards=shards, config=CONFIGS[family])
    exact = {n: t.double() + dense_delta(sites[n].spec, sites[n].A, sites[n].B)
             for n, t in fused.items()}  # fmt: skip
    wanted = separate(family, exact)
    wanted[router] = tensors[router].double() + dense_delta(gate.spec, gate.A, gate.B)
    wanted = {name: tensor.bfloat16() for name, tensor in wanted.items()}
    assert_equal_to_dense(written, wanted, set(wanted))
    if shards == 1:
        del tensors[f"{FILES[family][0]}.2.{FILES[family][1][1]}.weight"]
        base = save_checkpoint(tmp_path / "poor", tensors, 1, CONFIGS[family])
        with pytest.raises(CheckpointError, match="expert 2 is not complete"):
            plan_merge(base, [state])


@needs_transformers_5
@pytest.mark.parametrize("family", FILES)
def test_per_expert_adapter_on_a_stacked_file(tmp_path, family):
    stacks = "model.layers.0.mlp.experts"
    tensors = {f"{stacks}.{n}": torch.randn(shape).bfloat16() for n, shape in FUSED.items()}
    where, (gate, up, down) = FILES[family]
    places = (
        ("gate_up_proj", 1, slice(0, I), site(f"{where}.1.{gate}", (I, H))),
        ("gate_up_proj", 2, slice(I, 2 * I), site(f"{where}.2.{up}", (I, H))),
        ("down_proj", 2, slice(0, H), site(f"{where}.2.{down}", (H, I))),
    )
    state = adapter(*(s for *_, s in places))
    written = merged(tmp_path, tensors, state, config=CONFIGS[family])
    wanted = {n: t.double() for n, t in tensors.items()}
    for stack, expert, rows, s in places:
        wanted[f"{stacks}.{stack}"][expert, rows] += dense_delta(s.spec, s.A, s.B)
    wanted = {n: t.bfloat16() for n, t in wanted.items()}
    assert_equal_to_dense(written, wanted, set(wanted))


# Refusals ---------------------------------------------------------------------------------------


def test_float_layers_of_a_quantized_base_merge(tmp_path):
    packed = {"q.qweight": torch.zeros(1, 8).int(), "q.qzeros": torch.zeros(1, 1).int()}
    tensors = {**packed, "q.scales": torch.zeros(1, 8), "lm_head.weight": torch.randn(8, 8)}
    state = adapter(site("lm_head", (8, 8)))
    merged(tmp_path, tensors, state)
    assert_merged(tmp_path / "out", tensors, state)


@pytest.mark.parametrize("where", ["A", "B", "trained"])
def test_non_finite_adapter_is_refused_by_name(tmp_path, where):
    s, norm = site("q", (4, 4)), torch.ones(4)
    (norm if where == "trained" else getattr(s, where)[0])[0] = float("inf")
    base = save_checkpoint(tmp_path / "base", {"q.weight": torch.ones(4, 4), "norm": norm})
    name = "norm" if where == "trained" else "q"
    with pytest.raises(CheckpointError, match=rf"'{name}.*NaN or Inf"):
        plan_merge(base, [adapter(s, trained={"norm": norm})])


Q = adapter(site("q", (4, 4)))
NOTHING = [
    ([], {}, "no adapter"),
    ([AdapterState({})], {}, "holds no tensors"),
    ([WeightedAdapter(Q, 0.0)], {}, "weight is 0"),
    ([Q], {"dtype": "int8"}, "int8"),
    ([Q], {"min_kept": float("nan")}, "not a share"),
    ([Q], {"workers": 0}, "0 workers"),
    ([Q], {"dequantize": "int8"}, "write dequantize 'int8'"),
    ([Q], {"dequantize": "bfloat16", "requantize": True}, "both dequantize and requantize"),
]


@pytest.mark.parametrize(("parts", "options", "words"), NOTHING, ids=lambda value: None)
def test_nothing_to_merge_and_impossible_options_are_refused(tmp_path, parts, options, words):
    with pytest.raises(CheckpointError, match=words):
        merged(tmp_path, {"q.weight": torch.zeros(4, 4)}, *parts, **options)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_base_of_the_same_shape_is_refused(tmp_path, prefix):
    tensors, other = llama_tensors(seed=0), llama_tensors(seed=1)
    state = llama_adapter(tensors)
    known = {f"{name}.weight": tensors[f"{name}.weight"] for name in state.sites}
    state = replace(state, fingerprint=fingerprint(known))
    other = {name.removeprefix(prefix): tensor for name, tensor in other.items()}
    base = save_checkpoint(tmp_path / "base", other, 1, LLAMA)
    with pytest.raises(CheckpointError, match=r"another base: 6 of 6 weights differ.*any_base"):
        plan_merge(base, [state])
    plan_merge(base, [state], options=MergeOptions(any_base=True))

"""Every file of `configs/` against the real names of its model, built on the meta device.

The counts are those of the papers, or by hand from the widths of the layers.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.key_lists import inventory_of
from lora_inject.core.spec.matching import resolve
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.schema import json_schema

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def on_meta(cls: type[nn.Module], config: tf.PretrainedConfig) -> Inventory:
    with torch.device("meta"):
        return inventory(Survey(cls(config)))


def unet() -> Inventory:
    """The transformer blocks of Stable Diffusion 1.5's UNet, as diffusers 0.42 names them."""
    down = {(f"down_blocks.{b}", a): 320 * 2**b for b in range(3) for a in range(2)}
    up = {(f"up_blocks.{b}", a): 1280 // 2 ** (b - 1) for b in range(1, 4) for a in range(3)}
    shapes: dict[str, tuple[int, ...]] = {"conv_in.weight": (320, 4, 3, 3)}
    for (block, a), width in {**down, ("mid_block", 0): 1280, **up}.items():
        path = f"{block}.attentions.{a}"
        shapes[f"{path}.proj_in.weight"] = (width, width, 1, 1)
        path += ".transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            shapes[f"{path}.{attention}.to_q.weight"] = (width, width)
            shapes[f"{path}.{attention}.to_k.weight"] = (width, context)
            shapes[f"{path}.{attention}.to_v.weight"] = (width, context)
            shapes[f"{path}.{attention}.to_out.0.weight"] = (width, width)
            shapes[f"{path}.{attention}.to_out.0.bias"] = (width,)
        shapes[f"{path}.ff.net.0.proj.weight"] = (8 * width, width)
        shapes[f"{path}.ff.net.2.weight"] = (width, 4 * width)
    return inventory_of(shapes)


def gpt2(depth: int, width: int, heads: int, positions: int = 1024) -> Callable[[], Inventory]:
    config = tf.GPT2Config(n_layer=depth, n_embd=width, n_head=heads, n_positions=positions)
    return lambda: on_meta(tf.GPT2LMHeadModel, config)


def roberta(depth: int, width: int, heads: int) -> Callable[[], Inventory]:
    config = tf.RobertaConfig(
        num_hidden_layers=depth, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=3,
    )  # fmt: skip
    return lambda: on_meta(tf.RobertaForSequenceClassification, config)


def deberta_xxl() -> Inventory:
    config = tf.DebertaV2Config(
        num_hidden_layers=48, hidden_size=1536, num_attention_heads=24, intermediate_size=6144,
        num_labels=3, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=1536,
        share_att_key=True, position_buckets=256, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    return on_meta(tf.DebertaV2ForSequenceClassification, config)


def smollm2() -> Inventory:
    config = tf.LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return on_meta(tf.LlamaForCausalLM, config)


def mixtral() -> Inventory:
    return on_meta(tf.MixtralForCausalLM, tf.MixtralConfig(num_hidden_layers=2))


gpt3 = gpt2(96, 12288, 96, 2048)
roberta_base, roberta_large = roberta(12, 768, 12), roberta(24, 1024, 16)
gpt2_medium, gpt2_large = gpt2(24, 1024, 16), gpt2(36, 1280, 20)

# The dropout of each of GPT-2's runs.
DROPOUTS = {"e2e": 0.1, "webnlg": 0.1, "dart_script": 0.1, "dart_paper": 0.0}
GAUSSIAN = ("normal", 0.02)
# The runs of the paper and of its scripts: model; sites, A and B, all that trains, as the files
# expect them too; rank, alpha, dropout, init where the papers say them.
RUNS: dict[str, tuple[Callable[[], Inventory], tuple[int, int, int], tuple[Any, ...]]] = {
    "roberta_base_glue_script":
        (roberta_base, (24, 294_912, 887_811), (8, 16, 0.0, "kaiming")),
    "roberta_base_glue_paper":
        (roberta_base, (24, 294_912, 887_811), (8, 8, 0.0, "kaiming")),
    "roberta_large_glue":
        (roberta_large, (48, 786_432, 1_839_107), (8, 16, 0.0, "kaiming")),
    "deberta_v2_xxl_glue_script":
        (deberta_xxl, (96, 4_718_592, 7_084_035), (16, 32, 0.0, GAUSSIAN)),
    "deberta_v2_xxl_glue_paper":
        (deberta_xxl, (96, 2_359_296, 4_724_739), (8, 8, 0.0, GAUSSIAN)),
    **{f"gpt2_medium_{task}": (gpt2_medium, (24, 393_216, 393_216), (4, 32, dropout, "kaiming"))
       for task, dropout in DROPOUTS.items()},
    **{f"gpt2_large_{task}": (gpt2_large, (36, 737_280, 737_280), (4, 32, dropout, "kaiming"))
       for task, dropout in DROPOUTS.items()},
    "gpt3_175b_qv_r1": (gpt3, (96, 4_718_592, 4_718_592), ()),
    **{f"gpt3_175b_{part}": (gpt3, (96, 18_874_368, 18_874_368), ())
       for part in ("qv_r4", "qk_r4", "q_r8", "k_r8", "v_r8", "o_r8")},
    "gpt3_175b_qv_r8": (gpt3, (96, 37_748_736, 37_748_736), ()),
    "gpt3_175b_qkvo_r2": (gpt3, (192, 18_874_368, 18_874_368), ()),
    "smollm2_135m": (smollm2, (60, 230_400, 230_400), ()),
}  # fmt: skip


def sizes(rank: int, *shapes: tuple[int, int], times: int = 1) -> int:
    """Elements of A and B over linear layers `(in, out)`."""
    return times * rank * sum(n_in + n_out for n_in, n_out in shapes)


def causal(name: str, **config: object) -> Callable[[], Inventory]:
    settings = getattr(tf, f"{name}Config")(**{"num_hidden_layers": 2, **config})
    return lambda: on_meta(getattr(tf, f"{name.removesuffix('Text')}ForCausalLM"), settings)


def dense(width: int, q: int, kv: int, inner: int, times: int = 2) -> int:
    """A and B at rank 8 of q, k, v, o, gate, up and down."""
    attention = [(width, q), (width, kv), (width, kv), (q, width)]
    return sizes(8, *attention, (width, inner), (width, inner), (inner, width), times=times)


def experts(n: int, width: int, inner: int) -> int:
    """A and B at rank 4 of two layers of n stacked gate_up and down matrices."""
    return sizes(4, (width, 2 * inner), (inner, width), times=2 * n)


# Families: file, model, sites, A and B, what else trains. Two layers of the real widths, or all.
FAMILIES: list[tuple[str, Callable[[], Inventory], int, int, int]] = [
    ("llama", causal("Llama", num_hidden_layers=32), 224, 19_988_480, 0),  # known: 7B, r 8
    ("mistral", causal("Mistral"), 14, dense(4096, 4096, 1024, 14336), 0),
    ("qwen2",
     causal("Qwen2", hidden_size=896, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864),
     14, dense(896, 896, 128, 4864), 0),
    ("qwen3",
     causal("Qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128, intermediate_size=3072),
     14, dense(1024, 2048, 1024, 3072), 0),
    ("gemma", causal("Gemma"), 14, dense(3072, 4096, 4096, 24576), 0),
    ("gemma", causal("Gemma3Text"), 14, dense(2304, 2048, 1024, 9216), 0),
    ("phi3_mini", causal("Phi3"), 8,
     sizes(8, *[(3072, 3072)] * 4, *[(3072, 8192)] * 2, (8192, 3072), times=2), 0),
    ("phi3_medium",
     causal("Phi3", hidden_size=5120, num_attention_heads=40, num_key_value_heads=10,
            intermediate_size=17920),
     8, dense(5120, 5120, 1280, 17920), 0),
    ("gpt2", gpt2(12, 768, 12), 12, sizes(8, (768, 768), (768, 768), times=12), 0),
    ("gpt_neox", causal("GPTNeoX", hidden_size=512, num_attention_heads=8, intermediate_size=2048),
     8, sizes(8, (512, 1536), (512, 512), (512, 2048), (2048, 512), times=2), 0),
    ("bloom", causal("Bloom", hidden_size=1024, n_head=16),
     8, sizes(8, (1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024), times=2), 0),
    ("t5", lambda: on_meta(tf.T5ForConditionalGeneration, tf.T5Config(num_layers=2)),
     12, sizes(8, (512, 512), times=12), 0),
    ("bert", lambda: on_meta(tf.BertForSequenceClassification, tf.BertConfig()),
     24, sizes(8, (768, 768), times=24), 2 * 768 + 2),
    ("roberta", roberta_base, 24, 294_912, 592_899),
    ("deberta", deberta_xxl, 96, sizes(8, (1536, 1536), times=96), 2_365_443),
    ("vit", lambda: on_meta(tf.ViTForImageClassification, tf.ViTConfig(num_labels=10)),
     24, sizes(8, (768, 768), times=24), 7_690),
    ("clip", lambda: on_meta(tf.CLIPModel, tf.CLIPConfig()),
     48, sizes(8, (512, 512), (768, 768), times=24), 0),
    ("whisper", lambda: on_meta(tf.WhisperForConditionalGeneration, tf.WhisperConfig()),
     24, sizes(8, (384, 384), times=24), 0),
    ("mixtral", mixtral, 12,
     sizes(8, *[(4096, 4096), (4096, 1024)] * 2, times=2) + experts(8, 4096, 14336), 0),
    ("qwen3_moe", causal("Qwen3Moe"), 12,
     sizes(8, *[(2048, 2048), (2048, 256)] * 2, times=2) + experts(128, 2048, 768), 0),
    ("qwen2_moe", causal("Qwen2Moe"), 18,
     dense(2048, 2048, 2048, 5632) + experts(60, 2048, 1408), 0),
    ("gpt_oss", causal("GptOss"), 12,
     sizes(8, *[(2880, 4096), (2880, 512)] * 2, times=2) + experts(128, 2880, 2880), 0),
    ("stable_diffusion_unet", unet, 128, 797_184, 0),  # known: SD 1.5, attention, r 4
]  # fmt: skip


@cache  # a 175B shape is walked once
def built(model: Callable[[], Inventory]) -> Inventory:
    return model()


def plan_of(name: str, model: Callable[[], Inventory]) -> Plan:
    return resolve(Config.from_yaml(CONFIGS / f"{name}.yaml"), built(model))


@pytest.mark.parametrize("name", RUNS)
def test_the_papers_runs_come_out_to_the_parameter(name: str) -> None:
    model, counts, settings = RUNS[name]
    plan = plan_of(name, model)
    assert (plan.n_sites, plan.n_lora, plan.n_trainable) == counts
    expect = plan.config.expect
    assert (expect.sites, expect.lora, expect.trainable) == counts
    for site in plan.sites:
        said = (site.rank, site.alpha, site.dropout, site.init)
        assert said == (settings or said)
        assert site.scale == site.alpha / site.rank


@pytest.mark.parametrize(("name", "model", "n_sites", "n_lora", "n_trained"), FAMILIES)
def test_families_hit_the_real_names(name, model, n_sites, n_lora, n_trained) -> None:
    plan = plan_of(name, model)
    assert (plan.n_sites, plan.n_lora, plan.n_trained) == (n_sites, n_lora, n_trained)
    assert plan.skipped == ()
    assert all(n > 0 for n in plan.n_sites_by_rule)


def test_every_file_is_tested() -> None:
    assert sorted({*RUNS, *(row[0] for row in FAMILIES)}) == FILES


PARTS = {"q": (0, 1), "k": (1, 2), "v": (2, 3)}


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("gpt")])
def test_fused_projections_adapt_the_named_parts_only(name: str) -> None:
    # A rank-4 update of the whole c_attn has the same count as q and v at rank 4 each.
    is_gpt3, size = name.startswith("gpt3"), name.split("_")[1]
    letters = name.split("_")[2] if is_gpt3 else "qv"
    width = {"175b": 12288, "medium": 1024, "large": 1280}[size]
    for site in plan_of(name, RUNS[name][0]).sites:
        if site.name.endswith("c_proj"):
            assert "o" in letters
            continue
        adapted = [PARTS[letter] for letter in letters if letter != "o"]
        assert site.spans == tuple((low * width, high * width) for low, high in adapted)
        assert site.transposed


def test_experts_have_the_orientation_of_their_model() -> None:
    mixtral_sites = {s.name.rpartition(".")[2]: s for s in plan_of("mixtral", mixtral).sites}
    gate_up = mixtral_sites["gate_up_proj"]
    assert (gate_up.in_features, gate_up.out_features, gate_up.experts) == (4096, 28672, 8)
    assert not gate_up.transposed
    oss = next(row[1] for row in FAMILIES if row[0] == "gpt_oss")
    gate_up = next(s for s in plan_of("gpt_oss", oss).sites if "gate_up" in s.name)
    assert (gate_up.in_features, gate_up.out_features, gate_up.experts) == (2880, 5760, 128)
    assert gate_up.transposed


def test_tied_heads_stay_frozen_and_are_counted_once() -> None:
    plan = plan_of("gpt2", gpt2(12, 768, 12))
    assert plan.n_base == 124_439_808  # GPT-2 small with its tied head
    assert plan.tied == ()


@pytest.mark.parametrize("name", FILES)
def test_files_point_editors_to_the_schema_and_say_what_they_are_for(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    first, second, *_ = text.splitlines()
    assert first == "# yaml-language-server: $schema=./schema.json"
    assert second.startswith("# ")
    assert all(len(line) <= 100 for line in text.splitlines())
    config = Config.from_text(text)
    assert Config.from_text(config.to_yaml()) == config


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    committed = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    assert committed == json_schema(), "write it anew: lora-inject schema > configs/schema.json"

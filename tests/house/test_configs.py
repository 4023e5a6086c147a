"""Every file of `configs/` against the real names of its model, built on the meta device.

The counts are those of the papers, or by hand from the widths of the layers.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.modules import tree
from torch import nn

import lora_inject as li

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def on_meta(cls: type[nn.Module], config: tf.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def unet() -> nn.Module:
    """The transformer blocks of Stable Diffusion 1.5's UNet, as diffusers 0.42 names them."""
    down = {(f"down_blocks.{b}", a): 320 * 2**b for b in range(3) for a in range(2)}
    up = {(f"up_blocks.{b}", a): 1280 // 2 ** (b - 1) for b in range(1, 4) for a in range(3)}
    layers: dict[str, nn.Module] = {"conv_in": nn.Conv2d(4, 320, 3, device="meta")}

    def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Module:
        return nn.Linear(n_in, n_out, bias=bias, device="meta")

    for (block, a), width in {**down, ("mid_block", 0): 1280, **up}.items():
        path = f"{block}.attentions.{a}"
        layers[f"{path}.proj_in"] = nn.Conv2d(width, width, 1, device="meta")
        path += ".transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            layers[f"{path}.{attention}.to_q"] = linear(width, width)
            layers[f"{path}.{attention}.to_k"] = linear(context, width)
            layers[f"{path}.{attention}.to_v"] = linear(context, width)
            layers[f"{path}.{attention}.to_out.0"] = linear(width, width, bias=True)
        layers[f"{path}.ff.net.0.proj"] = linear(width, 8 * width)
        layers[f"{path}.ff.net.2"] = linear(4 * width, width)
    return tree(layers)


def gpt2(depth: int, width: int, heads: int, positions: int = 1024) -> Callable[[], nn.Module]:
    config = tf.GPT2Config(n_layer=depth, n_embd=width, n_head=heads, n_positions=positions)
    return lambda: on_meta(tf.GPT2LMHeadModel, config)


def roberta(depth: int, width: int, heads: int) -> Callable[[], nn.Module]:
    config = tf.RobertaConfig(
        num_hidden_layers=depth, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=3,
    )  # fmt: skip
    return lambda: on_meta(tf.RobertaForSequenceClassification, config)


def deberta_xxl() -> nn.Module:
    config = tf.DebertaV2Config(
        num_hidden_layers=48, hidden_size=1536, num_attention_heads=24, intermediate_size=6144,
        num_labels=3, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=1536,
        share_att_key=True, position_buckets=256, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    return on_meta(tf.DebertaV2ForSequenceClassification, config)


def smollm2() -> nn.Module:
    config = tf.LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return on_meta(tf.LlamaForCausalLM, config)


gpt3 = gpt2(96, 12288, 96, 2048)
roberta_base, roberta_large = roberta(12, 768, 12), roberta(24, 1024, 16)
gpt2_medium, gpt2_large = gpt2(24, 1024, 16), gpt2(36, 1280, 20)

# The dropout of each of GPT-2's runs.
DROPOUTS = {"e2e": 0.1, "webnlg": 0.1, "dart_script": 0.1, "dart_paper": 0.0}
GAUSSIAN = ("normal", 0.02)
# The runs of the paper and of its scripts: model; sites, A and B, all that trains, as the files
# expect them too; rank, alpha, dropout, init where the papers say them.
RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], tuple[Any, ...]]] = {
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


def causal(name: str, **config: object) -> Callable[[], nn.Module]:
    settings = getattr(tf, f"{name}Config")(**{"num_hidden_layers": 2, **config})
    return lambda: on_meta(getattr(tf, f"{name.removesuffix('Text')}ForCausalLM"), settings)


def other(cls: str, **config: object) -> Callable[[], nn.Module]:
    """A model whose config is named after its first word, of all its layers."""
    first = re.match("[A-Z]+[a-z0-9]*", cls)[0]
    return lambda: on_meta(getattr(tf, cls), getattr(tf, f"{first}Config")(**config))


PHI3_MEDIUM = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10}
# Families: file, model, sites, what else trains. Two layers of the real widths, or all.
FAMILIES: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    ("llama", causal("Llama", num_hidden_layers=32), 224, 0),
    ("mistral", causal("Mistral"), 14, 0),
    ("qwen2", causal("Qwen2"), 14, 0),
    ("qwen3", causal("Qwen3"), 14, 0),
    ("gemma", causal("Gemma"), 14, 0),
    ("gemma", causal("Gemma3Text"), 14, 0),
    ("phi3_mini", causal("Phi3"), 8, 0),
    ("phi3_medium", causal("Phi3", intermediate_size=17920, **PHI3_MEDIUM), 8, 0),
    ("gpt2", gpt2(12, 768, 12), 12, 0),
    ("gpt_neox", causal("GPTNeoX", hidden_size=512, num_attention_heads=8), 8, 0),
    ("bloom", causal("Bloom", hidden_size=1024, n_head=16), 8, 0),
    ("t5", other("T5ForConditionalGeneration", num_layers=2), 12, 0),
    ("bert", other("BertForSequenceClassification"), 24, 2 * 768 + 2),
    ("roberta", roberta_base, 24, 592_899),
    ("deberta", deberta_xxl, 96, 2_365_443),
    ("vit", lambda: on_meta(tf.ViTForImageClassification, tf.ViTConfig(num_labels=10)), 24, 7_690),
    ("clip", lambda: on_meta(tf.CLIPModel, tf.CLIPConfig()), 48, 0),
    ("whisper", other("WhisperForConditionalGeneration"), 24, 0),
    ("mixtral", causal("Mixtral"), 12, 0),
    ("qwen3_moe", causal("Qwen3Moe"), 12, 0),
    ("qwen2_moe", causal("Qwen2Moe"), 18, 0),
    ("gpt_oss", causal("GptOss"), 12, 0),
    ("stable_diffusion_unet", unet, 128, 0),
]
N_BASE = {"gpt2": 124_439_808}  # its tied head is counted once
# What others count in A and B of known models.
KNOWN = {"llama": 19_988_480, "stable_diffusion_unet": 797_184, "roberta": 294_912}


@cache  # a 175B shape is walked once
def built(model: Callable[[], nn.Module]) -> nn.Module:
    return model()


def plan_of(name: str, model: Callable[[], nn.Module]) -> li.Plan:
    return li.plan(built(model), CONFIGS / f"{name}.yaml")


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


@pytest.mark.parametrize(("name", "model", "n_sites", "n_trained"), FAMILIES)
def test_families_hit_the_real_names(name, model, n_sites, n_trained) -> None:
    plan = plan_of(name, model)
    assert (plan.n_sites, plan.n_trained) == (n_sites, n_trained)
    assert plan.n_lora == KNOWN.get(name, plan.n_lora)
    assert plan.n_base == N_BASE.get(name, plan.n_base)
    assert plan.skipped == ()
    assert all(n > 0 for n in plan.n_sites_by_rule)


def test_every_file_is_tested() -> None:
    assert sorted({*RUNS, *(row[0] for row in FAMILIES)}) == FILES


PARTS = {"q": (0, 1), "k": (1, 2), "v": (2, 3)}


@pytest.mark.parametrize("name", ["gpt2", *(name for name in RUNS if name.startswith("gpt"))])
def test_fused_projections_adapt_the_named_parts_only(name: str) -> None:
    # A rank-4 update of the whole c_attn has the same count as q and v at rank 4 each.
    model = RUNS[name][0] if name in RUNS else gpt2(12, 768, 12)
    letters = name.split("_")[2] if name.startswith("gpt3") else "qv"
    for site in plan_of(name, model).sites:
        if site.name.endswith("c_proj"):
            assert "o" in letters
            continue
        width = site.weight_shape[1] // 3
        adapted = [PARTS[letter] for letter in letters if letter != "o"]
        assert site.spans == tuple((low * width, high * width) for low, high in adapted)
        assert site.transposed


def test_the_committed_schema_is_the_one_of_the_code(run: Any) -> None:
    committed = (CONFIGS / "schema.json").read_text(encoding="utf-8")
    assert committed == run("schema").out, "write it anew: lora-inject schema > configs/schema.json"

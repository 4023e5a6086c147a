"""Every config of a family and of the paper against the names of its model, on the meta device.

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
from conftest import script
from helpers.modules import tree
from helpers.refusals import refused
from torch import nn

import lora_inject as li

REPO = Path(__file__).parents[2]
SHIPPED = REPO / "lora_inject" / "configs"


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


gpt3 = gpt2(96, 12288, 96, 2048)
roberta_base, roberta_large = roberta(12, 768, 12), roberta(24, 1024, 16)
gpt2_medium, gpt2_large = gpt2(24, 1024, 16), gpt2(36, 1280, 20)

# The runs of the paper: model; sites, A and B, all that trains, as the files expect them too; rank,
# alpha, dropout, init where the paper says them.
RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], tuple[Any, ...]]] = {
    "roberta_base_glue": (roberta_base, (24, 294_912, 887_811), (8, 8, 0.0, "kaiming")),
    "roberta_large_glue": (roberta_large, (48, 786_432, 1_839_107), (8, 16, 0.0, "kaiming")),
    "deberta_v2_xxl_glue":
        (deberta_xxl, (96, 2_359_296, 4_724_739), (8, 8, 0.0, ("normal", 0.02))),
    "gpt2_medium_nlg": (gpt2_medium, (24, 393_216, 393_216), (4, 32, 0.1, "kaiming")),
    "gpt2_large_nlg": (gpt2_large, (36, 737_280, 737_280), (4, 32, 0.1, "kaiming")),
    "gpt3_175b": (gpt3, (96, 18_874_368, 18_874_368), ()),
}  # fmt: skip


def causal(name: str, **config: object) -> Callable[[], nn.Module]:
    settings = getattr(tf, f"{name}Config")(**{"num_hidden_layers": 2, **config})
    return lambda: on_meta(getattr(tf, f"{name.removesuffix('Text')}ForCausalLM"), settings)


def other(cls: str, **config: object) -> Callable[[], nn.Module]:
    """A model whose config is named after its first word, of all its layers."""
    first = re.match("[A-Z]+[a-z0-9]*", cls)[0]
    return lambda: on_meta(getattr(tf, cls), getattr(tf, f"{first}Config")(**config))


DENSE = ("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text")
PHI3_MEDIUM = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10}
# Families: file, model, sites, what else trains. Two layers of the real widths, or all.
FAMILIES: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    ("llama", causal("Llama", num_hidden_layers=32), 224, 0),
    *(("llama", causal(name), 14, 0) for name in DENSE),
    ("glm4", causal("Glm4"), 12, 0),
    ("qwen3_5", causal("Qwen3_5Text", num_hidden_layers=4), 4 + 3 * 3 + 12, 0),
    ("gemma4", causal("Gemma4Text"), 14, 0),
    ("lfm2", causal("Lfm2", layer_types=["conv", "full_attention"]), 4 + 6, 0),
    ("phi3_mini", causal("Phi3"), 8, 0),
    ("phi3_medium", causal("Phi3", intermediate_size=17920, **PHI3_MEDIUM), 8, 0),
    ("gpt2", gpt2(12, 768, 12), 12, 0),
    ("gpt_neox", causal("GPTNeoX", hidden_size=512, num_attention_heads=8), 8, 0),
    ("bloom", causal("Bloom", hidden_size=1024, n_head=16), 8, 0),
    ("t5", other("T5ForConditionalGeneration", num_layers=2), 12, 0),
    ("bert", other("BertForSequenceClassification"), 24, 2 * 768 + 2),
    ("bert", roberta_base, 24, 592_899),
    ("deberta", deberta_xxl, 96, 2_365_443),
    ("vit", lambda: on_meta(tf.ViTForImageClassification, tf.ViTConfig(num_labels=10)), 24, 7_690),
    ("clip", lambda: on_meta(tf.CLIPModel, tf.CLIPConfig()), 48, 0),
    ("whisper", other("WhisperForConditionalGeneration"), 24, 0),
    *(("mixtral", causal(name), 12, 0) for name in ("Mixtral", "Qwen3Moe", "GptOss")),
    ("qwen2_moe", causal("Qwen2Moe"), 18, 0),
    ("qwen3_5_moe", causal("Qwen3_5MoeText", num_hidden_layers=4), 4 + 3 * 3 + 8 + 12, 0),
    ("glm4_moe", causal("Glm4Moe"), 8 + 3 + 2 + 3, 0),
    ("kimi_k2", causal("DeepseekV3", first_k_dense_replace=1), 10 + 3 + 2 + 3, 0),
    ("deepseek_v4", causal("DeepseekV4"), 8 + 4 + 6, 0),
    ("llama4", causal("Llama4Text"), 18, 0),
    ("stable_diffusion_unet", unet, 128, 0),
]
N_BASE = {"gpt2": 124_439_808}  # its tied head is counted once
# What others count in A and B of known models.
KNOWN = {"stable_diffusion_unet": 797_184}


@cache  # a 175B shape is walked once
def built(model: Callable[[], nn.Module]) -> nn.Module:
    return model()


def plan_of(name: str, model: Callable[[], nn.Module]) -> li.classes.Plan:
    return li.plan(built(model), REPO / "configs" / f"{name}.yaml" if name in RUNS else name)


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
    files = {path.stem for folder in (REPO / "configs", SHIPPED) for path in folder.glob("*.yaml")}
    assert files == {*RUNS, *(row[0] for row in FAMILIES)}


def test_a_file_of_yours_goes_before_a_family_of_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert li.Config.from_yaml("llama").rank == 8
    Path("llama").mkdir()  # the model's own folder
    assert li.Config.from_yaml("llama").rank == 8
    Path("llama").rmdir()
    Path("llama").write_text("{rank: 3, targets: [q_proj]}")
    assert li.Config.from_yaml("llama").rank == 3
    with refused(li.ConfigError, "'lama'", "'llama'"):
        li.Config.from_yaml("lama")


@pytest.mark.parametrize("name", ["gpt2", *(name for name in RUNS if name.startswith("gpt"))])
def test_fused_projections_adapt_the_named_parts_only(name: str) -> None:
    # A rank-4 update of the whole c_attn has the same count as q and v at rank 4 each.
    for site in plan_of(name, RUNS[name][0] if name in RUNS else gpt2(12, 768, 12)).sites:
        width = site.weight_shape[1] // 3
        assert site.spans == ((0, width), (2 * width, 3 * width))
        assert site.transposed


def test_the_committed_schema_is_the_one_of_the_code(run: Any) -> None:
    committed = (SHIPPED / "schema.json").read_text(encoding="utf-8")
    assert committed == script("schema").schema(), "write it anew: python scripts/schema.py"
    assert committed == run("schema").out

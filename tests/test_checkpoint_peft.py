"""Merging files against PEFT's merge_and_unload, and merged outputs against the adapted model."""

import gc
import json

import pytest
import torch
from helpers.checkpoints import assert_verified, load_checkpoint, merge, save_checkpoint, ulps
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file

from lora_inject.checkpoint import Checkpoint, read_weighted

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ENCODER = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 64}  # as many as the vocabulary
TEXT = {**ENCODER, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}


def made_of(family, head, **config):
    """Return what makes a tiny model with random weights, as of `"Llama", "ForCausalLM"`."""
    made = getattr(transformers, f"{family}{head}")
    return lambda: made(made.config_class(**config))


def llama(**config):
    return made_of("Llama", "ForCausalLM", **TEXT, **config)


GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
gpt2 = made_of("GPT2", "LMHeadModel", **GPT2, bos_token_id=0, eos_token_id=0)
bert = made_of("Bert", "ForSequenceClassification", **ENCODER)
vit = made_of("ViT", "ForImageClassification", **VISION)
mixtral = made_of(
    "Mixtral", "ForCausalLM", **{**TEXT, "intermediate_size": 24}, num_local_experts=4
)
ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1}
qwen_moe = made_of("Qwen3Moe", "ForCausalLM", **TEXT, **ROUTED, **QWEN_MOE)
llava = made_of(
    "Llava",
    "ForConditionalGeneration",
    text_config=transformers.LlamaConfig(**TEXT),
    vision_config=transformers.CLIPVisionConfig(**VISION),
    image_token_index=63,
)
gemma3 = made_of(
    "Gemma3",
    "ForConditionalGeneration",
    text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16),
    vision_config=transformers.SiglipVisionConfig(**VISION),
    mm_tokens_per_image=4,
    image_token_index=63,
    boi_token_index=62,
    eoi_token_index=61,
)
qwen2_vl = made_of(
    "Qwen2VL",
    "ForConditionalGeneration",
    text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    vision_config={**QWEN2_VISION, "patch_size": 8},
    image_token_id=63,
    video_token_id=62,
    vision_start_token_id=61,
    vision_end_token_id=60,
)
DEEPSEEK = {**TEXT, **LATENT, **ROUTED, "num_key_value_heads": 4, "v_head_dim": 8, "n_group": 2}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1}
deepseek = made_of("DeepseekV3", "ForCausalLM", **DEEPSEEK, n_routed_experts=4, n_shared_experts=1)
EXPERTS = {"num_local_experts": 4, "head_dim": 8}
gpt_oss = made_of("GptOss", "ForCausalLM", **TEXT, **EXPERTS, num_experts_per_tok=2)
LLAMA4 = {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
llama4 = made_of("Llama4", "ForCausalLM", **TEXT, **EXPERTS, **LLAMA4)
phi3 = made_of("Phi3", "ForCausalLM", **TEXT, pad_token_id=0)


def t5():
    config = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    config = transformers.T5Config(**config, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def on(*targets, **options):
    """The options of a LoraConfig."""
    return {"target_modules": [*targets], **options}


PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}
VIT = ("q_proj", "v_proj", "query", "value", "projection")
MODELS = {
    "llama": (llama(), on("q_proj", "v_proj", "gate_proj", "down_proj")),
    "llama, rslora and patterns": (
        llama(), on("q_proj", "o_proj", "up_proj", use_rslora=True, **PATTERNS),
    ),
    "llama, all biases": (llama(attention_bias=True), on("q_proj", bias="all")),
    "llama, head trained": (llama(), on("q_proj", modules_to_save=["lm_head", "norm"])),
    "gpt2": (gpt2, on("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "bert": (bert, on("query", "value", "dense", task_type="SEQ_CLS")),
    "vit": (vit, on(*VIT, modules_to_save=["classifier"])),
    "mixtral": (mixtral, on("q_proj", **STACKS)),
    "mixtral, down only": (mixtral, on(target_parameters=["mlp.experts.down_proj"])),
    "qwen moe": (qwen_moe, on("q_proj", **STACKS)),
}  # fmt: skip
TOKENS_OF_TIED = {"embed_tokens": [5, 9]}
FAMILIES = {
    "llava": (llava, on("q_proj", "v_proj", "linear_1", "lm_head")),
    "gemma3": (gemma3, on("q_proj", "v_proj", "fc1")),
    "gemma3, tied embedding": (gemma3, on("q_proj", "embed_tokens")),
    "gemma3, tied head": (gemma3, on("q_proj", "lm_head")),
    "qwen2-vl": (qwen2_vl, on("q_proj", "qkv", "fc1")),
    "deepseek": (deepseek, on("q_a_proj", "o_proj", **STACKS)),
    "gpt-oss": (gpt_oss, on("q_proj", **STACKS)),
    "llama4": (llama4, on("q_proj", **STACKS)),
    "phi3": (phi3, on("qkv_proj", "gate_up_proj")),
    # What carries more than A and B.
    "dora": (llama(), on("q_proj", "down_proj", use_dora=True)),
    "dora, gpt2": (gpt2, on("c_attn", "c_proj", fan_in_fan_out=True, use_dora=True)),
    "dora, rslora": (llama(), on("v_proj", use_dora=True, use_rslora=True)),
    "lora bias": (llama(attention_bias=True), on("q_proj", "v_proj", lora_bias=True)),
    "trainable tokens": (llama(), on("q_proj", trainable_token_indices=[3, 60, 7])),
    "trainable tokens, tied": (
        llama(tie_word_embeddings=True), on("q_proj", trainable_token_indices=TOKENS_OF_TIED),
    ),
}  # fmt: skip


# On transformers 4 experts are modules, Gemma 3 has no config that unties it, and encoder-decoders
# are refused.
OF_TRANSFORMERS_5 = {"mixtral, down only", "gemma3, tied embedding", "gemma3, tied head"}


def possible(cases):
    """The names of cases, marked where this version of transformers cannot have them."""
    marks = dict.fromkeys(OF_TRANSFORMERS_5, needs_transformers_5)
    return [pytest.param(case, marks=marks.get(case, ())) for case in cases]


def filled(model, seed, size):
    """Give every adapter tensor random values: PEFT starts B at zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (size * torch.randn(p.shape, generator=g)).to(p.dtype)
        elif "modules_to_save" in name or p.requires_grad:
            p.data = (p.data.float() + 0.1 * torch.randn(p.shape, generator=g)).to(p.dtype)
    return model


def made(tmp_path, make, config, dtype=torch.float32, shard="40KB", seed=0, size=0.1):
    """Save a base, load it back, put a PEFT adapter on it and save that."""
    torch.manual_seed(seed)
    base, plain = tmp_path / "base", make().to(dtype)
    plain.save_pretrained(base, max_shard_size=shard)
    plain = type(plain).from_pretrained(base, dtype=dtype)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=6, **config))
    filled(model, seed, size).save_pretrained(tmp_path / "adapter")
    return base, model.eval()


def merged_by_us(tmp_path, base):
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert_verified(base, [tmp_path / "adapter"], tmp_path / "out")
    return tmp_path / "out"


def assert_adapted(model, out, atol=2e-5, **inputs):
    """What is loaded by plain transformers computes what the adapted model does."""
    plain, info = type(model.get_base_model()).from_pretrained(out, output_loading_info=True)
    # What is not stored must be what is no parameter of the training: sinusoids of positions.
    assert all("embed_positions" in name for name in info["missing_keys"]), info["missing_keys"]
    with torch.no_grad():
        wanted, found = model(**inputs).logits, plain.eval()(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
    assert torch.allclose(found, wanted, atol=atol), float((found - wanted).abs().max())
    assert float((without - wanted).abs().max()) > 1e-3
    return wanted


@pytest.mark.parametrize("case", possible(MODELS))
def test_bfloat16_merge_equals_pefts(tmp_path, case):
    """At most one ulp apart anywhere; fewer than one value in a thousand apart at all."""
    base, model = made(tmp_path, *MODELS[case], torch.bfloat16, size=0.05)
    ours = load_checkpoint(merged_by_us(tmp_path, base))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs = load_checkpoint(tmp_path / "theirs")
    if transformers.__version__.startswith("5.0."):  # it saves a LayerNorm's as gamma and beta
        new = {"gamma": "weight", "beta": "bias"}
        theirs = {".".join(new.get(p, p) for p in n.split(".")): t for n, t in theirs.items()}
    assert ours.keys() == theirs.keys()
    before = load_checkpoint(base)
    off = total = changed = 0
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype, name
        if "experts" in name:  # PEFT rounds the delta before it adds it, here and only here
            apart = (ours[name].float() - t.float()).abs()
            unit = 2.0 ** (before[name].float().abs().maximum(t.float().abs()).log2().floor() - 7)
            assert float((apart / unit).max()) <= 1, name
        else:
            distance = ulps(ours[name], t)
            assert int(distance.max()) <= 1, name
            off, total = off + int((distance > 0).sum()), total + t.numel()
        changed += not torch.equal(t, before[name]) if name in before else 1
    assert off <= 1e-3 * total + 1, f"{off} of {total}"
    assert changed > 1


@pytest.mark.parametrize("case", possible(MODELS | FAMILIES))
def test_float32_merge_loaded_by_plain_transformers_equals_the_adapted_model(tmp_path, case):
    base, model = made(tmp_path, *(MODELS | FAMILIES)[case], size=0.3)
    inputs = {"input_ids": torch.tensor([[3, 60, 7, 5, 9, 11, 12, 13], [1, 2, 3, 4, 5, 6, 7, 8]])}
    if case == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert_adapted(
        model, merged_by_us(tmp_path, base), 5e-5 if case in FAMILIES else 2e-5, **inputs
    )


def test_other_layers_of_t5_merge(tmp_path):
    base, model = made(tmp_path, t5, {"target_modules": ["q", "wo"]}, size=0.3)
    inputs = {"input_ids": torch.arange(3, 12)[None], "decoder_input_ids": torch.tensor([[0, 5]])}
    assert_adapted(model, merged_by_us(tmp_path, base), **inputs)


def test_per_expert_adapter_of_older_transformers(tmp_path):
    """Names as in the file (`block_sparse_moe.experts.0.w1`) merge without the class's help."""
    torch.manual_seed(0)
    mixtral().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    before = load_checkpoint(tmp_path / "base")
    tensors = {}
    for layer in range(2):
        for e in range(4):
            for leaf in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{leaf}"
                out, into = before[name + ".weight"].shape
                tensors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(2, into)
                tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(out, 2)
    adapter = tmp_path / "adapter"
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"]).save_pretrained(adapter)
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = load_checkpoint(merged_by_us(tmp_path, tmp_path / "base"))
    for name, w in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = w.double()
        if f"{path}.lora_A.weight" in tensors:
            a, b = (tensors[f"{path}.lora_{x}.weight"].double() for x in "AB")
            wanted = wanted + 2 * b @ a
        assert int(ulps(found[name], wanted.to(w.dtype)).max()) <= 1
    gc.collect()


@pytest.mark.parametrize("trained", [[], ["embed_tokens", "lm_head"]], ids=["", "embeddings"])
def test_folder_of_unsloth(tmp_path, trained):
    """PEFT's folder, with the config that unsloth writes: its own mark, a regex for the targets."""
    config = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": trained or None}
    base, model = made(tmp_path, llama(), config, size=0.3)
    file = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text())
    written |= {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3.2-1b-unsloth-bnb-4bit",
        "target_modules": "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
        "|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|down_proj)))",
        "task_type": "CAUSAL_LM",
    }
    file.write_text(json.dumps(written))
    ids = torch.arange(1, 21).view(2, 10)
    assert_adapted(model, merged_by_us(tmp_path, base), input_ids=ids)


def test_experts_of_unsloth_go_by_expert_first_when_told(run, tmp_path):
    """The columns of its B are ordered otherwise than PEFT's, and no shape tells."""
    base, model = made(tmp_path, *MODELS["qwen moe"], size=0.3)
    wanted = load_checkpoint(merged_by_us(tmp_path, base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, experts = load_file(file), model.config.num_experts
    for name, B in tensors.items():
        if "experts" in name and name.endswith("lora_B.weight"):
            tensors[name] = B.view(len(B), -1, experts).transpose(1, 2).reshape(B.shape)
    save_file(tensors, file)
    checkpoint = Checkpoint.open(base)
    part = read_weighted(tmp_path / "adapter", checkpoint, expert_major=True)
    merge(checkpoint, [part], tmp_path / "again")
    found = load_checkpoint(tmp_path / "again")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    words = ("merge", base, tmp_path / "adapter", "--expert-major", "-o", tmp_path / "cli")
    assert run(*words).code == 0
    assert load_checkpoint(tmp_path / "cli").keys() == found.keys()
    for name, tensor in load_checkpoint(tmp_path / "cli").items():
        assert torch.equal(tensor, found[name])


@pytest.mark.parametrize("target", ["embed_tokens", "patch"])
def test_dora_on_embeddings_and_convolutions_equals_pefts_merge(tmp_path, target):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    if target == "embed_tokens":
        model.add_module("embed_tokens", torch.nn.Embedding(12, 8))
    else:
        model.add_module("patch", torch.nn.Conv2d(3, 8, 4))
    base = save_checkpoint(tmp_path / "base", {k: v.clone() for k, v in model.state_dict().items()})
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[target], use_dora=True)
    adapted = filled(peft.get_peft_model(model, config), 0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_checkpoint(merged_by_us(tmp_path, base))[f"{target}.weight"]
    wanted = adapted.merge_and_unload().state_dict()[f"{target}.weight"]
    assert torch.allclose(found, wanted, atol=1e-6)

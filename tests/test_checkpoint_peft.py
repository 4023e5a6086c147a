"""Merging files against PEFT's merge_and_unload, and merged outputs against the adapted model."""

import gc
import json

import pytest
import torch
from helpers.checkpoints import load_checkpoint, ulps
from safetensors.torch import load_file, save_file

from lora_inject.checkpoint import Checkpoint, MergeOptions, merge_checkpoint, verify_checkpoint
from lora_inject.checkpoint.adapter_files import read_weighted
from lora_inject.cli import app
from lora_inject.errors import CheckpointError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def llama(**kwargs):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **kwargs,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return transformers.MixtralForCausalLM(config)


def qwen_moe():
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        max_position_embeddings=64,
        decoder_sparse_step=1,
    )
    return transformers.Qwen3MoeForCausalLM(config)


MODELS = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}),
    "llama, rslora and patterns": (
        llama,
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"layers.1.mlp.up_proj": 5},
        },
    ),
    "llama, all biases": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "llama, head trained": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "vit": (
        vit,
        {
            "target_modules": ["q_proj", "v_proj", "query", "value", "projection"],
            "modules_to_save": ["classifier"],
        },
    ),
    "mixtral": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "mixtral, down only": (
        mixtral,
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "qwen moe": (
        qwen_moe,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


def filled(model, seed, size):
    """Give every adapter tensor random values: PEFT starts B at zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (size * torch.randn(p.shape, generator=g)).to(p.dtype)
        elif "modules_to_save" in name or p.requires_grad:
            p.data = (p.data.float() + 0.1 * torch.randn(p.shape, generator=g)).to(p.dtype)
    return model


def made(tmp_path, make, config, dtype, shard="10KB", seed=0, size=0.1):
    """Save a base, load it back, put a PEFT adapter on it and save that."""
    torch.manual_seed(seed)
    base = tmp_path / "base"
    make().to(dtype).save_pretrained(base, max_shard_size=shard)
    plain = type(make()).from_pretrained(base, dtype=dtype)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=6, **config))
    filled(model, seed, size).save_pretrained(tmp_path / "adapter")
    return base, model.eval()


def merged_by_us(tmp_path, base, **options):
    checkpoint = Checkpoint.open(base)
    part = read_weighted(tmp_path / "adapter", checkpoint)
    merge_checkpoint(checkpoint, [part], tmp_path / "out", options=MergeOptions(**options))
    assert (
        verify_checkpoint(
            checkpoint, [part], tmp_path / "out", options=MergeOptions(**options)
        ).problems
        == ()
    )
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_bfloat16_merge_equals_pefts(tmp_path, case):
    """At most one ulp apart anywhere; fewer than one value in a thousand apart at all."""
    base, model = made(tmp_path, *MODELS[case], torch.bfloat16, size=0.05)
    ours = load_checkpoint(merged_by_us(tmp_path, base))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs = load_checkpoint(tmp_path / "theirs")
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_float32_merge_loaded_by_plain_transformers_equals_the_adapted_model(tmp_path, case):
    base, model = made(tmp_path, *MODELS[case], torch.float32, size=0.3)
    out = merged_by_us(tmp_path, base)
    plain = type(model.get_base_model()).from_pretrained(out).eval()
    g = torch.Generator().manual_seed(1)
    if case == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    else:
        inputs = {"input_ids": torch.randint(1, 64, (2, 9), generator=g)}
    with torch.no_grad():
        wanted, found = model(**inputs).logits, plain(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
    assert torch.allclose(found, wanted, atol=2e-5), float((found - wanted).abs().max())
    assert float((without - wanted).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "ends", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join
)
@pytest.mark.parametrize("shard", ["10KB", "10GB"])
def test_tied_llama_loaded_by_plain_transformers_equals_the_adapted_model(tmp_path, ends, shard):
    config = {"target_modules": ["q_proj", *ends]}
    base, model = made(
        tmp_path, lambda: llama(tie_word_embeddings=True), config, torch.float32, shard
    )
    assert "lm_head.weight" not in load_checkpoint(base)
    out = merged_by_us(tmp_path, base)
    plain = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        wanted, found = model(ids).logits, plain(ids).logits
        theirs = model.merge_and_unload()(ids).logits
    assert torch.allclose(found, wanted, atol=2e-5), float((found - wanted).abs().max())
    assert float((theirs - wanted).abs().max()) > 0.1  # PEFT's own merge is off: the test can tell
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,  # as many rows as the vocabulary: the name must decide
}
BOTH = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def masked(name, **config):
    return getattr(transformers, f"{name}ForMaskedLM")(
        getattr(transformers, f"{name}Config")(**config)
    )


def seq2seq(name):
    config = getattr(transformers, f"{name}Config")(**BOTH, forced_eos_token_id=None)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def random_everywhere(make):
    """A model without a zero: biases begin at zero, and a lost one would not be missed."""
    model = make()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


MLM = {
    "bert": (lambda: masked("Bert", **ENCODER), "word_embeddings", "decoder"),
    "roberta": (
        lambda: masked("Roberta", **ENCODER, pad_token_id=1),
        "word_embeddings",
        "decoder",
    ),
    "distilbert": (
        lambda: masked(
            "DistilBert",
            vocab_size=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=64,
        ),
        "word_embeddings",
        "vocab_projector",
    ),
    "electra": (
        lambda: masked("Electra", **ENCODER, embedding_size=32),
        "word_embeddings",
        "generator_lm_head",
    ),
    "albert": (
        lambda: masked("Albert", **ENCODER, embedding_size=16),
        "word_embeddings",
        "decoder",
    ),
    "deberta": (lambda: masked("DebertaV2", **ENCODER), "word_embeddings", "decoder"),
    "modernbert": (
        lambda: masked(
            "ModernBert",
            **ENCODER,
            **dict.fromkeys(
                ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0
            ),
        ),
        "tok_embeddings",
        "decoder",
    ),
    "bart": (lambda: seq2seq("Bart"), "embed_tokens", "lm_head"),
    "mbart": (lambda: seq2seq("MBart"), "embed_tokens", "lm_head"),
    "pegasus": (lambda: seq2seq("Pegasus"), "embed_tokens", "lm_head"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", ["embedding", "head", "both"])
@pytest.mark.parametrize("case", MLM)
def test_tied_ends_loaded_by_plain_transformers_equal_the_adapted_model(tmp_path, case, ends):
    make, embedding, head = MLM[case]
    targets = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[ends]
    base, model = made(
        tmp_path, lambda: random_everywhere(make), {"target_modules": targets}, torch.float32
    )
    out = merged_by_us(tmp_path, base)
    plain, info = type(model.get_base_model()).from_pretrained(out, output_loading_info=True)
    # What is not stored must be what is no parameter of the training: sinusoids of positions.
    assert all("embed_positions" in name for name in info["missing_keys"]), info["missing_keys"]
    inputs = {"input_ids": torch.arange(3, 21).view(2, 9)}
    if plain.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(4, 22).view(2, 9)
    with torch.no_grad():
        wanted, found = model(**inputs).logits, plain.eval()(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
    assert torch.allclose(found, wanted, atol=2e-5), float((found - wanted).abs().max())
    assert float((without - wanted).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "shared"])
def test_ends_of_t5_are_refused_with_the_reason(tmp_path, target):
    """T5's config cannot say that its ends are apart: the flag also scales its outputs."""
    base, _ = made(tmp_path, t5, {"target_modules": ["q", target]}, torch.float32)
    checkpoint = Checkpoint.open(base)
    with pytest.raises(CheckpointError, match="cannot load them apart") as caught:
        merge_checkpoint(
            checkpoint, [read_weighted(tmp_path / "adapter", checkpoint)], tmp_path / "o"
        )
    assert "Adapt" in str(caught.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.filterwarnings("ignore")
def test_other_layers_of_t5_merge(tmp_path):
    base, model = made(tmp_path, t5, {"target_modules": ["q", "wo"]}, torch.float32)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(merged_by_us(tmp_path, base))
    inputs = {"input_ids": torch.arange(3, 12)[None], "decoder_input_ids": torch.tensor([[0, 5]])}
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**inputs).logits, model(**inputs).logits, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
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


# More architectures -----------------------------------------------------------------------------

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava():
    t = transformers
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT),
        vision_config=t.CLIPVisionConfig(**VISION),
        image_token_index=63,
    )
    return t.LlavaForConditionalGeneration(config)


def gemma3():
    t = transformers
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16),
        vision_config=t.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=62,
        eoi_token_index=61,
    )
    return t.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        image_token_id=63,
        video_token_id=62,
        vision_start_token_id=61,
        vision_end_token_id=60,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def deepseek():
    config = transformers.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_shared_experts=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.GptOssForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **TEXT,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, pad_token_id=0))


STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
FAMILIES = {
    "llava": (llava, {"target_modules": ["q_proj", "v_proj", "linear_1", "lm_head"]}),
    "gemma3": (gemma3, {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "gemma3, tied embedding": (gemma3, {"target_modules": ["q_proj", "embed_tokens"]}),
    "gemma3, tied head": (gemma3, {"target_modules": ["q_proj", "lm_head"]}),
    "qwen2-vl": (qwen2_vl, {"target_modules": ["q_proj", "qkv", "fc1"]}),
    "deepseek": (deepseek, {"target_modules": ["q_a_proj", "o_proj"], **STACKS}),
    "gpt-oss": (gpt_oss, {"target_modules": ["q_proj"], **STACKS}),
    "llama4": (llama4, {"target_modules": ["q_proj"], **STACKS}),
    "phi3": (phi3, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    # What carries more than A and B.
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora, gpt2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "dora, rslora": (llama, {"target_modules": ["v_proj"], "use_dora": True, "use_rslora": True}),
    "lora bias": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "trainable tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60, 7]},
    ),
    "trainable tokens, tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9]}},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FAMILIES)
def test_family_loaded_by_plain_transformers_equals_the_adapted_model(tmp_path, case):
    base, model = made(tmp_path, *FAMILIES[case], torch.float32, size=0.3)
    out = merged_by_us(tmp_path, base)
    plain = type(model.get_base_model()).from_pretrained(out).eval()
    ids = torch.tensor([[3, 60, 7, 5, 9, 11, 12, 13], [1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        wanted, found = model(input_ids=ids).logits, plain(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=5e-5), float((found - wanted).abs().max())
    assert float((without - wanted).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trained", [[], ["embed_tokens", "lm_head"]], ids=["", "embeddings"])
def test_folder_of_unsloth(tmp_path, trained):
    """PEFT's folder, with the config that unsloth writes: its own mark, a regex for the targets."""
    config = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": trained or None}
    base, model = made(tmp_path, llama, config, torch.float32, size=0.3)
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
    plain = transformers.LlamaForCausalLM.from_pretrained(merged_by_us(tmp_path, base)).eval()
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_experts_of_unsloth_go_by_expert_first_when_told(tmp_path):
    """The columns of its B are ordered otherwise than PEFT's, and no shape tells."""
    base, model = made(tmp_path, *MODELS["qwen moe"], torch.float32, size=0.3)
    wanted = load_checkpoint(merged_by_us(tmp_path, base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, experts = load_file(file), model.config.num_experts
    for name, B in tensors.items():
        if "experts" in name and name.endswith("lora_B.weight"):
            tensors[name] = B.view(len(B), -1, experts).transpose(1, 2).reshape(B.shape)
    save_file(tensors, file)
    checkpoint = Checkpoint.open(base)
    part = read_weighted(tmp_path / "adapter", checkpoint, expert_major=True)
    merge_checkpoint(checkpoint, [part], tmp_path / "again")
    found = load_checkpoint(tmp_path / "again")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    options = ["--expert-major", "-o", str(tmp_path / "cli")]
    with pytest.raises(SystemExit) as left:
        app(["merge", str(base), str(tmp_path / "adapter"), *options], prog_name="lora-inject")
    assert not left.value.code
    assert load_checkpoint(tmp_path / "cli").keys() == found.keys()
    for name, tensor in load_checkpoint(tmp_path / "cli").items():
        assert torch.equal(tensor, found[name])


@pytest.mark.filterwarnings("ignore")
def test_options_of_the_readers_do_not_trip_over_variants(tmp_path):
    base, _ = made(tmp_path, *FAMILIES["dora"], torch.float32)
    part = read_weighted(tmp_path / "adapter", Checkpoint.open(base), prefer="config")
    assert part.magnitudes.keys() == part.state.sites.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["embed_tokens", "patch"])
def test_dora_on_embeddings_and_convolutions_equals_pefts_merge(tmp_path, target):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    if target == "embed_tokens":
        model.add_module("embed_tokens", torch.nn.Embedding(12, 8))
    else:
        model.add_module("patch", torch.nn.Conv2d(3, 8, 4))
    from helpers.checkpoints import save_checkpoint

    base = save_checkpoint(tmp_path / "base", {k: v.clone() for k, v in model.state_dict().items()})
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[target], use_dora=True)
    adapted = filled(peft.get_peft_model(model, config), 0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_checkpoint(merged_by_us(tmp_path, base))[f"{target}.weight"]
    wanted = adapted.merge_and_unload().state_dict()[f"{target}.weight"]
    assert torch.allclose(found, wanted, atol=1e-6)

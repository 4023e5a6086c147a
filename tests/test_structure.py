"""What models are made of: sharing, tying, wrappers, hooks, attention, stacked experts, no values.

Each structure is held to the dense float64 reference of the model as it stood before
`inject`, or is refused with a message that names the site and the way out, the model untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill, same_bits, snapshot
from helpers.reference import (
    EXACT,
    IDS,
    SCALE,
    adapted,
    config,
    dense,
    gpt2,
    hold,
    llama,
    logits,
    random,
    refused,
    saved,
)
from torch import Tensor, nn

import lora_inject as li

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms

# ------------------------------------------------------------------------- one module, many names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.tanh(self.up(x)))
        return found


class Recurrent(nn.Module):
    """A block under three names, one of them on another path."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])
        self.last = nn.ModuleDict({"again": self.blocks[0]})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last["again"](x)
        return found


@pytest.mark.parametrize(
    "targets", [["up"], [r"blocks\.2\.up"], [r"again\.up"], [r"again\.up", "down"]], ids=str
)
def test_a_block_under_three_names_is_adapted_once(targets: list[str], tmp_path: Path) -> None:
    plain, x = Recurrent().double(), random(3, 4)
    before = snapshot(plain)
    model = adapted(plain, *targets)
    sites = li.adapters(model)["default"].sites
    assert sites["blocks.0.up"].aliases == ("blocks.2.up", "last.again.up")
    assert all(name.startswith(("blocks.0", "blocks.1")) for name in sites)
    hold(plain, model, lambda m: m(x))
    assert li.unreached(model, lambda: model(x)) == []
    for layout in ("native", "peft"):
        path, _ = saved(model, tmp_path, layout)
        again = li.load_adapter(copy.deepcopy(plain), path)
        assert error(again(x), model(x)) < EXACT
    li.eject(fill(li.inject(plain, config(*targets))))
    assert snapshot(plain) == before


# ------------------------------------------------------------------------------------ tied weights


def t5(tied: bool) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    made = T5Config(**sizes, **tokens, dropout_rate=0.0, tie_word_embeddings=tied)
    return T5ForConditionalGeneration(made).eval().double()


def t5_logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
    return found


HEADS = {"llama": "embed_tokens", "gpt2": "wte"}
BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("which", ["head", "embedding", "both"])
@pytest.mark.parametrize("family", BUILD)
def test_a_tied_model_merges_saves_and_reloads(family: str, which: str, tmp_path: Path) -> None:
    plain = BUILD[family]()
    embedding = plain.get_input_embeddings()
    assert plain.lm_head.weight is embedding.weight
    targets = {"head": ["lm_head"], "embedding": [HEADS[family]]}
    model = adapted(plain, *targets.get(which, ["lm_head", HEADS[family]]))
    wanted = logits(dense(plain, model))
    assert error(logits(plain), wanted) > 0.01
    assert error(logits(model), wanted) < EXACT
    keys = [*model.state_dict()]
    report = li.merge(model)
    assert report.n_tensors == (2 if which == "both" else 1)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert error(logits(model), wanted) < EXACT
    done = copy.deepcopy(model)
    li.eject(done)
    done.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert error(logits(again), wanted) < EXACT
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    li.unmerge(model)
    assert model.lm_head._parameters["weight"] is model.get_input_embeddings()._parameters["weight"]
    assert model.config.tie_word_embeddings is True
    assert [*model.state_dict()] == keys
    assert same_bits(model.lm_head._parameters["weight"], plain.lm_head.weight)


T5 = [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q", "embed_tokens"]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", T5, ids=str)
def test_a_t5_merges_saves_and_reloads(targets: list[str], tied: bool, tmp_path: Path) -> None:
    plain = t5(tied)
    # transformers ties a T5 whatever the flag says; the flag decides on scaling the outputs.
    assert plain.lm_head.weight is plain.shared.weight
    says = plain.config.tie_word_embeddings
    model = adapted(plain, *targets)
    assert li.unreached(model, lambda: t5_logits(model)) == []
    wanted = t5_logits(dense(plain, model))
    assert error(t5_logits(plain), wanted) > 0.001
    assert error(t5_logits(model), wanted) < EXACT
    li.merge(model)
    assert error(t5_logits(model), wanted) < EXACT
    done = copy.deepcopy(model)
    li.eject(done)
    done.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert error(t5_logits(again), wanted) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())
    holders = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens]
    assert len({id(m._parameters["weight"]) for m in holders}) == 1
    assert model.lm_head._parameters["weight"] is holders[0]._parameters["weight"]
    assert model.config.tie_word_embeddings is says


def test_a_tied_name_that_is_never_called_is_refused_by_a_probe() -> None:
    model = t5(tied=True)
    run = lambda: li.inject(model, config("shared"), probe=lambda: t5_logits(model))  # noqa: E731
    refused(model, run, li.LayerError, "'shared'.*neither reached its layer nor read")


def test_untying_a_model_whose_forward_reads_the_flag_is_refused() -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    sparse = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_experts": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "num_decoder_layers": 1}
    made = SwitchTransformersConfig(**sizes, **sparse, **tokens, tie_word_embeddings=True)
    model = SwitchTransformersForConditionalGeneration(made).eval()
    assert model.lm_head.weight is model.shared.weight
    fill(li.inject(model, config("lm_head")))
    # It scales what goes into a tied head: untied, merged would not equal unmerged.
    refused(model, lambda: li.merge(model), li.LayerError, "tie_word_embeddings")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in model.state_dict().items() if "lora_" not in key}


# ------------------------------------------------------------------------------- roots and names


def test_the_root_is_a_site(tmp_path: Path) -> None:
    plain, x = nn.Linear(5, 4).double(), random(3, 5)
    before = snapshot(plain)
    model = adapted(plain, "^$")
    hold(plain, model, lambda m: m(x))
    for layout in ("native", "peft"):
        if layout == "peft":
            with pytest.raises(li.FormatError, match="native"):
                saved(model, tmp_path, layout)
            continue
        path, _ = saved(model, tmp_path, layout)
        assert error(li.load_adapter(copy.deepcopy(plain), path)(x), model(x)) < EXACT
    li.eject(fill(li.inject(plain, config("^$"))))
    assert snapshot(plain) == before


def test_a_container_as_the_root_is_refused_and_its_contents_named() -> None:
    model = nn.MultiheadAttention(8, 2)
    run = lambda: li.inject(model, config("^$"))  # noqa: E731
    refused(model, run, li.MatchError, "'in_proj_weight', 'out_proj'")


NAMES = [
    "lora_A",
    "lora_B__default",
    "weight",
    "base_layer",
    "base_model",
    "lora_in",
    "parametrize",
]


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_base_modules_named_like_parts_of_an_adapter(layout: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 4) for name in NAMES}
        return nn.Sequential(nn.ModuleDict({"model": nn.ModuleDict(layers)})).double()

    def run(m: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
        for name in NAMES:
            x = torch.tanh(m.get_submodule(f"0.model.{name}")(x))
        return x

    plain = build()
    before = snapshot(plain)
    named = [rf"^0\.model\.{name}" for name in NAMES[:-1]]
    model = adapted(plain, *named)
    assert set(li.adapters(model)["default"].sites) == {f"0.model.{n}" for n in NAMES[:-1]}
    flags = {n for n, p in model.named_parameters() if p.requires_grad}
    assert flags == {f"0.model.{n}.lora_{side}__default" for n in NAMES[:-1] for side in "AB"}, (
        "the base's own tensors are frozen, whatever they are called"
    )
    hold(plain, model, run)
    path, _ = saved(model, tmp_path, layout)
    again = li.load_adapter(build(), path)
    assert error(run(again), run(model)) < EXACT
    li.eject(fill(li.inject(plain, config(*named))))
    assert snapshot(plain) == before


# --------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "inject"])
def test_compiled_before_or_after_inject(first: str, tmp_path: Path) -> None:
    plain, x = nn.Sequential(Block(), Block()).double(), random(3, 4)
    model: Any = copy.deepcopy(plain)
    if first == "compile":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert error(model(x), plain(x)) < EXACT  # a graph of the plain model is there
    li.inject(model, config("up", r"down\.weight"))
    if first == "inject":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    inner = model._orig_mod
    assert same_bits(model(x), plain(x))
    fill(model)
    wanted = dense(plain, inner)(x)
    assert error(model(x), wanted) < EXACT
    path, _ = saved(model, tmp_path, "native")
    li.merge(model)
    assert error(model(x), wanted) < EXACT
    li.unmerge(model)
    assert error(model(x), wanted) < EXACT
    li.eject(model)
    assert same_bits(model(x), plain(x))
    li.load_adapter(model, path)
    assert error(model(x), wanted) < EXACT


# ------------------------------------------------------------------------------ accelerate's hooks


def hooked(model: nn.Module) -> nn.Module:
    """What device_map does to a model that fits: a hook on every module, nothing offloaded."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


@pytest.mark.parametrize("first", ["hooks", "inject"])
def test_hooks_that_move_inputs_hide_no_adapter(first: str) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    plain = nn.Sequential(Block(), Block()).double()
    x, model = random(3, 4), copy.deepcopy(plain)
    targets = config("up", r"down\.weight")
    if first == "hooks":
        before = snapshot(hooked(model))
        li.inject(model, targets)
    else:
        hooked(li.inject(model, targets))
    fill(model)
    assert li.unreached(model, lambda: model(x)) == []
    hold(plain, model, lambda m: m(x))
    if first == "hooks":
        li.eject(model)
        assert snapshot(model) == before
        fill(li.inject(model, targets))
    wanted = model(x)
    remove_hook_from_submodules(model)
    assert same_bits(model(x), wanted)
    li.eject(model)
    assert same_bits(model(x), plain(x))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_refused(where: str, tmp_path: Path) -> None:
    import accelerate

    model = nn.Sequential(Block(), Block())
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    classes = [(id(m), type(m), [*m.__dict__]) for m in model.modules()]
    keys = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(li.LayerError, match=r"'0\.up'.*offloaded its weights.*before dispatch"):
        li.inject(model, config("up"))
    assert [(id(m), type(m), [*m.__dict__]) for m in model.modules()] == classes
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == keys


def test_a_model_offloaded_after_inject_serves_its_adapter() -> None:
    import accelerate

    plain, x = nn.Sequential(Block(), Block()), torch.randn(3, 4)
    model = adapted(plain, "up", r"down\.weight")
    wanted = dense(plain, model)(x.double())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert error(model(x), wanted) < FLOAT32
    shapes = [(type(m), [*m._parameters]) for m in model.modules()]
    for run in (lambda: li.merge(model), lambda: li.save_adapter(model, "never")):
        with pytest.raises((li.LayerError, li.FormatError), match="meta device"):
            run()
    assert [(type(m), [*m._parameters]) for m in model.modules()] == shapes
    with torch.no_grad():
        assert error(model(x), wanted) < FLOAT32


def test_training_under_offload_is_never_in_vain() -> None:
    import accelerate

    model = adapted(nn.Sequential(Block(), Block()), "up")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        model.train()(torch.randn(3, 4)).sum().backward()
    except li.LayerError as raised:
        assert "offload" in str(raised)  # noqa: PT017 - refused, or right
        return
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())


# --------------------------------------------------------------------------------------- attention


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        k = x[..., : self.attn.kdim]
        v = x[..., : self.attn.vdim]
        found: Tensor = self.attn(x, k, v, need_weights=False)[0]
        return found


def test_attention_with_separate_weights_named_as_a_module(tmp_path: Path) -> None:
    plain, x = Attends(kdim=6, vdim=4).double(), random(2, 3, 8)
    model = adapted(plain, "attn")
    sites = li.adapters(model)["default"].sites
    shapes = {name: (s.in_features, s.out_features) for name, s in sites.items()}
    assert shapes == {
        "attn.q_proj_weight": (8, 8),
        "attn.k_proj_weight": (6, 8),
        "attn.v_proj_weight": (4, 8),
        "attn.out_proj": (8, 8),
    }
    hold(plain, model, lambda m: m(x))
    path, _ = saved(model, tmp_path, "native")
    assert error(li.load_adapter(copy.deepcopy(plain), path)(x), model(x)) < EXACT


def test_slices_of_an_attentions_in_proj_weight() -> None:
    plain, x = Attends().double(), random(2, 3, 8)
    rule = {"match": "in_proj_weight", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}
    model = adapted(plain, rule)
    (site,) = li.adapter_state(model).sites.values()
    assert (tuple(site.A.shape), tuple(site.B.shape)) == ((4, 8), (16, 2))
    wide = copy.deepcopy(plain)
    with torch.no_grad():
        wide.attn.in_proj_weight[:8] += SCALE * site.B[:8] @ site.A[:2]
        wide.attn.in_proj_weight[16:] += SCALE * site.B[8:] @ site.A[2:]
    for training in (True, False):
        assert error(model.train(training)(x), wide(x)) < EXACT
    read = model.attn.in_proj_weight
    assert same_bits(read[8:16], plain.attn.in_proj_weight[8:16])
    li.merge(model)
    assert same_bits(model.attn._parameters["in_proj_weight"][8:16], read[8:16])
    assert error(model(x), wide(x)) < EXACT


DECODER = ["linear1", "linear2", "self_attn", "multihead_attn"]


@pytest.mark.parametrize("targets", [DECODER, ["multihead_attn"], ["out_proj"]], ids=str)
def test_a_decoder_layer(targets: list[str]) -> None:
    plain = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    x, memory = random(2, 3, 8), random(2, 4, 8)
    model = adapted(plain, *targets)
    assert li.unreached(model, lambda: model(x, memory)) == []
    for training in (True, False):
        hold(plain, model.train(training), lambda m: m(x, memory))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_with_and_without_padding(padded: bool, nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double()
    mask = torch.tensor([[False] * 4, [False, False, False, True]]) if padded else None
    x = random(2, 4, 8)
    model = adapted(plain, "linear1", "linear2", "self_attn")

    def run(m: nn.Module) -> Tensor:
        found: Tensor = m(x, src_key_padding_mask=mask)
        return found[:, :3]  # what is padded is nobody's business

    hold(plain, model.train(), run)
    model.eval()
    wide = dense(plain, model)
    with torch.no_grad():
        assert error(run(model), run(wide.train())) < EXACT


# --------------------------------------------------------------------------- recurrent and bilinear


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda c: c.__name__)
def test_recurrent_cells_read_their_weights(make: Any) -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = make(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            found = self.cell(x)
            found = self.cell(x, found)
            result: Tensor = found[0] if isinstance(found, tuple) else found
            return result

    plain, x = Once().double(), random(3, 4)
    hold(plain, adapted(plain, "weight_ih", "weight_hh"), lambda m: m(x))


def test_a_bilinear_layer_between_others() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(4, 3)
            self.pair = nn.Bilinear(3, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.pair(self.left(x), x)
            return found

    plain, x = Pair().double(), random(3, 4)
    hold(plain, adapted(plain, "left", "pair"), lambda m: m(x))


# --------------------------------------------------------------------------------- stacked experts

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 13,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
MOE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", "out_in", {"num_local_experts": 3}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "out_in",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        "out_in",
        {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "q_lora_rank": 4,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        "in_out",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 4,
            "layer_types": ["full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        "in_out",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "head_dim": 4,
            "intermediate_size_mlp": 8,
            "moe_layers": [0],
            "layer_types": ["full_attention"],
            "no_rope_layers": [1],
            "pad_token_id": 0,
        },
    ),
}


def experts(family: str, how: str = "eager") -> tuple[Any, str]:
    """A tiny model of stacked experts, and the layout of its weights."""
    import transformers

    torch.manual_seed(0)
    made, cls, layout, options = MOE[family]
    settings = getattr(transformers, made)(**(SIZES | options))
    if how != "default":
        settings._experts_implementation = how
    model = getattr(transformers, cls)(settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key:  # some families leave them uninitialized
                parameter.normal_(0.0, 0.3)
    return model.eval(), layout


def expert_rule(layout: str) -> dict[str, Any]:
    return {"match": r"experts\.(gate_up_proj|down_proj)", "layout": layout}


def with_expert_deltas(plain: nn.Module, model: nn.Module, layout: str) -> nn.Module:
    """The plain model with the dense deltas in its experts, expert by expert."""
    wide = copy.deepcopy(plain)
    for site in li.adapter_state(model).sites.values():
        W = wide.get_parameter(site.spec.weight)
        with torch.no_grad():
            for e in range(len(W)):
                delta = (SCALE * site.B[e].double() @ site.A[e].double()).to(W.dtype)
                W[e] += delta if layout == "out_in" else delta.t()
    return wide


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_equal_the_dense_model(family: str) -> None:
    plain, layout = experts(family)
    plain = plain.double()
    model = copy.deepcopy(plain)
    li.inject(model, config(expert_rule(layout)))
    assert same_bits(logits(model), logits(plain))
    assert all(s.experts in (3, 4) for s in li.adapters(model)["default"].sites.values())
    fill(model)
    wide = with_expert_deltas(plain, model, layout)
    assert error(logits(plain), logits(wide)) > 1e-3
    assert error(logits(model), logits(wide)) < EXACT
    gradients_of_experts(model, wide, layout)
    li.merge(model)
    assert error(logits(model), logits(wide)) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())


def gradients_of_experts(model: nn.Module, wide: nn.Module, layout: str) -> None:
    """dL/dA and dL/dB follow from the dense dL/dW by hand: scale B^T G and scale G A^T."""
    weights = torch.randn(2, 4, 13, dtype=torch.float64)
    (logits(wide) * weights).sum().backward()
    (logits(model) * weights).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        G = wide.get_parameter(site.spec.weight).grad
        assert G is not None
        G = G if layout == "out_in" else G.transpose(1, 2)
        A, B = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
        assert error(A.grad, SCALE * B.transpose(1, 2) @ G) < 1e-10
        assert error(B.grad, SCALE * G @ A.transpose(1, 2)) < 1e-10


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_in_the_family_s_own_way(family: str) -> None:
    """By default transformers multiplies all experts by one grouped kernel, in float32."""
    plain, layout = experts(family, "default")
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout))))
    wide = with_expert_deltas(plain, model, layout)
    assert error(logits(model), logits(wide)) < FLOAT32
    assert li.unreached(model, lambda: logits(model)) == []
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in li.adapter_parameters(model).values())


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", MOE)
def test_the_delta_of_experts_is_not_formed(
    family: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_inject.functional.weight import LowRank

    plain, layout = experts(family, how)
    model = fill(li.inject(plain, config(expert_rule(layout))))
    formed: list[Any] = []
    real = LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda *a: formed.append(a) or real(*a))
    logits(model).sum().backward()
    assert not formed
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())


def test_dropout_on_stacked_experts_is_refused() -> None:
    model, layout = experts("mixtral")
    bad = config(expert_rule(layout), dropout=0.1)
    refused(model, lambda: li.inject(model, bad), li.MatchError, "experts.*dropout")


@pytest.mark.parametrize("family", MOE)
def test_the_layout_of_stacked_experts_is_asked_for_where_their_class_does_not_state_it(
    family: str,
) -> None:
    model, layout = experts(family)
    bare = config(r"experts\.(gate_up_proj|down_proj)")
    if family == "llama4":
        refused(model, lambda: li.inject(model, bare), li.MatchError, "which side is the input")
    else:
        assert li.plan(model, bare).sites == li.plan(model, config(expert_rule(layout))).sites


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacked_experts_travel(family: str, tmp_path: Path) -> None:
    plain, layout = experts(family)
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout), "q_proj")))
    path, _ = saved(model, tmp_path, "native")
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(logits(again), logits(model))


# ------------------------------------------------------------------- no class to swap, or no values


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("target", [r"0\.weight", "0", ".+"])
def test_a_scripted_module_is_refused(target: str) -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(5, 4)), nn.Linear(4, 3))
    classes = [type(m) for m in model.modules()]
    with pytest.raises((li.LayerError, li.MatchError), match="ScriptModule") as raised:
        li.inject(model, config(target))
    assert "'0" in str(raised.value)
    assert [type(m) for m in model.modules()] == classes
    assert all("lora_" not in key for key in model.state_dict())


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv1d(3, 1)])
def test_a_lazy_module_is_refused_until_it_has_run(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), make())
    with pytest.raises(li.LayerError, match=r"'1'.*lazy and not initialized.*Run the model once"):
        li.inject(model, config(r"\d"))
    assert not any("lora_" in key for key in model._modules["0"]._parameters)
    x = torch.randn(2, 4, 1) if isinstance(model[1], nn.LazyConv1d) else torch.randn(2, 4)
    model[1](x)
    assert len(li.adapters(li.inject(model, config(r"\d")))["default"].sites) == 2


def test_a_model_without_values_is_planned_and_injected_but_not_merged(tmp_path: Path) -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(Block(), nn.Embedding(7, 4))
    targets = config("up", r"down\.weight", "1")
    planned = {s.name for s in li.plan(model, targets).sites}
    assert planned == {"0.up", "0.down.weight", "1"}
    li.inject(model, targets)
    assert {p.device.type for p in li.adapter_parameters(model).values()} == {"meta"}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(li.LayerError, match=r"meta device.*Load the base"):
        li.merge(model)
    for layout in ("native", "peft"):
        with pytest.raises(li.FormatError, match=r"meta device|native"):
            saved(model, tmp_path, layout)
    assert [*tmp_path.iterdir()] == []
    assert [type(m) for m in model.modules()] == classes
    li.eject(model)
    assert [type(m) for m in model[0].modules()] == [Block, nn.Linear, nn.Linear]


# ---------------------------------------------------------------------------------- proof of reach


class WeightUpdate(nn.Module):
    """Calls one layer, reads another, and never touches a third."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.drop(F.linear(self.called(x), self.read.weight))
        return found


@pytest.mark.parametrize("targets", [["idle"], ["called", "read", "idle"]], ids=str)
def test_a_probe_refuses_inert_sites_and_leaves_no_trace(targets: list[str]) -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    model.drop.eval()
    bad = config(*targets)
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"'idle'.*reached"):
        li.inject(model, bad, probe=lambda: model(x))
    assert snapshot(model) == before
    assert model.training
    assert not model.drop.training


def test_a_probe_lets_sites_that_take_part_through() -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    li.inject(model, config("called", "read"), probe=lambda: model(x))
    assert li.unreached(model, lambda: model(x)) == []
    assert model.training
    assert li.adapters(model)["default"].active


def test_a_probe_that_raises_leaves_no_trace() -> None:
    model = WeightUpdate()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        li.inject(model, config("called"), probe=lambda: 1 / 0)
    assert snapshot(model) == before


def test_a_second_adapter_is_probed_for_its_own_sites() -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    fill(li.inject(model, config("called")))
    wanted = model.eval()(x)
    run = lambda: li.inject(model, config("idle"), "b", probe=lambda: model(x))  # noqa: E731
    refused(model, run, li.LayerError, "'idle'")
    assert same_bits(model(x), wanted)
    li.inject(model, config("read"), "b", probe=lambda: model(x))
    assert li.adapters(model)["b"].active

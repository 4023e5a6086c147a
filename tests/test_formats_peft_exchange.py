"""Exchange with PEFT itself, both ways, on the shapes of real architectures.

PEFT is the reference: what it computes from a file is what the file means.
"""

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import assert_same_deltas, dense, make_site
from helpers.models import tiny_llama
from helpers.versions import needs_peft_reads_experts
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT warns of much that is none of this package's business.
pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=12, n_layer=2, n_head=2))


def llama() -> nn.Module:
    return tiny_llama(hidden_size=12, vocab_size=30)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=30, num_attention_heads=2, num_labels=3, **sizes)
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    return ViTModel(ViTConfig(num_attention_heads=2, image_size=8, patch_size=4, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(vocab_size=30, **sizes, **heads))


FAMILIES = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "wte"]}),
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    "bert": (bert, {"target_modules": ["query", "value", "word_embeddings"]}),
    "t5": (t5, {"target_modules": ["q", "v", "wo"]}),
    "vit": (vit, {"target_modules": ["q_proj", "v_proj", "projection", "query", "value"]}),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 7,
        "rank_pattern": {
            "q_proj": 4,
            "c_attn": 3,
            r"^encoder\.block\.0\.layer\.0\.SelfAttention\.q": 5,
            r"layers?\.\d+\..*(query|v_proj)": 3,
        },
        "alpha_pattern": {".*val[ue]+": 9, "v": 11, r"embed_tokens": 1},
    },
    "bias": {"r": 2, "bias": "lora_only"},
    "bias all": {"r": 2, "bias": "all"},
}


def with_random_adapter(model: nn.Module, **config: Any) -> Any:
    """PEFT's own adapter with A and B away from zero."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return wrapped


def peft_deltas(wrapped: Any) -> dict[str, Tensor]:
    """What PEFT adds to each weight, by the base's name of the module (or parameter)."""
    deltas = {}
    for path, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = path.replace(".base_layer", "")
            if type(module).__name__ == "ParamWrapper":
                name = f"{name}.{module.parameter_name}"
            deltas[name] = module.get_delta_weight("default").detach()
    return deltas


def spec_of(model: nn.Module, name: str, **numbers: Any) -> SiteSpec:
    """The geometry that the model has under a name, written down from the module alone."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        shape = tuple(model.get_parameter(name).shape)
        return SiteSpec(
            name, "parameter", shape[2], shape[1], shape, experts=shape[0], weight=name, **numbers
        )
    shape = tuple(module.weight.shape)
    weight = f"{name}.weight"
    if isinstance(module, nn.Embedding):
        return SiteSpec(name, "embedding", *shape, shape, transposed=True, weight=weight, **numbers)
    if type(module).__name__ == "Conv1D":
        return SiteSpec(name, "conv1d", *shape, shape, transposed=True, weight=weight, **numbers)
    if isinstance(module, nn.Conv2d):
        return SiteSpec(
            name, "conv", math.prod(shape[1:]), shape[0], shape, weight=weight, **numbers
        )
    return SiteSpec(name, "linear", shape[1], shape[0], shape, weight=weight, **numbers)


def deltas_here(state: AdapterState, model: nn.Module) -> dict[str, Tensor]:
    """What a state means for a model that it was put on, by the reference."""
    li.install(model, dataclasses.replace(state, base_copies={}))
    return {name: dense(site) for name, site in li.adapter_state(model).sites.items()}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_writes_is_read_right(family: str, option: str, tmp_path: Path) -> None:
    build, targets = FAMILIES[family]
    wrapped = with_random_adapter(build(), **targets, **OPTIONS[option])
    wrapped.save_pretrained(tmp_path)

    state = read_adapter(tmp_path)

    assert_same_deltas(deltas_here(state, build()), peft_deltas(wrapped))
    base = {key for key, _ in build().state_dict().items()}
    assert set(state.trained) <= base
    if option.startswith("bias"):
        due = {n for n in base if n.endswith(".bias")}
        adapted = {f"{n}.bias" for n in state.sites} & due
        assert set(state.trained) == (due if option == "bias all" else adapted)
    assert set(state.base_copies) <= {f"{n}.weight" for n in state.sites}


def test_peft_base_embeddings_are_recognized_as_copies(tmp_path: Path) -> None:
    model = llama()
    half, other = (copy.deepcopy(model).to(torch.bfloat16) for _ in range(2))
    wrapped = with_random_adapter(model, target_modules=["embed_tokens"], r=2)
    wrapped.save_pretrained(tmp_path)
    state = read_adapter(tmp_path)
    assert list(state.base_copies) == ["model.embed_tokens.weight"]
    assert not state.trained
    embedding = model.get_input_embeddings().base_layer.weight.detach()
    torch.testing.assert_close(
        state.base_copies["model.embed_tokens.weight"], embedding, rtol=0, atol=0
    )
    with torch.no_grad():
        other.model.embed_tokens.weight[3] *= 1.01
    with pytest.raises(FormatError, match="a copy of this base tensor that is not the model's"):
        li.load_adapter(other, tmp_path)
    li.load_adapter(half, tmp_path)  # the copy in float32 is rounded as the base was
    li.swap_adapter(half, tmp_path, "default")


@pytest.mark.parametrize("bias", ["none", "all"])
def test_peft_modules_to_save_are_read_under_the_base_names(bias: str, tmp_path: Path) -> None:
    wrapped = with_random_adapter(
        bert(), target_modules=["query"], modules_to_save=["classifier"], r=2, bias=bias
    )
    head = wrapped.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.fill_(3.0)
        head.bias.fill_(2.0)
    wrapped.save_pretrained(tmp_path)
    state = read_adapter(tmp_path)
    assert (state.trained["classifier.weight"] == 3.0).all()
    assert (state.trained["classifier.bias"] == 2.0).all()
    assert (len(state.trained) == 2) == (bias == "none")


@pytest.mark.parametrize("reverse", [False, True])
def test_peft_experts_are_read_right(reverse: bool, tmp_path: Path) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = with_random_adapter(
        mixtral(),
        target_parameters=names[::-1] if reverse else names,
        target_modules=["q_proj"],
        r=2,
    )
    wrapped.save_pretrained(tmp_path)
    state = read_adapter(tmp_path, tensor_names=list(mixtral().state_dict()))
    assert_same_deltas(deltas_here(state, mixtral()), peft_deltas(wrapped))


def test_adapter_of_a_subfolder(tmp_path: Path) -> None:
    wrapped = with_random_adapter(llama(), target_modules=["q_proj"], r=2)
    wrapped.add_adapter(
        "sql", peft.LoraConfig(target_modules=["v_proj"], r=2, init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    assert set(read_adapter(tmp_path / "sql").sites) == {
        f"model.layers.{n}.self_attn.v_proj" for n in range(2)
    }


# Our files, read by PEFT ------------------------------------------------------------------------


def loaded_by_peft(model: nn.Module, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(model, str(path))


def random_state(model: nn.Module, names: list[str], **numbers: Any) -> AdapterState:
    """Sites of different ranks and alphas, unless `numbers` says otherwise."""
    sites = {}
    for n, name in enumerate(names):
        given = {"rank": 1 + n % 3, "alpha": 1.0 + n % 4, **numbers}
        sites[name] = make_site(spec_of(model, name, **given), seed=n)
    return AdapterState(sites)


def written_for(model: nn.Module, state: AdapterState, folder: Path) -> Path:
    names = {"module_names": [name for name, _ in model.named_modules()]}
    return write_adapter(state, folder / "a", **names, tensor_names=list(model.state_dict()))


T5 = [f"{half}.block.{n}.layer.0.SelfAttention" for half in ("encoder", "decoder") for n in (0, 1)]
MIXTRAL = ("self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LLAMA = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
BERT = [f"bert.encoder.layer.{n}.attention.self" for n in range(2)]
OURS = {
    "gpt2": [f"transformer.h.{n}.attn.c_attn" for n in range(2)] + ["transformer.wte"],
    "llama": ["model.embed_tokens", *LLAMA, "lm_head"],
    "bert": [f"{attention}.{m}" for attention in BERT for m in ("query", "value")],
    "t5": [f"{attention}.{m}" for attention in T5 for m in "qv"],
    "vit": ["embeddings.patch_embeddings.projection"],
    "mixtral": [f"model.layers.{n}.{m}" for n in range(2) for m in MIXTRAL],
}
BUILD = {name: build for name, (build, _) in FAMILIES.items()} | {"mixtral": mixtral}


@pytest.mark.parametrize("scaling", ["standard", "rslora", "both"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=needs_peft_reads_experts if f == "mixtral" else ()) for f in OURS],
)
def test_peft_reads_what_is_written(family: str, scaling: str, tmp_path: Path) -> None:
    model = BUILD[family]()
    numbers = {} if scaling == "both" else {"scaling": scaling}
    state = random_state(model, OURS[family], **numbers)
    if scaling == "both":
        first = next(iter(state.sites))
        spec = spec_of(model, first, rank=2, alpha=3.0, scaling="rslora")
        state = AdapterState({**state.sites, first: make_site(spec)})
    wrapped = loaded_by_peft(model, written_for(model, state, tmp_path))
    due = {name: dense(site) for name, site in state.sites.items()}
    assert_same_deltas(peft_deltas(wrapped), due)


def test_peft_reads_slices_and_frozen_starts(tmp_path: Path) -> None:
    model, slices = gpt2(), Slices((("q", 12), ("k", 12), ("v", 12)), ("q", "v"))
    for number, scaling in enumerate(("standard", "rslora")):
        sites: dict[str, SiteState] = {}
        for n in range(2):
            name = f"transformer.h.{n}.attn.c_attn"
            spec = spec_of(model, name, rank=2, alpha=8.0, scaling=scaling, slices=slices)
            sites[name] = make_site(spec, seed=n, derived=n == 1)
        path = write_adapter(AdapterState(sites), tmp_path / str(number))
        wrapped = loaded_by_peft(gpt2(), path)
        assert_same_deltas(peft_deltas(wrapped), {n: dense(s) for n, s in sites.items()})


class Suffixes(nn.Module):
    """Names that are ends of each other, and names that are regular expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.blk = nn.ModuleDict(
            {"lin": nn.Linear(4, 4), "l+n": nn.Linear(4, 4), "lxin": nn.Linear(4, 4)}
        )
        self.xlin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lin, *self.blk.values(), self.xlin):
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize(
    "ranks",
    [
        {"lin": 2},
        {"lin": 2, "xlin": 2, "blk.lin": 2},
        {"lin": 2, "blk.lin": 3},
        {"blk.lin": 3, "lin": 2},
        {"lin": 3, "blk.lin": 2, "xlin": 2},
        {"blk.l+n": 3, "blk.lin": 2, "xlin": 2},
        {"lin": 1, "blk.lin": 2, "blk.l+n": 3, "blk.lxin": 4, "xlin": 1},
    ],
)
def test_names_hit_exactly_their_module(ranks: dict[str, int], tmp_path: Path) -> None:
    model = Suffixes()
    sites = {
        name: make_site(spec_of(model, name, rank=rank, alpha=float(rank * 2 + n)), seed=n)
        for n, (name, rank) in enumerate(ranks.items())
    }
    names = [n for n, _ in model.named_modules()]
    path = write_adapter(AdapterState(sites), tmp_path / "a", module_names=names)
    wrapped = loaded_by_peft(Suffixes(), path)
    assert_same_deltas(peft_deltas(wrapped), {n: dense(s) for n, s in sites.items()})


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None]).logits


def test_peft_loads_trained_tensors(tmp_path: Path) -> None:
    """A whole module, a part of one, the bias of an adapted module and the bias of another."""
    torch.manual_seed(0)
    model = bert()
    query = "bert.encoder.layer.0.attention.self.query"
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    names = ["classifier.weight", "classifier.bias", "bert.pooler.dense.bias"]
    names += [norm, f"{query}.bias"]
    trained = {name: torch.randn_like(model.get_parameter(name)) for name in names}
    state = AdapterState({query: make_site(spec_of(model, query, rank=2, alpha=4.0))}, trained)
    path = written_for(model, state, tmp_path)
    dense_model = bert()
    dense_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, tensor in trained.items():
            dense_model.get_parameter(name).copy_(tensor)
        dense_model.get_parameter(f"{query}.weight").add_(dense(state.sites[query]).float())
    due = logits(dense_model)

    wrapped = loaded_by_peft(model, path)
    torch.testing.assert_close(logits(wrapped), due, rtol=0, atol=1e-6)
    config = wrapped.peft_config["default"]
    assert config.modules_to_save == ["classifier"]
    assert config.bias == "all"


def test_peft_loads_an_adapter_without_sites(tmp_path: Path) -> None:
    model = bert()
    bias = "bert.pooler.dense.bias"
    state = AdapterState({}, {bias: torch.ones_like(model.get_parameter(bias))})
    wrapped = loaded_by_peft(model, write_adapter(state, tmp_path / "a"))
    assert (wrapped.base_model.model.get_parameter(bias) == 1).all()
    assert list(read_adapter(tmp_path / "a").trained) == [bias]


def test_a_parameter_of_multihead_attention_reaches_peft_or_is_refused(tmp_path: Path) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.attn = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    names = list(Owner().state_dict())
    inner = SiteSpec(
        "attn.in_proj_weight", "parameter", 4, 12, (12, 4), 2, 4.0, weight="attn.in_proj_weight"
    )
    outer = SiteSpec(
        "attn.out_proj.weight", "parameter", 4, 4, (4, 4), 2, 4.0, weight="attn.out_proj.weight"
    )
    state = AdapterState({inner.name: make_site(inner)})
    path = write_adapter(state, tmp_path / "a", tensor_names=names)
    model, x = Owner(), torch.randn(3, 1, 4)
    with torch.no_grad():
        model.attn.in_proj_weight += dense(state.sites[inner.name]).float()
        due = model(x)
        torch.testing.assert_close(loaded_by_peft(Owner(), path)(x), due, rtol=0, atol=1e-6)
    both = AdapterState({**state.sites, outer.name: make_site(outer)})
    with pytest.raises(FormatError, match="nothing would call it"):
        write_adapter(both, tmp_path / "b", tensor_names=names)
    native = write_adapter(both, tmp_path / "b.safetensors", format="native")
    assert list(read_adapter(native).sites) == list(both.sites)


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 5.0}])
def test_multihead_attention_with_two_ranks_or_scales_is_refused(change, tmp_path) -> None:
    rules = [{"match": r"attn\.in_proj_weight"}, {"match": "out_proj", **change}]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    li.inject(model, {"rank": 2, "targets": rules})
    with pytest.raises(FormatError, match=r"one rank and scale for the parts of 'attn'.*native"):
        li.save_adapter(model, tmp_path / "a")


def test_multihead_attention_of_a_later_peft_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    with_random_adapter(model, target_modules=["attn"], r=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.22.0"}))
    with pytest.raises(FormatError, match="twice"):
        read_adapter(tmp_path)


_RESIDUAL = r"init_lora_weights.*path_initial_model_for_weight_conversion.*allow="
REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, _RESIDUAL),
    "olora": ({"init_lora_weights": "olora"}, _RESIDUAL),
    "alora": ({"alora_invocation_tokens": [1]}, "aLoRA"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "replicated"),
}


def test_the_call_that_messages_advise_exists() -> None:
    assert callable(peft.convert_to_lora)


@pytest.mark.parametrize("case", REFUSED)
def test_variants_that_peft_writes_are_refused_by_name(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    options = {"init_lora_weights": True, **options}
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **options)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=words):
        read_adapter(tmp_path)

"""A LoraConfig of PEFT: the same sites, ranks, scales and trained tensors as PEFT makes of it."""

import copy
import dataclasses
import re

import peft
import pytest
import torch
from helpers.architectures import of
from helpers.refusals import refused
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

import lora_inject as li

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 20}
LAYERS = {"num_hidden_layers": 3, "num_key_value_heads": 1, "max_position_embeddings": 8}


def nested() -> nn.Module:
    """Numbers that are not those of layers, and names that end alike."""

    def layers(n: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(4, 4), "my_q": nn.Linear(4, 4)}) for _ in range(n)
        )

    towers = nn.ModuleList([nn.ModuleDict({"layers": layers(2)})])
    return nn.ModuleDict({"enc": nn.ModuleDict({"towers": towers, "layers": layers(3)})})


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    dense = {"num_experts": 2, "moe_intermediate_size": 6, "mlp_only_layers": [1]}
    dense |= {"shared_expert_intermediate_size": 6}
    made = {
        "llama": ("Llama", "ForCausalLM", {**SMALL, **LAYERS}),
        "gpt2": ("GPT2", "LMHeadModel", {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 20}),
        "bert": ("Bert", "ForSequenceClassification", {**SMALL, "num_hidden_layers": 2}),
        "distilbert": (
            "DistilBert", "ForSequenceClassification",
            {"vocab_size": 20, "dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2},
        ),
        "mixtral": ("Mixtral", "ForCausalLM", {**SMALL, **LAYERS, "num_local_experts": 2}),
        "qwen": ("Qwen2Moe", "ForCausalLM", {**SMALL, **LAYERS, **dense}),
    }  # fmt: skip
    built = {name: of(cls, head, {}, **sizes).make() for name, (cls, head, sizes) in made.items()}
    tied = copy.deepcopy(built["llama"])
    tied.lm_head.weight = tied.model.embed_tokens.weight
    return {**built, "nested": nested(), "towers": nested()["enc"], "tied": tied}


def of_peft(model: nn.Module, config: LoraConfig):
    """Name to (rank, alpha, scale) of each adapted layer, and the names of what else trains."""
    wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    sites = {}
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            name = path.replace(".base_layer", "")
            if isinstance(module, ParamWrapper):
                name += f".{module.parameter_name}"
            numbers = module.r, module.lora_alpha, module.scaling
            sites[name] = tuple(float(each["default"]) for each in numbers)
    trained = {
        re.sub(r"\.(modules_to_save\.default|base_layer)", "", name)
        for name, p in wrapped.base_model.model.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    return sites, trained


def of_ours(plan: li.classes.Plan):
    sites = {s.name: (float(s.rank), float(s.alpha), float(s.scale)) for s in plan.sites}
    return sites, {entry.name for entry in plan.trained}


def ranks(**by_name):
    return {"rank_pattern": by_name}


def layers(numbers, lists=None):
    return {"layers_to_transform": numbers, "layers_pattern": lists}


QV = ["q_proj", "v_proj"]
ALL = "all-linear"
DOWN = {"target_parameters": ["experts.down_proj"]}
NO_V = {"exclude_modules": ["0.self_attn.v_proj"], "modules_to_save": ["lm_head"]}
TWO_LAYERS = {
    "rank_pattern": {r"layers\.0\..*": 2, "v_proj": 4},
    "alpha_pattern": {"q_proj": 1, r"^model.layers.[01].*": 3},
}
FULL_NAMES = {
    "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "self_attn.q_proj": 3},
    "alpha_pattern": {"self_attn.q_proj": 5},
}
ENDS = ["lm_head", "c_fc", "transformer.h.2.mlp.c_fc", "h.1.attn.c_attn"]
SCORE = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
# Which model, what is targeted, and the further options.
CASES = {
    "a list": ("llama", QV, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "one ends in another": ("llama", ["q_proj", "self_attn.q_proj", "lm_head"], {}),
    "a regex": ("llama", r".*layers\.[02]\..*(q|up)_proj", {}),
    "all-linear, ranks": ("llama", ALL, {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}}),
    "exclude what is around, of which PEFT takes no notice": (
        "llama",
        QV,
        {"exclude_modules": ["0.self_attn"]},
    ),
    "layers that PEFT counts in another list": ("towers", ["q"], layers([1])),
    "exclude a regex": ("llama", ALL, {"exclude_modules": r".*layers\.1\..*|lm_head"}),
    "flags": ("llama", "(?x) .* (q|v)_proj  # qv", {"exclude_modules": r"(?i)(?s).*LAYERS\.1\..*"}),
    "layers of two lists": ("nested", ["q"], layers(0, ["layers", "towers"])),
    "ranks and alphas of other keys": ("llama", [*QV, "up_proj"], TWO_LAYERS),
    "full names": ("llama", QV, FULL_NAMES),
    "a head with a layer before it": ("distilbert", ["q_lin"], SCORE),
    "saved modules": ("llama", ALL, {"modules_to_save": ["lm_head", "1.mlp"]}),
    "a tie is kept": ("llama", QV, {"ensure_weight_tying": True}),
    "biases of adapted": ("gpt2", ["c_attn"], {"bias": "lora_only"}),
    "all biases": ("gpt2", ["c_attn"], {"bias": "all"}),
    "a classifier beside all-linear": ("bert", ALL, {"task_type": "SEQ_CLS"}),
    "parameters beside modules": ("mixtral", QV, DOWN | ranks(down_proj=2, q_proj=3)),
    "all-linear beside shared experts and dense layers": ("qwen", ALL, NO_V | ranks(q_proj=2)),
    "names of dense layers, too": ("qwen", ["q_proj", "gate_proj", "up_proj", "down_proj"], {}),
    "layers of modules, not of parameters": ("mixtral", ["q_proj"], DOWN | layers([1])),
    "whole names in every layer": ("gpt2", ENDS, layers([0], "h") | ranks(c_fc=3)),
    "parameters": ("mixtral", [], {"target_parameters": ["experts.down_proj", "gate.weight"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_sites_ranks_scales_and_trained_tensors_are_those_of_peft(models, case):
    which, targets, options = CASES[case]
    config = LoraConfig(target_modules=targets, **options)
    due = of_peft(models[which], config)
    assert due[0]
    assert of_ours(li.plan(models[which], config)) == due


def test_inject_takes_a_lora_config_and_the_folder_of_an_adapter(models, tmp_path):
    config = LoraConfig(target_modules=QV, r=2, init_lora_weights="gaussian", lora_dropout=0.1)
    model = copy.deepcopy(models["llama"])
    li.inject(model, config)
    site = li.adapter_state(model).sites["model.layers.0.self_attn.q_proj"].spec
    assert (site.init, site.dropout, site.rank, site.alpha) == ("gaussian", 0.1, 2, 8)
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_config.json"):
        assert li.from_peft(path) == li.from_peft(config)


def test_variants_and_token_rows_are_translated(models):
    model = models["llama"]
    dora = li.plan(model, LoraConfig(target_modules=QV, use_dora=True))
    assert {site.variant for site in dora.sites} == {"dora"}
    with refused(li.ConfigError, "'lora_bias'", "does not train", "bias='lora_only'"):
        li.plan(model, LoraConfig(target_modules=QV, lora_bias=True))
    for given in ([3, 5], {"embed_tokens": [3, 5]}):
        plan = li.plan(model, LoraConfig(target_modules=QV, trainable_token_indices=given))
        rows = {entry.name: entry.rows for entry in plan.trained}
        assert rows == {"model.embed_tokens.weight": (3, 5)}
    with refused(li.ConfigError, "'trainable_token_indices'", "embedding"):
        li.from_peft({"target_modules": QV, "trainable_token_indices": [3]})


def why_not(field: str) -> str:
    """What is found wrong with a field that holds what none takes; empty where nothing is."""
    try:
        li.from_peft({"target_modules": QV, field: ["no", "value"]})
    except li.ConfigError as error:
        return error.found
    return ""


def test_every_field_of_this_peft_is_known_and_what_messages_advise_exists():
    assert callable(peft.convert_to_lora)
    unknown = why_not("new_in_peft_9")
    assert unknown
    assert all(why_not(field.name) != unknown for field in dataclasses.fields(LoraConfig))


REFUSED = [
    ("peft_type", "IA3"),
    ("alora_invocation_tokens", [1]),
    ("layer_replication", [(0, 2)]),
    ("use_qalora", True),
    ("megatron_config", {"a": 1}),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"),
    ("new_in_peft_9", True),
    ("target_modules", None),
    ("bias", "some"),
    ("alpha_pattern", {"(": 3}),
    ("modules_to_save", "lm_head"),
    ("trainable_token_indices", {"a": 3}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_cannot_be_translated_is_named_with_its_field(field, value):
    with refused(li.ConfigError, f"'{field}'"):
        li.from_peft({"target_modules": QV} | {field: value})


NEAREST = ["'q_prj'", "'model.layers.0.self_attn.q_proj'"]
ONE_LAYER = r".*layers\.0\..*q_proj"
OTHERWISE = [
    ("llama", {"rank_pattern": {"k_proj": 3}}, ["'rank_pattern'", "'k_proj'"]),
    ("llama", {"layers_to_transform": [7]}, ["[7]"]),
    ("llama", {"exclude_modules": QV, "bias": "all"}, ["6"]),
    ("llama", {"init_lora_weights": False}, ["'init_lora_weights'"]),
    ("llama", {"target_modules": ["q_prj"]}, NEAREST),
    ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["bias"]}, ["bias'", "parameter"]),
    ("mixtral", {"target_modules": ONE_LAYER}, ["q_proj", "all-experts"]),
    ("mixtral", {"target_modules": ["q_proj", "down_proj"]}, ["experts.down_proj'", "parameters"]),
    ("mixtral", {"target_modules": ["q_proj", "w1"]}, ["'w1'", "target_parameters"]),
    ("tied", {"target_modules": ["lm_head"], "ensure_weight_tying": True}, ["'lm_head'"]),
]


@pytest.mark.parametrize(("which", "options", "named"), OTHERWISE)
@pytest.mark.filterwarnings("ignore")
def test_what_would_mean_something_else_is_refused(models, which, options, named):
    config = LoraConfig(**{"target_modules": QV, **options})
    with refused(li.LoraInjectError, *named, model=models[which]):
        li.plan(models[which], config)

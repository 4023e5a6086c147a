"""Two processes: adapters on models that were spread by a plan before, against one process.

Everything runs in float64, so a sum that is taken twice or not at all cannot hide in rounding.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import error
from helpers.forks import Forks
from helpers.models import tiny_llama
from helpers.refusals import said
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_inject as li

pytest.importorskip("transformers.distributed.expert_parallel")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
IDS = torch.arange(4 * 5).view(4, 5) % 17
SMALL: dict[str, Any] = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# `grouped_mm`, the default, has no float64.
EXPERTS: dict[str, Any] = {
    **SMALL,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(
        num_key_value_heads=WORLD, initializer_range=0.2, mlp_bias=True, attention_bias=True
    ),
    "phi": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "latent": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**EXPERTS, **LATENT)),
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8)),
}
CLASSES = {
    "llama": LlamaForCausalLM,
    "phi": Phi3ForCausalLM,
    "latent": DeepseekV3ForCausalLM,
    "experts": Qwen3MoeForCausalLM,
}


class Case(NamedTuple):
    """A model, how it is loaded, and what is adapted."""

    model: str
    how: Mapping[str, Any]
    config: Mapping[str, Any]
    tolerance: float = 1e-12


EVERY = {"rank": 2, "alpha": 3.0}
PACKED = {
    "model.embed_tokens": "embedding_colwise",
    "model.layers.*.mlp.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
EP = {"distributed_config": {"tp_size": WORLD, "ep_size": WORLD}}
AUTO = {"tp_plan": "auto"}
HEADS = ["lm_head", "embed_tokens"]
CASES = {
    "columns and rows": Case(
        "llama",
        AUTO,
        EVERY | {"targets": ["all-linear", *HEADS], "train": [r"model\.norm"]},
    ),
    "read": Case(
        "llama",
        AUTO,
        EVERY
        | {
            "targets": [r"q_proj\.weight", r"down_proj\.weight"],
            "train": ["lm_head", r"q_proj\.bias"],
        },
    ),
    "inits from the weight": Case(
        "llama", AUTO, EVERY | {"targets": [r"q_proj", "down_proj"], "init": "pissa"}
    ),
    "gathered, packed": Case(
        "phi",
        {"distributed_config": {"tp_size": WORLD, "tp_plan": PACKED}},
        EVERY | {"targets": ["all-linear", *HEADS]},
    ),
    "latent attention": Case(
        "latent",
        AUTO,
        EVERY | {"targets": ["all-linear", "all-experts", r"mlp\.gate\.weight"]},
        tolerance=1e-6,  # its router computes in float32
    ),
    "parts of experts": Case(
        "experts", AUTO, EVERY | {"targets": ["all-linear", "all-experts"], "train": ["q_norm"]}
    ),
    "parts of experts that share A": Case(
        "experts", AUTO, EVERY | {"targets": [{"match": "all-experts", "share": "A"}]}
    ),
    "experts apart": Case(
        "experts", EP, EVERY | {"targets": ["all-linear", "all-experts", r"mlp\.gate\.weight"]}
    ),
    "experts apart that share A": Case(
        "experts", EP, EVERY | {"targets": [{"match": "all-experts", "share": "A"}]}
    ),
}


def loaded(folder: Path, name: str, how: Mapping[str, Any] | None = None) -> Any:
    experts = {"experts_implementation": "eager"} if name in ("latent", "experts") else {}
    options = {**experts, **(how or {})}
    return CLASSES[name].from_pretrained(folder / name, dtype=torch.float64, **options)


def state_of(model: Any, name: str = "default") -> Any:
    return copy.deepcopy(li.adapter_state(model, name))


@torch.no_grad()
def filled(model: Any, name: str = "default") -> Any:
    """The model with noise in all of an adapter, the same in every process."""
    state = state_of(model, name)
    generator = torch.Generator().manual_seed(1)

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        return tensor + 0.3 * noise

    li.swap_adapter(model, state.mapped(noisy), name)
    return model


def steps(model: Any) -> None:
    optimizer = torch.optim.AdamW(li.adapter_parameters(model).values(), lr=0.02)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def forwards(model: Any) -> dict[str, Any]:
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def trained(folder: Path, case: Case) -> dict[str, Any]:
    """What one process sees of an adapter that is put onto a model that is spread already."""
    rank = dist.get_rank()
    model = loaded(folder, case.model, case.how)
    before = forwards(model)
    seen: dict[str, Any] = {"base": logits(model)}
    torch.manual_seed(rank)
    li.inject(model, case.config)
    seen["fresh"] = state_of(model)
    seen["lies"] = {
        key: repr(getattr(p, "placements", ["whole"])[0])
        for key, p in li.adapter_parameters(model).items()
    }
    seen["start"] = state_of(filled(model))
    seen["first"] = logits(model)
    steps(model)
    seen["end"] = state_of(model)
    seen["last"] = logits(model)
    seen["merged"] = {name: tensor.clone() for name, tensor in li.merged_weights(model)}
    with li.disabled(model):
        seen["off"] = logits(model)
    seen["saved"] = li.save_adapter(model, folder / f"saved {case.model} {len(str(case))}")
    li.eject(model)
    assert forwards(model) == before
    seen["ejected"] = logits(model)
    li.load_adapter(model, seen["saved"])
    seen["again"] = logits(model)
    return seen


REFUSED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    "gain": ("llama", AUTO, {"targets": ["q_proj"], "variant": "dora"}, "norms of a weight"),
    "rows": ("llama", AUTO, {"targets": ["q_proj"], "tokens": {"embed_tokens": [1]}}, "its rows"),
    "bias of rows": (
        "llama",
        AUTO,
        {"targets": ["q_proj"], "train": [r"down_proj\.bias"]},
        "rowwise adds the bias outside of the layer",
    ),
    "slices": (
        "phi",
        AUTO,
        {"targets": [{"match": "qkv_proj", "slices": {"q": 16, "k": 16, "v": 16}, "adapt": ["q"]}]},
        "its slices are parts of an output",
    ),
    "only": (
        "experts",
        EP,
        {"targets": [{"match": r"experts\.\w+", "only": [0]}]},
        "only some experts are to be adapted",
    ),
    "dropout": (
        "latent",
        AUTO,
        {"targets": ["kv_a_proj_with_mqa"], "dropout": 0.5},
        "each process has this weight whole",
    ),
    "partial outputs": (
        "llama",
        {
            "distributed_config": {
                "tp_size": WORLD,
                "tp_plan": {"model.layers.*.input_layernorm": "all_reduce"},
            }
        },
        {"targets": ["q_proj"], "train": ["input_layernorm"]},
        "its style in transformers' plan is AllReduceParallel",
    ),
}


def refused(folder: Path) -> dict[str, str]:
    sayings = {}
    for name, (model, how, config, _) in REFUSED.items():
        spread = loaded(folder, model, how)
        before = forwards(spread), {n: type(m) for n, m in spread.named_modules()}
        sayings[name] = said(lambda spread=spread, config=config: li.inject(spread, EVERY | config))
        assert (forwards(spread), {n: type(m) for n, m in spread.named_modules()}) == before
        assert not li.adapters(spread)
    return sayings


def by_hand() -> dict[str, Any]:
    """torch's parallelize_module, then inject."""
    from torch.distributed.tensor import parallel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    plain = copy.deepcopy(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, mesh, plan)
    torch.manual_seed(dist.get_rank())
    li.inject(model, EVERY | {"targets": ["0", "2"]})
    li.install(plain, state_of(filled(model)))
    li.train_only(plain, "default")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    for each in (model, plain):
        optimizer = torch.optim.AdamW(li.adapter_parameters(each).values(), lr=0.1)
        for _ in range(3):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"spread": state_of(model), "alone": state_of(plain)}


def further(folder: Path) -> dict[str, float]:
    """How far a mix of two, rows of their own, a compiled model and clipping are from one process.

    Each is compared in every process with an unsharded copy.
    """
    spread, plain = (loaded(folder, "llama", how) for how in (AUTO, None))
    rules = EVERY | {"targets": ["q_proj", "down_proj"]}
    for name in ("one", "two"):
        filled(li.inject(spread, rules, name), name)
        li.install(plain, state_of(spread, name), name)
    errors = {}
    for mix in ({"one": 1.0, "two": 0.5}, "two", None):
        for model in (spread, plain):
            li.activate(model, mix)
        errors[f"activate {mix}"] = error(logits(spread), logits(plain))
    rows = ["one", None, "two", None]
    with li.routed(spread, rows), li.routed(plain, rows):
        errors["routed"] = error(logits(spread), logits(plain))
    for model in (spread, plain):
        li.eject(model, "two")
        li.train_only(model, "one")
        li.activate(model, "one")
    errors["ejected"] = error(logits(spread), logits(plain))
    compiled = torch.compile(spread, backend="eager")
    errors["compiled"] = error(logits(compiled), logits(plain))
    norms = []
    for model in (compiled, plain):
        model(IDS, labels=IDS).loss.backward()
        parameters = li.adapter_parameters(model).values()
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    errors["clipped"] = error(*norms)
    return errors


class Experts(nn.Module):
    """As torchtitan's: its stack is a DTensor, of which a forward takes the part that is here."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 6, 5))
        self.first = 0

    def forward(self, x: Tensor) -> Tensor:
        w1: Any = self.w1
        here = w1.to_local() if hasattr(w1, "to_local") else w1
        rows = x.view(4, -1, 5)[self.first : self.first + len(here)]
        return torch.bmm(rows, here.mT).tanh()


def of_dtensors(share: str) -> dict[str, Any]:
    """What torchtitan's ExpertParallel makes of a stack, then inject."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    model = nn.Sequential(Experts()).double()
    plain = copy.deepcopy(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",))
    model[0].w1 = nn.Parameter(distribute_tensor(model[0].w1.detach(), mesh, [Shard(0)]))
    model[0].first = 2 * dist.get_rank()
    rule = {"match": "w1", "layout": "out_in", "share": share}
    li.inject(model, EVERY | {"targets": [{k: v for k, v in rule.items() if v}]})
    li.install(plain, state_of(filled(model)))
    li.train_only(plain, "default")
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    for each in (model, plain):
        optimizer = torch.optim.SGD(li.adapter_parameters(each).values(), lr=0.1)
        for _ in range(3):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"spread": state_of(model), "alone": state_of(plain)}


def work(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    dist.init_process_group("gloo")
    try:
        seen: dict[str, Any] = {name: trained(folder, case) for name, case in CASES.items()}
        for share in ("", "A", "B"):
            seen[f"of DTensors {share}"] = of_dtensors(share)
        seen |= {"refused": refused(folder), "by hand": by_hand()}
        return seen | {"further": further(folder)}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plans")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().double()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    """What each of two processes saw of all cases; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


def far(found: Any, wanted: Any) -> float:
    """The largest error of any tensor of two adapters."""
    assert found.sites.keys() == wanted.sites.keys()
    assert found.trained.keys() == wanted.trained.keys()
    pairs = [(found.trained[key], tensor) for key, tensor in wanted.trained.items()]
    for key, site in wanted.sites.items():
        pairs += [(found.sites[key].tensors[role], t) for role, t in site.tensors.items()]
    assert all(one.shape == two.shape for one, two in pairs)
    return max(float((one - two).abs().max() / (two.abs().max() or 1.0)) for one, two in pairs)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_on_a_spread_model_is_that_of_one_process(
    case: str, ranks: Any, folder: Path
) -> None:
    name, _, config, tolerance = CASES[case]
    one, two = (rank[case] for rank in ranks)
    assert one["fresh"] == two["fresh"]
    assert one["end"] == two["end"]
    model = loaded(folder, name)
    base = logits(model)
    torch.manual_seed(0)
    fresh = li.adapter_state(li.inject(copy.deepcopy(model), config))
    assert far(one["fresh"], fresh) < tolerance
    li.install(model, one["start"])
    li.train_only(model, "default")
    first = logits(model)
    steps(model)
    wanted, last = li.adapter_state(model), logits(model)
    assert far(one["start"], wanted) > 1e-3, "it trained"
    merged = dict(li.merged_weights(model))
    for seen in (one, two):
        assert far(seen["end"], wanted) < tolerance
        assert error(seen["first"], first) < tolerance
        for key in ("last", "again"):
            assert error(seen[key], last) < tolerance
        for key in ("base", "off", "ejected"):
            assert error(seen[key], base) < tolerance
        assert seen["merged"].keys() == merged.keys()
        assert max(error(seen["merged"][key], t) for key, t in merged.items()) < tolerance
    saved = li.load_adapter(li.eject(model), one["saved"])
    assert error(logits(saved), last) < tolerance


def test_a_and_b_lie_as_their_weights_do(ranks: Any) -> None:
    def lies(case: str, key: str) -> str:
        lies: str = ranks[0][case]["lies"][f"model.layers.0.{key}"]
        return lies

    def pair(case: str, site: str) -> tuple[str, str]:
        return lies(case, f"{site}.lora_A"), lies(case, f"{site}.lora_B")

    columns, rows = ("Replicate()", "Shard(dim=0)"), ("Shard(dim=1)", "Replicate()")
    assert pair("columns and rows", "self_attn.q_proj") == columns
    assert pair("columns and rows", "mlp.down_proj") == rows
    assert pair("gathered, packed", "self_attn.qkv_proj") == columns
    assert pair("gathered, packed", "self_attn.o_proj") == rows
    packed = ("Replicate()", "_StridedShard(dim=0, sf=2)")
    assert pair("gathered, packed", "mlp.gate_up_proj") == packed
    packed = ("Replicate()", "_StridedShard(dim=1, sf=2)")
    assert pair("parts of experts", "mlp.experts.gate_up_proj") == packed
    rows = ("Shard(dim=2)", "Replicate()")
    assert pair("parts of experts", "mlp.experts.down_proj") == rows
    apart = ("Shard(dim=0)", "Shard(dim=0)")
    assert pair("experts apart", "mlp.experts.down_proj") == apart
    shared = ("Replicate()", "Shard(dim=0)")
    assert pair("experts apart that share A", "mlp.experts.down_proj") == shared
    assert pair("experts apart", "mlp.gate.weight") == ("'whole'", "'whole'")


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_cannot_have_is_refused_by_every_process(name: str, ranks: Any) -> None:
    one, two = (rank["refused"][name] for rank in ranks)
    assert one == two
    assert one.startswith("LayerError: adapter 'default', ")
    assert REFUSED[name][3] in one


@pytest.mark.parametrize("how", ["by hand", "of DTensors ", "of DTensors A", "of DTensors B"])
def test_what_was_parallelized_by_hand_takes_an_adapter(how: str, ranks: Any) -> None:
    for seen in (rank[how] for rank in ranks):
        assert far(seen["spread"], seen["alone"]) < 1e-12


def test_mixes_rows_graphs_and_norms_of_parts_are_those_of_one_process(ranks: Any) -> None:
    for rank in ranks:
        assert len(rank["further"]) == 7
        assert max(rank["further"].values()) < 1e-12, rank["further"]

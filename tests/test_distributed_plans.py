"""Two processes: adapters on models that were spread by a plan before, against one process.

Everything runs in float64, so a sum that is taken twice or not at all cannot hide in rounding.
"""

import copy
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import error
from helpers.forks import Forks
from helpers.ranks import filled, in_a_group, mesh, near, values
from helpers.refusals import said
from torch import Tensor, nn

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
LATENT = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
LATENT |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
# The name of its classes, what its config says besides, and options of loading it.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True}, {}),
    "phi": ("Phi3", {}, {}),
    # `grouped_mm`, the default, has no float64.
    "latent": (
        "DeepseekV3",
        EXPERTS | LATENT | {"v_head_dim": 8},
        {"experts_implementation": "eager"},
    ),
    "experts": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 4, "head_dim": 8},
        {"experts_implementation": "eager"},
    ),
}


class Case(NamedTuple):
    """A model, how it is loaded, and what is adapted."""

    model: str
    how: Mapping[str, Any]
    config: Mapping[str, Any]
    tolerance: float = 1e-12


def spread_by(**how: Any) -> dict[str, Any]:
    return {"distributed_config": {"tp_size": WORLD, **how}}


def adapter(*targets: Any, **options: Any) -> dict[str, Any]:
    return {"rank": 2, "alpha": 3.0, "targets": list(targets), **options}


AUTO = {"tp_plan": "auto"}
PACKED = {
    "model.embed_tokens": "embedding_colwise",
    "model.layers.*.mlp.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
EP = spread_by(ep_size=WORLD)
ROUTER = r"mlp\.gate\.weight"
ALL = adapter("all-linear", "all-experts", ROUTER)
SHARED = adapter({"match": "all-experts", "share": "A"})
WITH_HEADS = adapter("all-linear", "lm_head", "embed_tokens")
READ = adapter(r"q_proj\.weight", r"down_proj\.weight", train=["lm_head", r"q_proj\.bias"])
WITH_NORMS = adapter("all-linear", "all-experts", train=["q_norm"])
CASES = {
    "columns and rows": Case("llama", AUTO, WITH_HEADS | {"train": [r"model\.norm"]}),
    "read": Case("llama", AUTO, READ),
    "inits from the weight": Case("llama", AUTO, adapter("q_proj", "down_proj", init="pissa")),
    "gathered, packed": Case("phi", spread_by(tp_plan=PACKED), WITH_HEADS),
    "latent attention": Case("latent", AUTO, ALL, 1e-6),  # its router computes in float32
    "parts of experts": Case("experts", AUTO, WITH_NORMS),
    "parts of experts that share A": Case("experts", AUTO, SHARED),
    "experts apart": Case("experts", EP, ALL),
    "experts apart that share A": Case("experts", EP, SHARED),
}
THIRDS = {"match": "qkv_proj", "slices": {"q": 16, "k": 16, "v": 16}, "adapt": ["q"]}
SUMMED = spread_by(tp_plan={"model.layers.*.input_layernorm": "all_reduce"})
REFUSED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "norms of a weight": ("llama", AUTO, adapter("q_proj", variant="dora")),
    "its rows": ("llama", AUTO, adapter("q_proj", tokens={"embed_tokens": [1]})),
    "rowwise adds the bias outside of the layer": (
        "llama",
        AUTO,
        adapter("q_proj", train=[r"down_proj\.bias"]),
    ),
    "its slices are parts of an output": ("phi", AUTO, adapter(THIRDS)),
    "only some experts are to be adapted": (
        "experts",
        EP,
        adapter({"match": r"experts\.\w+", "only": [0]}),
    ),
    "each process has this weight whole": (
        "latent",
        AUTO,
        adapter("kv_a_proj_with_mqa", dropout=0.5),
    ),
    "its style in transformers' plan is AllReduceParallel": (
        "llama",
        SUMMED,
        adapter("q_proj", train=["input_layernorm"]),
    ),
}


def loaded(folder: Path, name: str, how: Mapping[str, Any] | None = None) -> Any:
    cls, _, options = MODELS[name]
    built = getattr(transformers, f"{cls}ForCausalLM")
    return built.from_pretrained(folder / name, dtype=torch.float64, **options, **(how or {}))


def state_of(model: Any, name: str = "default") -> li.AdapterState:
    return copy.deepcopy(li.adapter_state(model, name))


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
    return {n: (type(m), m.__dict__.get("forward")) for n, m in model.named_modules()}


# ------------------------------------------------------------------------ what each process does


def trained(folder: Path, case: Case) -> dict[str, Any]:
    """What one process sees of an adapter that is put onto a model that is spread already."""
    model = loaded(folder, case.model, case.how)
    before = forwards(model)
    seen: dict[str, Any] = {"base": logits(model)}
    torch.manual_seed(dist.get_rank())
    li.inject(model, case.config)
    seen["fresh"] = state_of(model)
    seen["lies"] = {
        key: repr(getattr(p, "placements", ["whole"])[0])
        for key, p in li.adapter_parameters(model).items()
    }
    seen["start"] = state_of(filled(model))
    seen["first"] = logits(model)
    steps(model)
    seen["end"], seen["last"] = state_of(model), logits(model)
    seen["merged"] = {name: tensor.clone() for name, tensor in li.merged_weights(model)}
    with li.disabled(model):
        seen["off"] = logits(model)
    seen["saved"] = li.save_adapter(model, folder / f"saved {case.model} {len(str(case))}")
    li.eject(model)
    assert forwards(model) == before
    seen["ejected"] = logits(model)
    li.load_adapter(model, seen["saved"])
    return seen | {"again": logits(model)}


def refused(folder: Path, words: str) -> str:
    name, how, config = REFUSED[words]
    model = loaded(folder, name, how)
    before = forwards(model)
    saying = said(lambda: li.inject(model, config))
    assert forwards(model) == before
    assert not li.adapters(model)
    return saying


def trained_alike(model: Any, plain: Any, x: Tensor, *targets: Any) -> dict[str, Any]:
    """An adapter on what was spread by hand, and its values on the model in one process."""
    torch.manual_seed(dist.get_rank())
    li.inject(model, adapter(*targets))
    li.train_only(li.install(plain, state_of(filled(model))), "default")
    for each in (model, plain):
        optimizer = torch.optim.SGD(li.adapter_parameters(each).values(), lr=0.1)
        for _ in range(3):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"spread": values(model), "alone": values(plain)}


def by_hand() -> dict[str, Any]:
    """torch's parallelize_module, then inject."""
    from torch.distributed.tensor import parallel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    plain = copy.deepcopy(model)
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, mesh(WORLD), plan)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    return trained_alike(model, plain, x, "0", "2")


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


def of_dtensors(**share: str) -> dict[str, Any]:
    """What torchtitan's ExpertParallel makes of a stack, then inject."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    model: Any = nn.Sequential(Experts()).double()
    plain = copy.deepcopy(model)
    shards = distribute_tensor(model[0].w1.detach(), mesh(WORLD), [Shard(0)])
    model[0].w1, model[0].first = nn.Parameter(shards), 2 * dist.get_rank()
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    return trained_alike(model, plain, x, {"match": "w1", "layout": "out_in", **share})


BY_HAND = {
    "parallelize_module": by_hand,
    "a stack of DTensors": of_dtensors,
    "a stack that shares A": partial(of_dtensors, share="A"),
    "a stack that shares B": partial(of_dtensors, share="B"),
}


def further(folder: Path) -> dict[str, float]:
    """How far a mix of two, rows of their own, a compiled model and clipping are from one process.

    Each is compared in every process with an unsharded copy.
    """
    spread, plain = (loaded(folder, "llama", how) for how in (AUTO, None))
    for name in ("one", "two"):
        filled(li.inject(spread, adapter("q_proj", "down_proj"), name), name)
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
        norm: Any = nn.utils.clip_grad_norm_(li.adapter_parameters(model).values(), 1.0)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return errors | {"clipped": error(*norms)}


def work(folder: Path) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return in_a_group(
        lambda: {
            **{name: trained(folder, case) for name, case in CASES.items()},
            **{words: refused(folder, words) for words in REFUSED},
            **{name: run() for name, run in BY_HAND.items()},
            "further": further(folder),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plans")
    for name, (cls, options, _) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{cls}Config")(**SMALL | options)
        model = getattr(transformers, f"{cls}ForCausalLM")(config).double()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    """What each of two processes saw of all cases; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


# ------------------------------------------------------------------------------------- the tests


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
    near(values(one["fresh"]), values(li.inject(copy.deepcopy(model), config)), tolerance)
    li.install(model, one["start"])
    li.train_only(model, "default")
    first = logits(model)
    steps(model)
    wanted, last, merged = values(model), logits(model), dict(li.merged_weights(model))
    assert any(error(t, wanted[key]) > 1e-3 for key, t in values(one["start"]).items()), "trained"
    for seen in (one, two):
        near(values(seen["end"]), wanted, tolerance)
        near(seen["merged"], merged, tolerance)
        assert error(seen["first"], first) < tolerance
        for key in ("last", "again"):
            assert error(seen[key], last) < tolerance
        for key in ("base", "off", "ejected"):
            assert error(seen[key], base) < tolerance
    saved = li.load_adapter(li.eject(model), one["saved"])
    assert error(logits(saved), last) < tolerance


COLUMNS = ("Replicate()", "Shard(dim=0)")
LIES = [
    ("columns and rows", "self_attn.q_proj", COLUMNS),
    ("columns and rows", "mlp.down_proj", ("Shard(dim=1)", "Replicate()")),
    ("gathered, packed", "self_attn.qkv_proj", COLUMNS),
    ("gathered, packed", "mlp.gate_up_proj", ("Replicate()", "_StridedShard(dim=0, sf=2)")),
    ("parts of experts", "mlp.experts.gate_up_proj", ("Replicate()", "_StridedShard(dim=1, sf=2)")),
    ("parts of experts", "mlp.experts.down_proj", ("Shard(dim=2)", "Replicate()")),
    ("experts apart", "mlp.experts.down_proj", ("Shard(dim=0)", "Shard(dim=0)")),
    ("experts apart that share A", "mlp.experts.down_proj", COLUMNS),
    ("experts apart", "mlp.gate.weight", ("'whole'", "'whole'")),
]


@pytest.mark.parametrize(("case", "site", "placements"), LIES)
def test_a_and_b_lie_as_their_weights_do(case: str, site: str, placements: Any, ranks: Any) -> None:
    lies = ranks[0][case]["lies"]
    lie = tuple(lies[f"model.layers.0.{site}.lora_{role}"] for role in "AB")
    assert lie == placements


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_plan_cannot_have_is_refused_by_every_process(words: str, ranks: Any) -> None:
    one, two = (rank[words] for rank in ranks)
    assert one == two
    assert one.startswith("LayerError: adapter 'default', ")
    assert words in one


@pytest.mark.parametrize("how", BY_HAND)
def test_what_was_parallelized_by_hand_takes_an_adapter(how: str, ranks: Any) -> None:
    for seen in (rank[how] for rank in ranks):
        near(seen["spread"], seen["alone"], 1e-12)


def test_mixes_rows_graphs_and_norms_of_parts_are_those_of_one_process(ranks: Any) -> None:
    for rank in ranks:
        assert max(rank["further"].values()) < 1e-12, rank["further"]

"""Two processes: adapters on models that were spread by a plan before, against one, in float64."""

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
from helpers.ranks import failures, filled, from_first, mesh, near, same, values, whole
from helpers.refusals import said
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.adapter.other_tensors import mapped

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
# The name of its classes, and what its config says besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True}),
    "phi": ("Phi3", {}),
    "latent": ("DeepseekV3", EXPERTS | LATENT | {"v_head_dim": 8}),
    "experts": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "head_dim": 8}),
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
    "rowwise adds the bias": ("llama", AUTO, adapter("q_proj", train=[r"down_proj\.bias"])),
    "its slices are parts": ("phi", AUTO, adapter(THIRDS)),
    "only some experts": ("experts", EP, adapter({"match": r"experts\.\w+", "only": [0]})),
    "each process has": ("latent", AUTO, adapter("kv_a_proj_with_mqa", dropout=0.5)),
    "is AllReduceParallel": ("llama", SUMMED, adapter("q_proj", train=["input_layernorm"])),
}


def loaded(folder: Path, name: str, how: Mapping[str, Any] | None = None) -> Any:
    options: dict[str, Any] = {"dtype": torch.float64, **(how or {})}
    if name in ("latent", "experts"):
        options["experts_implementation"] = "eager"  # the default, `grouped_mm`, has no float64
    built = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")
    return built.from_pretrained(folder / name, **options)


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


def trains_like_one_process(folder: Path, case: Case) -> None:
    name, how, config, tolerance = case
    model, plain = loaded(folder, name, how), loaded(folder, name)
    before, base = forwards(model), logits(plain)
    assert error(logits(model), base) < tolerance
    torch.manual_seed(dist.get_rank())
    li.inject(model, config)
    same(values(model), from_first(values(model)))
    torch.manual_seed(0)
    near(values(model), values(li.inject(copy.deepcopy(plain), config)), tolerance)
    start = mapped(li.adapter_state(filled(model)), torch.clone)
    li.train_only(li.install(plain, start), "default")
    assert error(logits(model), logits(plain)) < tolerance
    for each in (model, plain):
        steps(each)
    assert any(error(t, values(plain)[key]) > 1e-3 for key, t in values(start).items()), "trained"
    last = logits(plain)
    same(values(model), from_first(values(model)))
    near(values(model), values(plain), tolerance)
    near(dict(li.merged_weights(model)), dict(li.merged_weights(plain)), tolerance)
    assert error(logits(model), last) < tolerance
    with li.disabled(model):
        assert error(logits(model), base) < tolerance
    path = li.save_adapter(model, folder / f"saved {name} {len(str(case))}")
    li.eject(model)
    assert forwards(model) == before
    assert error(logits(model), base) < tolerance
    for each in (model, li.eject(plain)):
        assert error(logits(li.load_adapter(each, path)), last) < tolerance


def is_refused(folder: Path, words: str) -> None:
    name, how, config = REFUSED[words]
    model = loaded(folder, name, how)
    before, refused = forwards(model), said(lambda: li.inject(model, config))
    assert refused.startswith("LayerError: adapter 'default', ")
    assert words in refused
    assert refused == from_first(refused)
    assert forwards(model) == before
    assert not li.adapters(model)


def check_trains_alike(model: Any, plain: Any, x: Tensor, *targets: Any) -> None:
    """An adapter on what was spread by hand, and its values on the model in one process."""
    torch.manual_seed(dist.get_rank())
    li.inject(model, adapter(*targets))
    start = mapped(li.adapter_state(filled(model)), torch.clone)
    li.train_only(li.install(plain, start), "default")
    for each in (model, plain):
        optimizer = torch.optim.SGD(li.adapter_parameters(each).values(), lr=0.1)
        for _ in range(3):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    near(values(model), values(plain), 1e-12)


def by_hand(folder: Path) -> None:
    """torch's parallelize_module, then inject."""
    from torch.distributed.tensor import parallel

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    model = parallel.parallelize_module(copy.deepcopy(plain), mesh(WORLD), plan)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    check_trains_alike(model, plain, x, "0", "2")


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


def of_dtensors(folder: Path, **share: str) -> None:
    """What torchtitan's ExpertParallel makes of a stack, then inject."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    model: Any = nn.Sequential(Experts()).double()
    plain = copy.deepcopy(model)
    shards = distribute_tensor(model[0].w1.detach(), mesh(WORLD), [Shard(0)])
    model[0].w1, model[0].first = nn.Parameter(shards), 2 * dist.get_rank()
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    check_trains_alike(model, plain, x, {"match": "w1", "layout": "out_in", **share})


def mixes_rows_graphs_and_norms(folder: Path) -> None:
    """Each compared with an unsharded copy."""
    spread, plain = (loaded(folder, "llama", how) for how in (AUTO, None))
    for name in ("one", "two"):
        filled(li.inject(spread, adapter("q_proj", "down_proj"), name), name)
        li.install(plain, mapped(li.adapter_state(spread, name), torch.clone), name)
    for mix in ({"one": 1.0, "two": 0.5}, "two", None):
        for model in (spread, plain):
            li.activate(model, mix)
        assert error(logits(spread), logits(plain)) < 1e-12, mix
    rows = ["one", None, "two", None]
    with li.routed(spread, rows), li.routed(plain, rows):
        assert error(logits(spread), logits(plain)) < 1e-12
    for model in (spread, plain):
        li.activate(li.eject(model, "two"), "one")
        li.train_only(model, "one")
    compiled = torch.compile(spread, backend="eager")
    assert error(logits(compiled), logits(plain)) < 1e-12
    norms = []
    for model in (compiled, plain):
        model(IDS, labels=IDS).loss.backward()
        parameters = li.adapter_parameters(model).values()
        norms.append(whole(nn.utils.clip_grad_norm_(parameters, 1.0)))
    assert error(*norms) < 1e-12


JOBS: dict[str, Any] = {name: partial(trains_like_one_process, case=c) for name, c in CASES.items()}
JOBS |= {f"refused: {words}": partial(is_refused, words=words) for words in REFUSED}
JOBS |= {
    "parallelize_module, then inject": by_hand,
    "a stack of DTensors": of_dtensors,
    "a stack of DTensors that shares A": partial(of_dtensors, share="A"),
    "mixes, rows, graphs and norms": mixes_rows_graphs_and_norms,
}


def work(folder: Path) -> dict[str, str]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return failures(JOBS, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plans")
    for name, (cls, options) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{cls}Config")(**SMALL | options)
        model = getattr(transformers, f"{cls}ForCausalLM")(config).double()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, str]]:
    """What failed in each of two processes; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_come_to_what_one_does(job: str, ranks: Any) -> None:
    failed = "\n".join(rank[job] for rank in ranks)
    assert not failed.strip(), failed

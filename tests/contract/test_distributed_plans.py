"""Models that a plan spread before, over two processes or four: adapters against one process."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import error
from helpers.forks import Forks
from helpers.ranks import failures, filled, from_first, mesh, near, same, steps, values, whole
from helpers.refusals import said
from torch import Tensor, nn

import lora_inject as li

pytest.importorskip("transformers.distributed.expert_parallel")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

IDS = torch.arange(4 * 5).view(4, 5) % 17
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
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
    "experts": ("Qwen3Moe", EXPERTS | {"num_experts": 8, "head_dim": 4}),
}


class Case(NamedTuple):
    """A model, how it is loaded, and what is adapted."""

    model: str
    how: Mapping[str, Any]
    config: Mapping[str, Any]
    tolerance: float = 1e-12
    experts: str = "eager"
    """How experts multiply: the default, `grouped_mm`, has no float64."""

    def loaded(self, folder: Path, *, spread: bool = True) -> Any:
        options = dict(self.how) if spread else {}
        if self.model in ("latent", "experts"):
            options["experts_implementation"] = self.experts
        cls = getattr(transformers, f"{MODELS[self.model][0]}ForCausalLM")
        dtype = torch.float64 if self.experts == "eager" else torch.float32
        return cls.from_pretrained(folder / self.model, dtype=dtype, **options)

    def of(self, axis: str) -> int:
        return self.how.get("distributed_config", {}).get(axis, 1)


def spread_by(**how: Any) -> dict[str, Any]:
    return {"distributed_config": how}


def adapter(*targets: Any, **options: Any) -> dict[str, Any]:
    return {"rank": 2, "alpha": 3.0, "targets": list(targets), **options}


AUTO = {"tp_plan": "auto"}
PACKED = {
    "model.embed_tokens": "embedding_colwise",
    "model.layers.*.mlp.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
EP = spread_by(tp_size=2, ep_size=2)
COPIES = spread_by(tp_size=1, fsdp_size=4, ep_size=2)
BOTH_AXES = spread_by(tp_size=2, fsdp_size=2, ep_size=2)
ALL = adapter("all-linear", "all-experts", r"mlp\.gate\.weight")
PLAIN = adapter("all-linear", "all-experts")
SHARED = adapter({"match": "all-experts", "share": "A"})
WITH_HEADS = adapter("all-linear", "lm_head", "embed_tokens")
READ = adapter(r"q_proj\.weight", r"down_proj\.weight", train=["lm_head", r"q_proj\.bias"])
WITH_NORMS = adapter("all-linear", "all-experts", train=["q_norm"])
OF_TWO = {
    "columns and rows": Case("llama", AUTO, WITH_HEADS | {"train": [r"model\.norm"]}),
    "read": Case("llama", AUTO, READ),
    "inits from the weight": Case("llama", AUTO, adapter("q_proj", "down_proj", init="pissa")),
    "gathered, packed": Case("phi", spread_by(tp_size=2, tp_plan=PACKED), WITH_HEADS),
    "latent attention": Case("latent", AUTO, ALL, 1e-6),  # its router computes in float32
    "parts of experts": Case("experts", AUTO, WITH_NORMS),
    "parts of experts that share A": Case("experts", AUTO, SHARED),
    "experts apart": Case("experts", EP, ALL),
    "experts apart that share A": Case("experts", EP, SHARED),
}
# With the same batch in each process, or with other ones.
OF_FOUR = {
    "copies of experts": Case("experts", COPIES, PLAIN),
    "copies of experts that share A": Case("experts", COPIES, SHARED),
    "one copy": Case("experts", spread_by(tp_size=1, fsdp_size=4, ep_size=4), PLAIN),
    "two have a batch": Case("experts", BOTH_AXES, adapter("all-experts")),
    "all have a batch": Case("experts", spread_by(tp_size=4, ep_size=4), PLAIN),
    "grouped products": Case("experts", COPIES, PLAIN, 2e-5, "grouped_mm"),
}
THIRDS = {"match": "qkv_proj", "slices": {"q": 16, "k": 16, "v": 16}, "adapt": ["q"]}
SUMMED = spread_by(tp_size=2, tp_plan={"model.layers.*.input_layernorm": "all_reduce"})
# What is refused, and the place that the refusal names.
REFUSED = {
    "norms of a part": (Case("llama", AUTO, adapter("q_proj", variant="dora")), "q_proj"),
    "rows of a part of a table": (
        Case("llama", AUTO, adapter("q_proj", tokens={"embed_tokens": [1]})), "embed_tokens",
    ),
    "a bias that one process adds": (
        Case("llama", AUTO, adapter("q_proj", train=[r"down_proj\.bias"])), "down_proj",
    ),
    "slices of a part": (Case("phi", AUTO, adapter(THIRDS)), "qkv_proj"),
    "some of the experts": (
        Case("experts", EP, adapter({"match": r"experts\.\w+", "only": [0]})), "experts",
    ),
    "dropout in each process": (
        Case("latent", AUTO, adapter("kv_a_proj_with_mqa", dropout=0.5)), "kv_a_proj_with_mqa",
    ),
    "a way to spread that is not known": (
        Case("llama", SUMMED, adapter("q_proj", train=["input_layernorm"])), "input_layernorm",
    ),
}  # fmt: skip
REFUSED_BY_FOUR = {"layers on both axes": (Case("experts", BOTH_AXES, PLAIN), "self_attn")}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def forwards(model: Any) -> dict[str, Any]:
    return {n: (type(m), m.__dict__.get("forward")) for n, m in model.named_modules()}


def loss_of(model: Any, *batches: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.stack([model(ids, labels=ids).loss for ids in batches]).mean()


def trains_like_one_process(folder: Path, name: str, case: Case) -> None:
    model, plain = case.loaded(folder), case.loaded(folder, spread=False)
    near_enough = case.tolerance
    before, base = forwards(model), logits(plain)
    assert error(logits(model), base) < near_enough
    torch.manual_seed(dist.get_rank())
    li.inject(model, case.config)
    same(values(model), from_first(values(model)))
    torch.manual_seed(0)
    near(values(model), values(li.inject(copy.deepcopy(plain), case.config)), near_enough)
    start = copy.deepcopy(li.adapter_state(filled(model)))
    li.train_only(li.install(plain, start), "default")
    assert error(logits(model), logits(plain)) < near_enough
    batches = IDS.chunk(case.of("fsdp_size"))
    steps(
        model, loss_of(model, batches[dist.get_rank() // case.of("tp_size") % len(batches)]), lr=0.5
    )
    steps(plain, loss_of(plain, *batches), lr=0.5)
    assert any(error(t, values(plain)[key]) > 1e-3 for key, t in values(start).items()), "trained"
    last = logits(plain)
    same(values(model), from_first(values(model)))
    near(values(model), values(plain), near_enough)
    near(dict(li.merged_weights(model)), dict(li.merged_weights(plain)), near_enough)
    assert error(logits(model), last) < near_enough
    with li.disabled(model):
        assert error(logits(model), base) < near_enough
    path = li.save_adapter(model, folder / f"of {name}")
    again = li.load_adapter(case.loaded(folder, spread=False), path)
    assert error(logits(again), last) < near_enough
    if case.of("fsdp_size") > 1:  # FSDP2 keeps what it has sharded
        return
    li.eject(model)
    assert forwards(model) == before
    assert error(logits(model), base) < near_enough
    for each in (model, li.eject(plain)):
        assert error(logits(li.load_adapter(each, path)), last) < near_enough


def goes_from_one_process_to_four_and_back(folder: Path) -> None:
    case = OF_FOUR["copies of experts"]
    model = case.loaded(folder)
    li.load_adapter(model, folder / "saved")
    li.save_adapter(model, folder / "again")
    one, two = (li.read_adapter(folder / name) for name in ("saved", "again"))
    same(values(one), values(two))
    assert one.fingerprint == two.fingerprint


def is_refused(folder: Path, case: Case, name: str) -> None:
    model = case.loaded(folder)
    before, words = forwards(model), said(lambda: li.inject(model, case.config))
    assert words.startswith("LayerError: ")
    assert name in words
    assert words == from_first(words)
    assert forwards(model) == before
    assert not li.adapters(model)


def check_trains_alike(model: Any, plain: Any, x: Tensor, *targets: Any) -> None:
    """An adapter on what was spread by hand, and its values on the model in one process."""
    torch.manual_seed(dist.get_rank())
    li.inject(model, adapter(*targets))
    li.install(plain, copy.deepcopy(li.adapter_state(filled(model))))
    li.train_only(plain, "default")
    for each in (model, plain):
        steps(each, lambda each=each: each(x).square().sum())
    near(values(model), values(plain), 1e-12)


def by_hand(folder: Path) -> None:
    """torch's parallelize_module, then inject."""
    from torch.distributed.tensor import parallel

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    model = parallel.parallelize_module(copy.deepcopy(plain), mesh(2), plan)
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
    shards = distribute_tensor(model[0].w1.detach(), mesh(2), [Shard(0)])
    model[0].w1, model[0].first = nn.Parameter(shards), 2 * dist.get_rank()
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    check_trains_alike(model, plain, x, {"match": "w1", "layout": "out_in", **share})


def mixes_rows_graphs_and_norms(folder: Path) -> None:
    """Each compared with an unsharded copy."""
    case = Case("llama", AUTO, adapter("q_proj", "down_proj"))
    spread, plain = case.loaded(folder), case.loaded(folder, spread=False)
    for name in ("one", "two"):
        filled(li.inject(spread, case.config, name), name)
        li.install(plain, copy.deepcopy(li.adapter_state(spread, name)), name)
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


def of_cases(cases: Mapping[str, Case], refused: Mapping[str, tuple[Case, str]]) -> dict[str, Any]:
    jobs = {n: partial(trains_like_one_process, name=n, case=case) for n, case in cases.items()}
    for what, (case, name) in refused.items():
        jobs[f"refused: {what}"] = partial(is_refused, case=case, name=name)
    return jobs


TWO = of_cases(OF_TWO, REFUSED) | {
    "parallelize_module, then inject": by_hand,
    "a stack of DTensors": of_dtensors,
    "a stack of DTensors that shares A": partial(of_dtensors, share="A"),
    "mixes, rows, graphs and norms": mixes_rows_graphs_and_norms,
}
FOUR = of_cases(OF_FOUR, REFUSED_BY_FOUR) | {
    "from one process to four and back": goes_from_one_process_to_four_and_back,
}


def jobs_of_two() -> dict[str, Any]:
    return TWO


def jobs_of_four() -> dict[str, Any]:
    return FOUR


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
    one = li.inject(OF_FOUR["copies of experts"].loaded(place, spread=False), PLAIN)
    li.save_adapter(filled(one), place / "saved", unused=[".*"])
    return place


@pytest.fixture(scope="module")
def failed_of_two(folder: Path, forks: Forks) -> dict[str, str]:
    return failures(forks, 2, jobs_of_two, folder)


@pytest.fixture(scope="module")
def failed_of_four(folder: Path, forks: Forks) -> dict[str, str]:
    return failures(forks, 4, jobs_of_four, folder)


@pytest.mark.parametrize("job", TWO)
def test_two_processes_come_to_what_one_does(job: str, failed_of_two: dict[str, str]) -> None:
    assert not failed_of_two[job], failed_of_two[job]


@pytest.mark.parametrize("job", FOUR)
def test_four_processes_come_to_what_one_does(job: str, failed_of_four: dict[str, str]) -> None:
    assert not failed_of_four[job], failed_of_four[job]

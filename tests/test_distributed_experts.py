"""Four processes: experts that are apart, with the same batch in each process or with other ones.

Steps are those of SGD, so a gradient that is a sum where it should be a mean shows.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import fill
from helpers.forks import Forks
from helpers.refusals import said
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_inject as li

pytest.importorskip("transformers.distributed.expert_parallel")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 4
IDS = torch.arange(4 * 5).view(4, 5) % 17
RULES: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": ["all-linear", "all-experts"]}
ALONE = RULES | {"targets": ["all-experts"]}
SHARED = RULES | {"targets": [{"match": "all-experts", "share": "A"}]}


class Case(NamedTuple):
    """How many processes each axis has, what is adapted, and how experts multiply."""

    how: Mapping[str, int]
    config: Mapping[str, Any]
    experts: str = "eager"
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12


CASES = {
    "copies of experts": Case({"tp_size": 1, "fsdp_size": 4, "ep_size": 2}, RULES),
    "experts share A": Case({"tp_size": 1, "fsdp_size": 4, "ep_size": 2}, SHARED),
    "one copy": Case({"tp_size": 1, "fsdp_size": 4, "ep_size": 4}, RULES),
    "two have a batch": Case({"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, ALONE),
    "all have a batch": Case({"tp_size": 4, "ep_size": 4}, RULES),
    "grouped products": Case(
        {"tp_size": 1, "fsdp_size": 4, "ep_size": 2},
        RULES,
        experts="grouped_mm",
        dtype=torch.float32,
        tolerance=2e-5,
    ),
}


def build() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).double()


def loaded(folder: Path, case: Case, *, spread: bool) -> Any:
    how = {"distributed_config": dict(case.how)} if spread else {}
    return Qwen3MoeForCausalLM.from_pretrained(
        folder / "base", dtype=case.dtype, experts_implementation=case.experts, **how
    )


def steps(model: Any, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.5)
    for _ in range(2):
        loss = torch.stack([model(ids, labels=ids).loss for ids in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def filled(folder: Path, case: Case) -> Any:
    """What each test begins with, made in one process."""
    torch.manual_seed(1)
    return fill(li.inject(loaded(folder, case, spread=False), case.config))


def trained(folder: Path, case: Case) -> dict[str, Any]:
    model = loaded(folder, case, spread=True)
    torch.manual_seed(dist.get_rank())
    li.inject(model, case.config)
    seen = {"fresh": copy.deepcopy(li.adapter_state(model))}
    li.swap_adapter(model, li.adapter_state(filled(folder, case)))
    with torch.no_grad():
        seen["first"] = model(IDS).logits.clone()
    batches = IDS.chunk(case.how.get("fsdp_size", 1))
    steps(model, [batches[dist.get_rank() // case.how["tp_size"]]])
    seen["merged"] = {name: tensor.clone() for name, tensor in li.merged_weights(model)}
    return seen | {"end": copy.deepcopy(li.adapter_state(model))}


def reloaded(folder: Path) -> bool:
    """What one process has saved, in four, and saved again."""
    case = CASES["copies of experts"]
    model = loaded(folder, case, spread=True)
    li.load_adapter(model, folder / "saved")
    li.save_adapter(model, folder / "again")
    return li.adapter_state(model) == li.read_adapter(folder / "again")


def refused(folder: Path) -> list[str]:
    dense = loaded(folder, CASES["two have a batch"], spread=True)
    some = loaded(folder, CASES["copies of experts"], spread=True)
    rule = {"match": r"experts\.\w+", "only": [0]}
    return [
        said(lambda: li.inject(dense, RULES)),
        said(lambda: li.inject(some, RULES | {"targets": [rule]})),
    ]


def work(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        seen: dict[str, Any] = {name: trained(folder, case) for name, case in CASES.items()}
        reloaded(folder)
        return seen | {"refused": refused(folder)}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts")
    build().save_pretrained(place / "base")
    li.save_adapter(filled(place, CASES["copies of experts"]), place / "saved", unused=[".*"])
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    """What each of four processes saw of all cases; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


def far(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[n] - t).abs().max() / (t.abs().max() or 1.0)) for n, t in two.items())


def tensors(state: Any) -> dict[str, Tensor]:
    return {f"{n}.{r}": t for n, site in state.sites.items() for r, t in site.tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_experts_that_are_apart_train_as_in_one_process(
    name: str, ranks: Any, folder: Path
) -> None:
    case = CASES[name]
    model = filled(folder, case)
    start = tensors(copy.deepcopy(li.adapter_state(model)))
    with torch.no_grad():
        first = model(IDS).logits.clone()
    steps(model, [*IDS.chunk(case.how.get("fsdp_size", 1))])
    wanted, merged = tensors(li.adapter_state(model)), dict(li.merged_weights(model))
    assert far(start, wanted) > 1e-3, "it trained"
    for rank in ranks:
        seen = rank[name]
        assert seen["fresh"] == ranks[0][name]["fresh"]
        assert far({"": seen["first"]}, {"": first}) < case.tolerance
        assert far(tensors(seen["end"]), wanted) < case.tolerance
        assert far(seen["merged"], merged) < case.tolerance


def test_an_adapter_goes_from_one_process_to_four_and_back(ranks: Any, folder: Path) -> None:
    del ranks
    one, two = (li.read_adapter(folder / name) for name in ("saved", "again"))
    assert far(tensors(one), tensors(two)) == 0
    assert one.fingerprint == two.fingerprint


def test_what_experts_that_are_apart_cannot_have_is_refused(ranks: Any) -> None:
    dense, some = ranks[0]["refused"]
    assert all(rank["refused"] == [dense, some] for rank in ranks)
    assert "it is not sharded by fully_shard alone" in dense
    assert "only some experts are to be adapted" in some

"""Four processes: experts that are apart, with the same batch in each process or with other ones.

Steps are those of SGD, so a gradient that is a sum where it should be a mean shows.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.ranks import failures, far, filled, from_first, near, same, values
from helpers.refusals import said
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_inject as li

pytest.importorskip("transformers.distributed.expert_parallel")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

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


COPIES = {"tp_size": 1, "fsdp_size": 4, "ep_size": 2}
CASES = {
    "copies of experts": Case(COPIES, RULES),
    "experts share A": Case(COPIES, SHARED),
    "one copy": Case({"tp_size": 1, "fsdp_size": 4, "ep_size": 4}, RULES),
    "two have a batch": Case({"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, ALONE),
    "all have a batch": Case({"tp_size": 4, "ep_size": 4}, RULES),
    "grouped products": Case(COPIES, RULES, "grouped_mm", torch.float32, tolerance=2e-5),
}


def loaded(folder: Path, case: Case, *, spread: bool) -> Any:
    how = {"distributed_config": dict(case.how)} if spread else {}
    return Qwen3MoeForCausalLM.from_pretrained(
        folder / "base", dtype=case.dtype, experts_implementation=case.experts, **how
    )


def adapted(folder: Path, case: Case) -> Any:
    """What each test begins with, made in one process."""
    torch.manual_seed(1)
    return filled(li.inject(loaded(folder, case, spread=False), case.config), std=0.5)


def steps(model: Any, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.5)
    for _ in range(2):
        torch.stack([model(ids, labels=ids).loss for ids in batches]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def trains_like_one_process(folder: Path, case: Case) -> None:
    model, plain = loaded(folder, case, spread=True), adapted(folder, case)
    torch.manual_seed(dist.get_rank())
    li.inject(model, case.config)
    same(values(model), from_first(values(model)))
    li.swap_adapter(model, li.adapter_state(plain))
    start = values(plain)
    assert far(logits(model), logits(plain)) < case.tolerance
    batches = IDS.chunk(case.how.get("fsdp_size", 1))
    steps(model, [batches[dist.get_rank() // case.how["tp_size"]]])
    steps(plain, [*batches])
    wanted = values(plain)
    assert any(far(start[key], tensor) > 1e-3 for key, tensor in wanted.items()), "it trained"
    near(values(model), wanted, case.tolerance)
    near(dict(li.merged_weights(model)), dict(li.merged_weights(plain)), case.tolerance)


def goes_from_one_process_to_four_and_back(folder: Path) -> None:
    model = loaded(folder, CASES["copies of experts"], spread=True)
    li.load_adapter(model, folder / "saved")
    li.save_adapter(model, folder / "again")
    one, two = (li.read_adapter(folder / name) for name in ("saved", "again"))
    same(values(one), values(two))
    assert one.fingerprint == two.fingerprint


def layers_on_both_axes_are_refused(folder: Path) -> None:
    model = loaded(folder, CASES["two have a batch"], spread=True)
    assert "it is not sharded by fully_shard alone" in said(lambda: li.inject(model, RULES))


JOBS: dict[str, Any] = {name: partial(trains_like_one_process, case=c) for name, c in CASES.items()}
JOBS |= {"layers on both axes are refused": layers_on_both_axes_are_refused}
JOBS |= {"from one process to four and back": goes_from_one_process_to_four_and_back}


def work(folder: Path) -> dict[str, str]:
    return failures(JOBS, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "head_dim": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 20, "num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, initializer_range=0.2)).double()
    model.save_pretrained(place / "base")
    li.save_adapter(adapted(place, CASES["copies of experts"]), place / "saved", unused=[".*"])
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, str]]:
    """What failed in each of four processes; they start once."""
    return [rank.result() for rank in forks.start_ranks(4, work, folder)]


@pytest.mark.parametrize("job", JOBS)
def test_four_processes_come_to_what_one_does(job: str, ranks: Any) -> None:
    failed = "\n".join(rank[job] for rank in ranks)
    assert not failed.strip(), failed

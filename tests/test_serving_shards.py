"""What goes to a server from two processes with shards: adapters in memory, merged weights."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import fill
from helpers.forks import Forks
from helpers.models import tiny_llama
from torch import Tensor

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
EVERY = {"rank": 2, "alpha": 3.0, "targets": ["all-linear", "embed_tokens"]}


def build(config: dict[str, Any] = EVERY) -> Any:
    """A tiny Llama with an adapter, the same in every process."""
    model = li.inject(tiny_llama(num_key_value_heads=WORLD).double(), config)
    torch.manual_seed(1)
    return fill(model)


def by_fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_columns_and_rows(model: Any) -> Any:
    from torch.distributed.tensor import parallel

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    columns, rows = parallel.ColwiseParallel, parallel.RowwiseParallel
    for layer in model.model.layers:
        plan = {"gate_proj": columns(), "up_proj": columns(), "down_proj": rows()}
        parallel.parallelize_module(layer.mlp, mesh, plan)
    return model


SHARDINGS = {"fsdp2": by_fsdp2, "columns and rows": by_columns_and_rows}


def states(shard: Any) -> dict[str, Any]:
    model = shard(build())
    every, config = li.peft_state(model)
    first, same = li.peft_state(model, first_only=True, portable=True)
    return {"every": every, "config": config, "first": first, "portable": same}


def work() -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return {name: {"states": states(shard)} for name, shard in SHARDINGS.items()}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(forks: Forks) -> list[dict[str, Any]]:
    """What each of two processes got; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work)]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("how", SHARDINGS)
def test_shards_are_gathered_on_every_rank_or_on_the_first(how: str, ranks: Any) -> None:
    model = build()
    tensors, config = li.peft_state(model)
    portable, plain = li.peft_state(model, portable=True)
    for rank, found in enumerate(ranks):
        got = found[how]["states"]
        assert same(got["every"], tensors)
        assert (got["config"], got["portable"]) == (config, plain)
        assert same(got["first"], portable if rank == 0 else {})

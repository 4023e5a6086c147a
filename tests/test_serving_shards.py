"""What goes to a server from two processes with shards: adapters in memory, merged weights."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import error, fill
from helpers.forks import Forks
from helpers.models import tiny_llama
from helpers.refusals import said
from torch import Tensor

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
EVERY = {"rank": 2, "alpha": 3.0, "targets": ["all-linear", "embed_tokens", "lm_head"]}
FRESH = {"rank": 2, "alpha": 3.0, "train": [r"model\.norm"], "targets": ["q_proj", "down_proj"]}
BATCH = torch.arange(4 * 6).view(4, 6) % 17


def plain() -> Any:
    return tiny_llama(num_key_value_heads=WORLD)


def build(config: dict[str, Any] = EVERY) -> Any:
    """A tiny Llama with an adapter, the same in every process."""
    model = li.inject(plain().double(), config)
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


CASES = {
    "float64": (EVERY | {"train": [r"model\.norm"]}, torch.float64),
    "bfloat16": (EVERY, torch.bfloat16),
    "read": (EVERY | {"targets": [r"up_proj\.weight", "lm_head"]}, torch.float64),
    "dora": (EVERY | {"variant": "dora", "targets": ["all-linear", "lm_head"]}, torch.float64),
}
SHARDINGS = {"fsdp2": by_fsdp2, "columns and rows": by_columns_and_rows}


def states(shard: Any) -> dict[str, Any]:
    model = shard(build())
    every, config = li.peft_state(model)
    first, same = li.peft_state(model, first_only=True, portable=True)
    return {"every": every, "config": config, "first": first, "portable": same}


def merged(shard: Any) -> dict[str, Any]:
    """Every kind of update: forward, read, DoRA, trained copies; a mix; in float32 and bfloat16."""
    results = {}
    for case, (config, dtype) in CASES.items():
        model = shard(two(build(config).to(dtype)))
        before = {name: whole(p).clone() for name, p in model.named_parameters()}
        results[case] = weights_of(model)
        assert same(before, {name: whole(p) for name, p in model.named_parameters()})
    return results


def weights_of(model: Any) -> dict[str, Any]:
    """The merged weights of the mix and of one adapter, and what rounding kept."""
    kept: dict[str, float] = {}
    mixed = {name: tensor.clone() for name, tensor in li.merged_weights(model, kept=kept)}
    alone = {name: t.clone() for name, t in li.merged_weights(model, name="default")}
    return {"mixed": mixed, "alone": alone, "kept": kept}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def two(model: Any) -> Any:
    """A second adapter, active with the first one unless that has a gain."""
    if li.adapter_state(model).sites["lm_head"].spec.variant == "lora":
        fill(li.inject(model, {"rank": 3, "targets": ["gate_proj"]}, "second"), "second")
        li.activate(model, {"default": 0.5, "second": 1.0})
    return model


def fresh() -> dict[str, Any]:
    """An adapter that is injected into shards that have run, with another seed in each process."""
    model = by_fsdp2(plain().double())
    rank = dist.get_rank()
    model(BATCH)
    torch.manual_seed(rank)
    li.inject(model, FRESH)
    start = li.adapter_state(model)
    kinds = {type(p.data).__name__ for p in li.adapter_parameters(model).values()}
    steps(model, BATCH[2 * rank : 2 * rank + 2])
    return {"start": start, "kinds": kinds, "end": li.adapter_state(model)}


def steps(model: Any, batch: Tensor) -> None:
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.3)
    for _ in range(3):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def refusals() -> list[str]:
    model = by_fsdp2(build())
    idle = said(lambda: li.merged_weights(li.activate(model, None)))
    li.activate(model, "default")
    quantized = said(lambda: li.merged_weights(model, dequantize="bfloat16"))
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.mul_(float("nan") if dist.get_rank() == 0 else 1.0)
    broken = said(lambda: dict(li.merged_weights(model)))
    tenants = {"ann": li.Trial({"rank": 2, "targets": ["q_proj"]}, lr=1e-2)}
    sharded = by_fsdp2(plain())
    early = said(lambda: li.Trials(sharded, tenants))
    assert not li.adapters(sharded)
    return [idle, quantized, broken, early]


def work() -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        results: dict[str, Any] = {
            name: {"states": states(shard), "merged": merged(shard)}
            for name, shard in SHARDINGS.items()
        }
        return results | {"fresh": fresh(), "refusals": refusals()}
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
    for rank, results in enumerate(ranks):
        got = results[how]["states"]
        assert same(got["every"], tensors)
        assert (got["config"], got["portable"]) == (config, plain)
        assert same(got["first"], portable if rank == 0 else {})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", SHARDINGS)
def test_merged_weights_of_shards_are_those_of_one_process(how: str, case: str, ranks: Any) -> None:
    config, dtype = CASES[case]
    wanted = weights_of(two(build(config).to(dtype)))
    for rank in ranks:
        results = rank[how]["merged"][case]
        assert same(results["mixed"], wanted["mixed"])
        assert same(results["alone"], wanted["alone"])
        assert results["kept"] == wanted["kept"]
    assert bool(wanted["kept"]) == (dtype is torch.bfloat16)


def test_what_cannot_be_gathered_is_refused_by_every_process(ranks: Any) -> None:
    """A NaN in the shard of one process is seen by all, and none waits for another."""
    assert ranks[0]["refusals"] == ranks[1]["refusals"]
    idle, quantized, broken, early = ranks[0]["refusals"]
    assert "no adapter is active" in idle
    assert "its weights are quantized or to be dequantized" in quantized
    assert "is NaN or Inf" in broken
    assert "StateError: Trials: this process has a part of 'model.embed_tokens.weight'" in early


def test_a_fresh_adapter_on_shards_trains_like_one_process(ranks: Any) -> None:
    """Each process draws other numbers, and all start with those of the first one."""
    one, two = (rank["fresh"] for rank in ranks)
    assert one["start"] == two["start"]
    assert one["kinds"] == two["kinds"] == {"DTensor"}
    assert all(site.is_zero for site in one["start"].sites.values())
    model = plain().double()
    torch.manual_seed(0)  # that of the first process
    alone = li.adapter_state(li.inject(copy.deepcopy(model), FRESH))
    assert one["start"].sites == alone.sites
    li.install(model, one["start"])
    li.train_only(model, "default")
    steps(model, BATCH)
    wanted = li.adapter_state(model)
    for state in (one["end"], two["end"]):
        for name, site in wanted.sites.items():
            assert error(state.sites[name].B, site.B) < 1e-5
            assert error(state.sites[name].A, site.A) < 1e-5
        for name, tensor in wanted.trained.items():
            assert error(state.trained[name], tensor) < 1e-5

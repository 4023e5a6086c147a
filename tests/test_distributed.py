"""Two processes: FSDP2, DistributedDataParallel and tensor parallelism against one process.

Each worker trains on its half of a batch and hands on what came out; the test trains the
same model in one process on both halves and compares values. Both sides run in float64,
so that a delta counted twice or a gradient averaged wrongly cannot hide in rounding.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.models import tiny_llama
from helpers.ranks import far, filled, in_a_group, mesh, near, same, values, whole
from helpers.refusals import said
from helpers.versions import FSDP2_ON_CPU, GLOO_TAKES_MEANS, needs_fsdp2
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD, STEPS = 2, 2
TARGETS = ["q_proj", r"o_proj\.weight", "embed_tokens", "down_proj"]
CONFIG = {"rank": 2, "alpha": 3.0, "targets": TARGETS, "train": [r"model\.norm"]}
FORWARD = {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "down_proj"]}
IDS = torch.arange(4 * 6).view(4, 6) % 17
# The norms and the softmax of a Llama are float32, and so are sums over two processes' halves of
# what passed through them: a few roundings of float32, of the largest value of each tensor.
TOLERANCE = 1e-5


def build(config: dict[str, Any] = CONFIG, **changes: Any) -> Any:
    """A tiny Llama with an adapter whose tensors are all random, the same in every process."""
    model = tiny_llama(initializer_range=0.2, **changes).double()
    return filled(li.inject(model, config))


def other_values(model: Any) -> Any:
    return filled(model, seed=2, std=1.0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def base_logits(model: Any) -> Tensor:
    with li.disabled(model):
        return logits(model)


def train(model: Any, wrapped: Any, batches: list[Tensor]) -> dict[str, Any]:
    """Two steps of SGD; what each came to. The losses of several batches are averaged."""
    parameters = li.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = torch.stack([wrapped(ids, labels=ids).loss for ids in batches]).mean()
        loss.backward()
        gradients.append({k: whole(p.grad) for k, p in parameters.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    end = {"logits": logits(wrapped), "state": values(model)}
    return {"losses": losses, "gradients": gradients, **end}


def mine(rank: int) -> Tensor:
    return IDS[2 * rank : 2 * rank + 2]


def in_one_process(model: Any) -> dict[str, Any]:
    return train(model, model, [mine(0), mine(1)])


# ------------------------------------------------------------ what each process does


def sharded(model: Any, *layers: nn.Module, on: Any = None, **how: Any) -> Any:
    """By FSDP2: each layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    on = mesh(dist.get_world_size()) if on is None else on
    for module in (*layers, model):
        fully_shard(module, mesh=on, **how)
    return model


def checkpointed(model: Any) -> Any:
    with warnings.catch_warnings():
        # The name of this call changed within transformers 5.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def fsdp(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule

    sharded(model, *model.model.layers)
    seen = train(model, model, [mine(rank)])
    refused = [said(lambda: li.merge(model)), said(lambda: li.inject(model, FORWARD, "default"))]
    keys = list(model.state_dict())
    seen["base"], seen["again"] = base_logits(model), logits(model)
    seen["refused"] = [*refused, said(lambda: li.eject(model))]
    seen["off"] = logits(li.activate(model, None))
    assert list(model.state_dict()) == keys
    seen["sharded"] = {name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    return seen


def fsdp_mixed(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    """As people run it: a bfloat16 forward over float32 masters that wait in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

    how = {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
    }
    sharded(model.float(), *model.model.layers, **how)
    for module in () if GLOO_TAKES_MEANS else model.modules():  # what docs/guide says of torch 2.8
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return train(model, model, [mine(rank)])


def fsdp_swapped(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    """New values, files and distributed checkpoints of the adapter after the model was sharded."""
    import torch.distributed.checkpoint as dcp

    state, fingerprint = (
        li.adapter_state(other_values(build())),
        li.adapter_state(model).fingerprint,
    )
    sharded(model, *model.model.layers)
    logits(model)  # which leaves the root gathered
    li.swap_adapter(model, state)
    seen = {"swapped": values(model), "logits": logits(model)}
    seen["fingerprint"] = li.adapter_state(model).fingerprint == fingerprint
    samples = {k: tuple(2 * x for x in v) for k, v in fingerprint.samples.items()}
    other = dataclasses.replace(
        state, fingerprint=dataclasses.replace(fingerprint, samples=samples)
    )
    seen["refused"] = said(lambda: li.swap_adapter(model, other))
    dcp.save({"adapter": li.adapter_parameters(model)}, checkpoint_id=folder / "dcp")
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.zero_()
    dcp.load({"adapter": li.adapter_parameters(model)}, checkpoint_id=folder / "dcp")
    seen["checkpointed"] = values(model)
    li.save_adapter(model, folder / "swapped")
    return seen


def fsdp_loaded(
    folder: Path, rank: int, model: Any, *, late: bool = False, shape: tuple[int, ...] = (WORLD,)
) -> dict[str, Any]:
    """An adapter from files onto a model that was sharded, and maybe has run, before."""
    path = folder / f"loaded-{late}-{len(shape)}"
    if rank == 0:
        li.save_adapter(model, path)
    dist.barrier()
    state = li.adapter_state(other_values(build()))
    sharded(li.eject(model), *model.model.layers, on=mesh(*shape))
    warnings.filterwarnings("error", "FSDP2-wrapped module")  # that returns a view
    if late:
        logits(model)  # after which FSDP2 knows its modules
    li.load_adapter(model, path)
    seen: dict[str, Any] = {"loaded": values(model), "served": logits(model)}
    li.train_only(model, "default")
    assert all(hasattr(p, "full_tensor") for p in li.adapter_parameters(model).values())
    seen |= train(model, model, [mine(rank)])
    seen["refused"] = said(lambda: li.load_adapter(model, path, "second"))
    li.swap_adapter(model, state)
    return seen | {"swapped": values(model)}


def fsdp_stage(folder: Path, rank: int, model: Any) -> None:
    """Rank 1 alone has the part of a pipeline that is sharded, and saves it."""
    from torch.distributed.device_mesh import DeviceMesh

    alone = DeviceMesh("cpu", [1])  # a new group: every process takes part in making it
    if rank == 1:
        li.save_adapter(sharded(model, on=alone), folder / "stage")
    dist.barrier()


class Small(nn.Module):
    """Without buffers, which `to_empty` empties and no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(17, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 17)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x).tanh()  # FSDP2 wants no view


META: dict[str, Any] = {
    "lora": {"rank": 2, "targets": [r"layers\.\d", "embed"], "train": ["norm"]},
    "read": {"rank": 2, "targets": [r"layers\.\d\.weight"], "tokens": {"embed": [1, 2]}},
    "dora": {"rank": 2, "targets": [r"layers\.\d"], "variant": "dora"},
}
BY_HAND = "distributed by hand"
WAYS = (BY_HAND, "by torch's own function")


def small(config: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(3)
    model = Small().double()
    return filled(li.inject(model, config)) if config else model


def small_steps(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    parameters = li.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(STEPS):
        torch.stack([model(ids).square().mean() for ids in batches]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: whole(p) for key, p in parameters.items()}


def fsdp_on_meta(folder: Path, rank: int, _: Any) -> dict[str, Any]:
    """Inject on meta, shard, get memory, load the base: the order of large models."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor import distribute_tensor

    def run(config: dict[str, Any], way: str) -> tuple[Any, ...]:
        with torch.device("meta"):
            model: Any = li.inject(Small().double(), config)
        sharded(model, *model.layers).to_empty(device="cpu")
        base, refused = small().state_dict(), ""
        if way == BY_HAND:
            refused, held = said(lambda: model(IDS)), model.state_dict()
            shards = {
                key: distribute_tensor(t, held[key].device_mesh, held[key].placements)
                for key, t in base.items()
            }
            model.load_state_dict(shards)
        else:
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model, base, options=options)
        started = {key: whole(p) for key, p in li.adapter_parameters(model).items()}
        first = model(IDS).detach()
        li.swap_adapter(model, li.adapter_state(small(config)))
        return refused, started, first, small_steps(model, [mine(rank)])

    return {f"{name}, {way}": run(config, way) for name, config in META.items() for way in WAYS}


def fsdp_state_dicts(folder: Path, rank: int, _: Any) -> dict[str, Any]:
    """Whole state dicts by torch's own functions, where they mean the same and where not."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as torchs

    def model(alpha: int) -> Any:
        return sharded(small(META["lora"] | {"alpha": alpha}))

    source, whole_dict = model(4), torchs.StateDictOptions(full_state_dict=True)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    dcp.save(torchs.get_model_state_dict(source), checkpoint_id=folder / "state dicts")
    state = torchs.get_model_state_dict(source, options=whole_dict)

    def in_place(target: nn.Module) -> None:
        held = target.state_dict()
        dcp.load(held, checkpoint_id=folder / "state dicts")
        target.load_state_dict(held)

    def at_once(target: nn.Module) -> None:
        torchs.set_model_state_dict(target, dict(state), options=whole_dict)

    seen: dict[str, Any] = {"wanted": source(IDS).detach(), "outputs": [], "refused": []}
    for load in (in_place, at_once):
        target, other = model(4), model(6)  # texts of one length
        load(target)
        seen["outputs"].append(target(IDS).detach())
        seen["refused"].append(said(lambda load=load, other=other: load(other)))
    return seen


def ddp(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    seen = train(model, wrapped, [mine(rank)])
    seen["refused"] = said(lambda: li.inject(wrapped, FORWARD, "b"))
    assert list(li.adapters(wrapped)) == ["default"]
    seen["through"], seen["base"] = values(wrapped), base_logits(wrapped)
    li.merge(wrapped)
    seen["merged"] = logits(wrapped)
    li.unmerge(wrapped)
    seen["unmerged"] = logits(wrapped)
    seen["off"] = logits(li.activate(wrapped, None))
    li.activate(wrapped, "default")
    return seen | {"ejected": logits(li.eject(wrapped))}


def ddp_of_two(
    folder: Path, rank: int, model: Any, *, active: Any, **options: Any
) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(two_adapters(model, active), **options)
    return train(model, wrapped, [mine(rank)])


MIX = {"default": 1.0, "second": 0.5}


def two_adapters(model: Any, active: Any = MIX) -> Any:
    """Both train, and both or one take part in every forward."""
    filled(li.inject(model, FORWARD | {"rank": 3}, "second"), "second", std=0.1)
    li.activate(model, active)
    li.train_only(model, ["default", "second"])
    return model


def fsdp1(
    folder: Path, rank: int, model: Any, *, prepare: Callable[[Any], Any] = lambda model: model
) -> dict[str, Any]:
    """The older wrapper, whose parameters are views of one flat tensor while the model runs."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(prepare(model).model.layers[0])})
    how = {"auto_wrap_policy": policy, "device_id": torch.device("cpu")}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, **how)
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.1)
    for _ in range(STEPS):
        wrapped(mine(rank), labels=mine(rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen: dict[str, Any] = {"logits": logits(wrapped), "base": base_logits(wrapped)}
    verbs = (lambda: li.adapter_state(model), lambda: li.inject(wrapped, FORWARD, "second"))
    seen["refused"] = [said(verb) for verb in verbs]
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return seen | {"state": values(model)}


def tensor_parallel(
    folder: Path, rank: int, model: Any, *, plan: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Every process has the whole batch and a part of each layer."""
    from torch.distributed.tensor import parallel

    parallel.parallelize_module(model.model, mesh(WORLD), plan(model.config))
    return train(model, model, [IDS])


def by_hand(_: Any) -> dict[str, Any]:
    from torch.distributed.tensor import parallel

    columns, rows = parallel.ColwiseParallel, parallel.RowwiseParallel
    table = rows(input_layouts=dist.tensor.Replicate())
    return {
        "embed_tokens": table,
        "layers.*.mlp.gate_proj": columns(),
        "layers.*.mlp.up_proj": columns(),
        "layers.*.mlp.down_proj": rows(),
    }


def of_the_config(config: Any) -> dict[str, Any]:
    from torch.distributed.tensor import parallel

    styles = {"colwise": parallel.ColwiseParallel, "rowwise": parallel.RowwiseParallel}
    return {name: styles[how]() for name, how in config.base_model_tp_plan.items()}


def saved_by_all(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    """Every process saves, at once or later, or the first one alone."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(model, wrapped, [mine(rank)])
    wanted, paths = values(model), []

    def save(name: str, **options: Any) -> None:
        path = li.save_adapter(wrapped, folder / "saved by all" / name, **options)
        li.load_adapter(li.eject(copy.deepcopy(model)), path)  # it is there, whole
        paths.append(path)

    for attempt in range(20):
        dist.barrier()
        save(f"at once {attempt}")
        save(f"native {attempt}.safetensors", format="native")
        save("versions", version=attempt, keep=2)
    for turn in range(WORLD):
        if rank == turn:
            save("in turn")
        dist.barrier()
    if rank == 0:
        save("first alone")
    dist.barrier()
    with torch.no_grad():
        li.adapter_parameters(model)["model.norm.weight"].add_(rank + 1)
    dist.barrier()
    return {"wanted": wanted, "paths": paths, "refused": said(lambda: save("in turn"))}


class Job(NamedTuple):
    """What each process runs, on a model with which adapter."""

    run: Callable[..., Any]
    config: dict[str, Any] = CONFIG
    changes: dict[str, Any] = {}  # noqa: RUF012 - read only


SLICED = {"match": "gate_proj", "slices": {"a": 12, "b": 12}, "adapt": ["b"]}
BY_PARTS = ["embed_tokens", "q_proj", SLICED, r"up_proj\.weight", "down_proj"]
JOBS = {
    "FSDP2": Job(fsdp),
    "FSDP2, checkpointed": Job(lambda *given: fsdp(*given[:2], checkpointed(given[2]))),
    "FSDP2 in bfloat16": Job(fsdp_mixed),
    "FSDP2, swapped": Job(fsdp_swapped),
    "FSDP2, loaded": Job(fsdp_loaded),
    "FSDP2, loaded late": Job(partial(fsdp_loaded, late=True)),
    "FSDP2, loaded onto copies": Job(partial(fsdp_loaded, shape=(WORLD, 1))),
    "FSDP2, a stage": Job(fsdp_stage, FORWARD),
    "FSDP2 on meta": Job(fsdp_on_meta),
    "FSDP2, state dicts": Job(fsdp_state_dicts),
    "DDP, weight updates too": Job(ddp),
    "DDP, forward updates": Job(ddp, FORWARD),
    "static graph": Job(partial(ddp_of_two, active=MIX, static_graph=True), FORWARD),
    "unused": Job(partial(ddp_of_two, active="default", find_unused_parameters=True), FORWARD),
    "FSDP1": Job(fsdp1),
    "FSDP1, checkpointed": Job(partial(fsdp1, prepare=checkpointed)),
    "tensor parallel": Job(partial(tensor_parallel, plan=by_hand), FORWARD | {"targets": BY_PARTS}),
    "the plan of transformers": Job(
        partial(tensor_parallel, plan=of_the_config),
        FORWARD | {"targets": ["all-linear"]},
        {"num_key_value_heads": WORLD},
    ),
    "saved by all": Job(saved_by_all),
}


def named(part: str) -> list[str]:
    return [name for name in JOBS if part in name]


def work(folder: Path) -> dict[str, Any]:
    jobs = {name: job for name, job in JOBS.items() if FSDP2_ON_CPU or "FSDP2" not in name}
    return in_a_group(
        lambda: {
            name: job.run(folder, dist.get_rank(), build(job.config, **job.changes))
            for name, job in jobs.items()
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    """What each of two processes saw at all jobs; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


# ------------------------------------------------------------------------------------- the tests


def compare(seen: dict[str, Any], wanted: dict[str, Any]) -> None:
    for step in range(STEPS):
        near(seen["gradients"][step], wanted["gradients"][step], TOLERANCE)
    near(seen["state"], wanted["state"], TOLERANCE)
    assert far(seen["logits"], wanted["logits"]) < TOLERANCE


@needs_fsdp2
@pytest.mark.parametrize("job", ["FSDP2", "FSDP2, checkpointed"])
def test_a_sharded_model_trains_like_an_unsharded_one(job: str, ranks: Any) -> None:
    model = build()
    first, wanted = values(model), in_one_process(model)
    assert all(far(t, first[key]) > 1e-4 for key, t in wanted["state"].items()), "it trained"
    for seen in (rank[job] for rank in ranks):
        compare(seen, wanted)
        assert far(seen["again"], wanted["logits"]) < TOLERANCE
        for key in ("base", "off"):
            assert far(seen[key], base_logits(model)) < TOLERANCE
        assert seen["sharded"] == {"", "model.layers.0", "model.layers.1"}
        merge, inject, eject = seen["refused"]
        assert merge.startswith("LayerError: ")
        assert "sharded" in merge
        assert "the model has one of that name" in inject
        assert "fully_shard holds its tensors" in eject
    both = [sum(rank[job]["losses"][i] for rank in ranks) / WORLD for i in range(STEPS)]
    assert both == pytest.approx(wanted["losses"], rel=TOLERANCE)


@pytest.mark.parametrize("job", named("DDP"))
def test_data_parallel_training_equals_one_process(job: str, ranks: Any) -> None:
    model = build(JOBS[job].config)
    wanted = in_one_process(model)
    for seen in (rank[job] for rank in ranks):
        compare(seen, wanted)
        same(seen["through"], ranks[0][job]["state"])
        for key in ("base", "off", "ejected"):
            assert far(seen[key], base_logits(model)) < TOLERANCE, key
        assert far(seen["merged"], wanted["logits"]) < TOLERANCE
        assert torch.equal(seen["unmerged"], seen["logits"])
        assert seen["refused"].startswith("LayerError: adapter 'b'")
        assert "Inject into the model first, then wrap it" in seen["refused"]


@pytest.mark.parametrize(
    "job", ["static graph", "unused", "tensor parallel", "the plan of transformers"]
)
def test_what_is_spread_in_other_ways_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build(JOBS[job].config, **JOBS[job].changes)
    if job in ("static graph", "unused"):
        two_adapters(model, MIX if job == "static graph" else "default")
    wanted = in_one_process(model)
    for rank in ranks:
        compare(rank[job], wanted)


@pytest.mark.parametrize("job", named("FSDP1"))
def test_fsdp1_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build()
    wanted = in_one_process(model)
    for seen in (rank[job] for rank in ranks):
        near(seen["state"], wanted["state"], TOLERANCE)
        assert far(seen["logits"], wanted["logits"]) < TOLERANCE
        assert far(seen["base"], base_logits(model)) < TOLERANCE
        save, inject = seen["refused"]
        assert "this process holds a shard of it" in save
        assert "Inject or load first, then shard" in inject


@needs_fsdp2
def test_fsdp_in_bfloat16_with_offload_trains_as_near_as_bfloat16_is(ranks: Any) -> None:
    wanted = in_one_process(build().float())
    for seen in (rank["FSDP2 in bfloat16"] for rank in ranks):
        assert {tensor.dtype for tensor in seen["state"].values()} == {torch.float32}
        near(seen["gradients"][0], wanted["gradients"][0], 0.1)
        near(seen["state"], wanted["state"], 0.02)


@needs_fsdp2
@pytest.mark.parametrize("job", named("loaded"))
def test_an_adapter_loaded_onto_shards_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build()
    first, served = values(model), logits(model)
    wanted = in_one_process(model)
    for seen in (rank[job] for rank in ranks):
        same(seen["loaded"], first)
        assert far(seen["served"], served) < TOLERANCE
        compare(seen, wanted)
        same(seen["swapped"], values(other_values(build())))
        assert "fully_shard was called with this very layer" in seen["refused"]


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_adapter_is_swapped_saved_and_checkpointed_in_shards(ranks: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = other_values(build())
    for seen in (rank["FSDP2, swapped"] for rank in ranks):
        same(seen["swapped"], values(model))
        same(seen["checkpointed"], values(model))
        assert far(seen["logits"], logits(model)) < TOLERANCE
        assert seen["fingerprint"], "sampled from shards as from whole weights"
        assert "made on another base" in seen["refused"]
    again = li.load_adapter(li.eject(build()), folder / "swapped")  # of that base: compared
    same(values(again), values(model))
    fresh = build()  # one process reads what two have written
    dcp.load({"adapter": li.adapter_parameters(fresh)}, checkpoint_id=folder / "dcp")
    same(values(fresh), values(model))


@needs_fsdp2
def test_the_first_process_that_has_shards_writes_and_nobody_else_is_waited_for(
    ranks: Any, folder: Path
) -> None:
    same(values(li.read_adapter(folder / "stage")), values(build(FORWARD)))


@needs_fsdp2
@pytest.mark.parametrize("name", META)
def test_fsdp_with_meta_initialization_equals_one_process(name: str, ranks: Any) -> None:
    model = small(META[name])
    wanted = small_steps(model, [mine(0), mine(1)])
    fresh = li.adapter_parameters(li.inject(small(), META[name]))
    for way in WAYS:
        one, two = (rank["FSDP2 on meta"][f"{name}, {way}"] for rank in ranks)
        for refused, started, first, trained in (one, two):
            assert ("made on the meta device or emptied" in refused) == (way == BY_HAND)
            assert far(first, small()(IDS).detach()) < TOLERANCE
            assert started.keys() == fresh.keys()
            for key, parameter in fresh.items():
                assert started[key].shape == parameter.shape
                if not key.endswith(("lora_A", "lora_B")) or not parameter.any():
                    torch.testing.assert_close(started[key], parameter.detach())
                else:
                    assert len(started[key].unique()) == started[key].numel()
            near(trained, wanted, TOLERANCE)
        same(one[1], two[1])


@needs_fsdp2
def test_state_dicts_of_shards_say_what_their_adapters_mean(ranks: Any) -> None:
    for seen in (rank["FSDP2, state dicts"] for rank in ranks):
        assert all(far(output, seen["wanted"]) < TOLERANCE for output in seen["outputs"])
        for words in seen["refused"]:
            assert "scale 2 in the state dict, and 3 here" in words


def test_whichever_process_saves_there_is_one_adapter(ranks: Any, folder: Path) -> None:
    first, *others = (rank["saved by all"] for rank in ranks)
    for path in first["paths"]:
        if path.exists():  # of versions some are kept
            same(values(li.read_adapter(path)), first["wanted"])
    place = folder / "saved by all"
    assert not [path for path in place.rglob("*") if "tmp" in path.name]
    assert {path.name for path in (place / "versions").iterdir()} == {"18", "19", "LATEST"}
    for seen in (first, *others):
        assert "another process wrote other values" in seen["refused"]


# ------------------------------------------------------------- what one process is enough to see


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_by_columns(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh(1), {"0": ColwiseParallel()})


def sharded_by_fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    how = {"device_id": torch.device("cpu"), "sync_module_states": False}
    return FullyShardedDataParallel(model, use_orig_params=True, **how)


def sharded_by_zero3(model: nn.Module) -> nn.Module:
    """As DeepSpeed leaves a parameter: its shard elsewhere, its own data empty."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id = index
        parameter.data = torch.empty(0)
    return model


def stepped_by_zero2(model: nn.Module) -> nn.Module:
    """As DeepSpeed leaves the parameters that its optimizer knows: whole, with an attribute."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter._hp_mapping = None  # type: ignore[attr-defined]
    return model


def spread_by_older_transformers(model: nn.Module) -> nn.Module:
    """As before 5.21: this process's part of each weight is a plain tensor."""
    model[0]._hf_tp_plan = "colwise"
    return model


def two_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).double()


RULE = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shard", [sharded_by_fsdp1, sharded_by_zero3, stepped_by_zero2, spread_by_older_transformers]
)  # DTensors take one
def test_sharding_comes_after_injecting(shard: Any, one_rank: None) -> None:
    """An adapter that is put onto shards would train alone in each process."""
    state, model = li.adapter_state(li.inject(two_layers(), RULE)), shard(two_layers())
    before = {name: (type(m), len(m._parameters)) for name, m in model.named_modules()}
    for verb in (lambda: li.inject(model, RULE), lambda: li.install(model, state, base="any")):
        refused = said(verb)
        assert refused.startswith("LayerError: adapter 'default': ")
        assert "Inject or load first, then shard" in refused
    assert {name: (type(m), len(m._parameters)) for name, m in model.named_modules()} == before


def test_a_second_adapter_after_zero2_stepped_with_the_first_is_refused() -> None:
    """Its optimizer knows the first, and of the frozen base nothing."""
    model = stepped_by_zero2(li.inject(two_layers(), RULE))
    assert "DeepSpeed ZeRO" in said(lambda: li.inject(model, RULE, "second"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [sharded, sharded_by_columns, sharded_by_fsdp1, sharded_by_zero3])
def test_shards_are_not_taken_for_tensors(shard: Any, one_rank: None) -> None:
    """Inject, shard, then save and merge: the whole tensors, or an error."""
    model = li.inject(two_layers(), RULE | {"train": ["1"]})
    shapes = {key: tensor.shape for key, tensor in values(model).items()}
    shard(model)
    if shard is not sharded_by_fsdp1:  # which with one process keeps tensors whole
        assert "shard" in said(lambda: li.merge(model))
    if refused := said(lambda: li.adapter_state(model)):
        assert "this process holds a shard of it" in refused
    else:
        assert shard is not sharded_by_zero3
        assert {key: tensor.shape for key, tensor in values(model).items()} == shapes


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("context", ["routed", "disabled", "none"])
@pytest.mark.parametrize("target", [r"\d", r"0\.weight"])
def test_the_first_forward_of_shards_may_be_in_a_context(
    target: str, context: str, one_rank: None
) -> None:
    """In it FSDP2 reads each weight, to keep its shard."""
    plain = two_layers()
    for name in "ab":
        filled(li.inject(plain, {"rank": 2, "targets": [target]}, name), name, seed=ord(name))
    model = copy.deepcopy(plain)
    sharded(model, *model)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

    def run(of: nn.Module) -> Tensor:
        if context == "routed":
            with li.routed(of, ["a", "b", None]):
                return of(x).tanh()
        if context == "disabled":
            with li.disabled(of):
                return of(x).tanh()
        return of(x).tanh()

    if context == "routed" and "weight" in target:
        assert "which all rows of a batch share" in said(lambda: run(model))
    else:
        torch.testing.assert_close(run(model), run(plain))
    torch.testing.assert_close(model(x).tanh(), plain(x).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.fc = kind(4, 4, num_layers=2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cells(x)[0]).tanh()


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_sharded_weights_of_a_recurrent_layer(
    kind: type[nn.RNNBase], apart: bool, one_rank: None
) -> None:
    rule = {"rank": 2, "targets": [r"weight_[ih]h_l\d", "fc"], "train": [r"bias_ih_l0"]}
    plain = filled(li.inject(Recurrent(kind).double(), rule))
    model = copy.deepcopy(plain)
    sharded(model, *([model.cells] if apart else []))
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    for of in (plain, model):
        for _ in range(2):
            of(x).square().sum().backward()
    torch.testing.assert_close(model(x), plain(x))
    wanted = li.adapter_parameters(plain)
    for key, parameter in li.adapter_parameters(model).items():
        torch.testing.assert_close(whole(parameter.grad), wanted[key].grad), key


class ThirdIsRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = nn.ParameterList([torch.ones(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) @ self.c[0]


@pytest.mark.parametrize(
    ("target", "layer", "words"),
    [
        ("a", "a", "'a': fully_shard was called with this very layer"),
        ("a", "b", "'a': it is not sharded by fully_shard alone"),
        (r"c\.0", "", "'c.0': it has no forward"),
    ],
)
def test_what_fsdp2_cannot_shard_with_its_layer_is_not_loaded(
    target: str, layer: str, words: str, one_rank: None
) -> None:
    rule = {"rank": 2, "targets": [target]}
    state, net = li.adapter_state(li.inject(ThirdIsRead(), rule)), ThirdIsRead()
    sharded(net.get_submodule(layer))
    for verb in (lambda: li.install(net, state, base="any"), lambda: li.inject(net, rule)):
        refused = said(verb)
        assert "Inject or load the adapter first, then shard the model" in refused
        assert words in refused
    assert not li.adapters(net)


def of_two_adapters() -> nn.Module:
    """Of which "b" trains."""
    model = two_layers()
    for name in "ab":
        li.inject(model, {"rank": 2, "targets": [r"\d"]}, name)
    return model


@pytest.mark.parametrize("given", ["the wrapper", "the model inside", "a layer inside"])
def test_what_ddp_would_not_reduce_is_refused(given: str, one_rank: None) -> None:
    """It reduces what trained when it wrapped the model; the rest would differ in each process."""
    model = of_two_adapters()
    wrapped = nn.parallel.DistributedDataParallel(model)
    here = {"the wrapper": wrapped, "the model inside": model, "a layer inside": model[0]}[given]
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for names in ("a", ["a", "b"]):
        words = said(lambda names=names: li.train_only(here, names))
        assert "reduces what trained when it wrapped" in words
    rule = {"rank": 2, "targets": [".*"] if given == "a layer inside" else ["0"]}
    state = li.adapter_state(model, "a")
    for verb in (lambda: li.inject(here, rule, "c"), lambda: li.install(model, state, "c")):
        refused = said(verb)
        assert "wrapped in DistributedDataParallel" in refused
        assert "Inject into the model first, then wrap it" in refused
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_ddp_lets_train_what_trained_when_it_wrapped(one_rank: None) -> None:
    model = of_two_adapters()
    li.train_only(model, ["a", "b"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    for names in ("a", "b", None, ["a", "b"]):
        li.train_only(wrapped, names)
    other = of_two_adapters()  # another model, which no wrapper holds
    li.train_only(other, "a")
    del wrapped
    li.inject(model, {"rank": 2, "targets": ["0"]}, "c")
    li.train_only(model, "c")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_wrapped_for_activation_checkpointing(when: str, reentrant: bool) -> None:
    """The wrapper that sits between a module and its name, as FSDP users apply it."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

    how = torchs.CheckpointImpl.REENTRANT if reentrant else torchs.CheckpointImpl.NO_REENTRANT

    def wrap(model: nn.Module) -> None:
        torchs.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=partial(torchs.checkpoint_wrapper, checkpoint_impl=how),
            check_fn=lambda m: isinstance(m, nn.Sequential),
        )

    plain, config = nn.Sequential(two_layers(), two_layers()), {"targets": [r"\d\.0", r"1\.weight"]}
    wanted, model = filled(li.inject(copy.deepcopy(plain), config)), copy.deepcopy(plain)
    if when == "before":
        wrap(model)
    li.inject(model, config)
    if when == "after":
        wrap(model)
    li.swap_adapter(model, li.adapter_state(wanted))  # under names without the wrapper's part
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for each in (wanted, model):
        each(x).square().sum().backward()
    gradients = {key: p.grad for key, p in li.adapter_parameters(model).items()}
    same(gradients, {key: p.grad for key, p in li.adapter_parameters(wanted).items()})
    same(values(model), values(wanted))
    li.eject(model)
    assert torch.equal(model(x), plain(x))

"""Two processes: FSDP2, DistributedDataParallel and tensor parallelism against one process.

Each worker trains on its half of a batch and rank 0 writes down what came out; the test
trains the same model in one process on both halves and compares values. Both sides run in float64,
so that a delta counted twice or a gradient averaged wrongly cannot hide in rounding.
"""

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.models import tiny_llama
from helpers.refusals import said
from helpers.versions import FSDP2_ON_CPU, GLOO_TAKES_MEANS, needs_fsdp2
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD, STEPS = 2, 2
TARGETS = ["q_proj", r"o_proj\.weight", "embed_tokens", "down_proj"]
CONFIG = {"rank": 2, "alpha": 3.0, "targets": TARGETS, "train": [r"model\.norm"]}
FORWARD = {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "down_proj"]}
EVERY = {"rank": 2, "alpha": 3.0, "targets": ["all-linear"]}
IDS = torch.arange(4 * 6).view(4, 6) % 17


def build(config: dict[str, Any] = CONFIG, **changes: Any) -> Any:
    """A tiny Llama with an adapter whose tensors are all random, the same in every process."""
    model = li.inject(tiny_llama(initializer_range=0.2, **changes).double(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.3)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The unsharded values of a tensor, a copy."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def train(model: Any, wrapped: Any, batches: list[Tensor]) -> dict[str, Any]:
    """Two steps of SGD; what each came to. The losses of several batches are averaged."""
    parameters = li.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = torch.stack([wrapped(ids, labels=ids).loss for ids in batches]).mean()
        loss.backward()
        held = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        gradients.append({key: whole(gradient) for key, gradient in held.items()})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "gradients": gradients, "logits": logits(wrapped), **values(model)}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def values(model: Any) -> dict[str, Any]:
    state = li.adapter_state(model)
    tensors = {f"{k}.A": s.A for k, s in state.sites.items()}
    tensors |= {f"{k}.B": s.B for k, s in state.sites.items()}
    tensors |= state.trained
    return {"state": {key: whole(t) for key, t in tensors.items()}}


def mine(rank: int) -> Tensor:
    return IDS[2 * rank : 2 * rank + 2]


# ------------------------------------------------------------ what each process does


def fsdp(rank: int, model: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule

    shard(model)
    found = train(model, model, [mine(rank)])
    found["refused"] = {
        "merge": said(lambda: li.merge(model)),
        "inject": said(lambda: li.inject(model, FORWARD, "default")),
    }
    with li.disabled(model):
        found["base"] = logits(model)
    found["again"] = logits(model)
    keys = list(model.state_dict())
    found["refused"]["eject"] = said(lambda: li.eject(model))
    found["off"] = logits(li.activate(model, None))
    assert list(model.state_dict()) == keys
    found["sharded"] = {name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    return found


def fsdp_checkpointed(rank: int, model: Any) -> dict[str, Any]:
    checkpointed(model)
    return fsdp(rank, model)


def checkpointed(model: Any) -> None:
    with warnings.catch_warnings():
        # The name of this call changed within transformers 5.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.training


def ddp(rank: int, model: Any) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = train(model, wrapped, [mine(rank)])
    found["refused"] = {"inject": said(lambda: li.inject(wrapped, FORWARD, "b"))}
    found["names"] = sorted(li.adapters(wrapped))
    found["through"] = values(wrapped)["state"]
    with li.disabled(wrapped):
        found["base"] = logits(wrapped)
    li.merge(wrapped)
    found["merged"] = logits(wrapped)
    li.unmerge(wrapped)
    found["unmerged"] = logits(wrapped)
    found["off"] = logits(li.activate(wrapped, None))
    li.activate(wrapped, "default")
    found["ejected"] = logits(li.eject(wrapped))
    return found


def ddp_of_two(rank: int, model: Any, **options: Any) -> dict[str, Any]:
    """Two adapters of which both, or one, take part in every forward."""
    return train(model, nn.parallel.DistributedDataParallel(model, **options), [mine(rank)])


def ddp_static(rank: int, model: Any) -> dict[str, Any]:
    return ddp_of_two(rank, two_adapters(model), static_graph=True)


def ddp_unused(rank: int, model: Any) -> dict[str, Any]:
    model = two_adapters(model)
    li.activate(model, "default")
    return ddp_of_two(rank, model, find_unused_parameters=True)


def two_adapters(model: Any) -> Any:
    """Both train and are active, the second with numbers of its own."""
    li.inject(model, FORWARD | {"rank": 3}, "second")
    with torch.no_grad():
        for i, parameter in enumerate(li.adapter_parameters(model, "second").values()):
            parameter.copy_(torch.linspace(-0.1 * i, 0.2, parameter.numel()).view_as(parameter))
    li.activate(model, {"default": 1.0, "second": 0.5})
    li.train_only(model, ["default", "second"])
    return model


def shard(model: Any, shape: tuple[int, ...] = (WORLD,), **how: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    names = ("replicated", "sharded")[-len(shape) :]
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def fsdp_mixed(rank: int, model: Any) -> dict[str, Any]:
    """As people run it: a bfloat16 forward over float32 masters that wait in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    shard(model.float(), mp_policy=precision, offload_policy=offload)
    for module in () if GLOO_TAKES_MEANS else model.modules():  # what docs/guide says of torch 2.8
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    found = train(model, model, [mine(rank)])
    found["masters"] = {p.dtype for p in li.adapter_parameters(model).values()}
    return found


def fsdp_swapped(rank: int, model: Any) -> dict[str, Any]:
    """New values, files and distributed checkpoints of the adapter after the model was sharded."""
    import torch.distributed.checkpoint as dcp

    state = li.adapter_state(other_values(build()))
    wanted = li.adapter_state(model).fingerprint
    shard(model)
    logits(model)  # which leaves the root gathered
    li.swap_adapter(model, state)
    found = {"state": values(model)["state"], "logits": logits(model)}
    found["fingerprint"] = li.adapter_state(model).fingerprint == wanted
    elsewhere = li.adapter_state(li.inject(build(CONFIG).float().double(), CONFIG, "new"), "new")
    base = dataclasses.replace(elsewhere, fingerprint=other_base(wanted))
    found["refused"] = said(lambda: li.swap_adapter(model, base))
    folder = os.environ["DCP_FOLDER"]
    dcp.save({"adapter": li.adapter_parameters(model)}, checkpoint_id=folder)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.zero_()
    dcp.load({"adapter": li.adapter_parameters(model)}, checkpoint_id=folder)
    found["loaded"] = values(model)["state"]
    found["saved"] = str(li.save_adapter(model, f"{folder}/peft"))
    return found


def fsdp_loaded(
    rank: int, model: Any, *, late: bool = False, shape: tuple[int, ...] = (WORLD,)
) -> dict[str, Any]:
    """An adapter from files onto a model that was sharded, and maybe has run, before."""
    folder = f"{os.environ['DCP_FOLDER']}/loaded-{late}-{len(shape)}"
    if rank == 0:
        li.save_adapter(model, folder)
    dist.barrier()
    state = li.adapter_state(other_values(build()))
    shard(li.eject(model), shape)
    warnings.filterwarnings("error", "FSDP2-wrapped module")  # that returns a view
    if late:
        logits(model)  # after which FSDP2 knows its modules
    li.load_adapter(model, folder)
    found = {"loaded": values(model)["state"], "served": logits(model)}
    li.train_only(model, "default")
    held = li.adapter_parameters(model).values()
    found["local"] = {type(p.data).__name__ for p in held}
    found |= train(model, model, [mine(rank)])
    found["refused"] = said(lambda: li.load_adapter(model, folder, "second"))
    li.swap_adapter(model, state)
    found["swapped"] = values(model)["state"]
    return found


def fsdp_loaded_late(rank: int, model: Any) -> dict[str, Any]:
    return fsdp_loaded(rank, model, late=True)


def fsdp_loaded_replicated(rank: int, model: Any) -> dict[str, Any]:
    return fsdp_loaded(rank, model, shape=(WORLD, 1))


def other_values(model: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(li.adapter_parameters(model).values()):
            parameter.mul_(0.5).add_(0.01 * i)
    return model


def other_base(fingerprint: Any) -> Any:
    return dataclasses.replace(
        fingerprint, samples={k: tuple(2 * x for x in v) for k, v in fingerprint.samples.items()}
    )


def fsdp1(rank: int, model: Any) -> dict[str, Any]:
    """The older wrapper, whose parameters are views of one flat tensor while the model runs."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    how = {"auto_wrap_policy": policy, "device_id": torch.device("cpu")}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, **how)
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.1)
    for _ in range(STEPS):
        ids = mine(rank)
        wrapped(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {"refused": said(lambda: li.adapter_state(model))}
    found["inject"] = said(lambda: li.inject(wrapped, FORWARD, "second"))
    found["logits"] = logits(wrapped)
    with li.disabled(wrapped):
        found["base"] = logits(wrapped)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return found | values(model)


def fsdp1_checkpointed(rank: int, model: Any) -> dict[str, Any]:
    checkpointed(model)
    return fsdp1(rank, model)


SLICED = {"match": "gate_proj", "slices": {"a": 12, "b": 12}, "adapt": ["b"]}
TENSOR = {
    "rank": 2,
    "alpha": 3.0,
    "targets": ["embed_tokens", "q_proj", SLICED, r"up_proj\.weight", "down_proj"],
}


def tensor_parallel(rank: int, model: Any) -> dict[str, Any]:
    """Every process has the whole batch and a part of each layer."""
    from torch.distributed.tensor import parallel

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    columns, rows = parallel.ColwiseParallel, parallel.RowwiseParallel
    plan = {"gate_proj": columns(), "up_proj": columns(), "down_proj": rows()}
    for layer in model.model.layers:
        parallel.parallelize_module(layer.mlp, mesh, plan)
    table = rows(input_layouts=dist.tensor.Replicate())
    parallel.parallelize_module(model.model, mesh, {"embed_tokens": table})
    return train(model, model, [IDS])


def tp_plan(rank: int, model: Any) -> dict[str, Any]:
    """The plan of a model of transformers by torch's own styles, after the adapter."""
    from torch.distributed.tensor import parallel

    model = build(EVERY, num_key_value_heads=WORLD)
    state, folder = li.adapter_state(model), f"{os.environ['DCP_FOLDER']}/llama"
    if rank == 0:
        li.eject(model).save_pretrained(folder)
    dist.barrier()
    plain = li.install(type(model).from_pretrained(folder, dtype=torch.float64), state)
    li.train_only(plain, "default")
    styles = {"colwise": parallel.ColwiseParallel(), "rowwise": parallel.RowwiseParallel()}
    plan = {name: styles[how] for name, how in plain.config.base_model_tp_plan.items()}
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    parallel.parallelize_module(plain.model, mesh, plan)
    return train(plain, plain, [IDS])


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


def small() -> Small:
    torch.manual_seed(3)
    return Small().double()


def small_steps(model: nn.Module, forwards: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    parameters = li.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(STEPS):
        losses = [logits.square().mean() for logits in forwards()]
        (torch.stack(losses).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: whole(p) for key, p in parameters.items()}


def fsdp_on_meta(rank: int, model: Any) -> dict[str, Any]:
    """Inject on meta, shard, get memory, load the base: the order of large models."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {}
    for name, config in META.items():
        for way in ("distributed by hand", "by torch's own function"):
            with torch.device("meta"):
                model = li.inject(Small().double(), config)
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.to_empty(device="cpu")
            base = small().state_dict()
            refused = ""
            if way.startswith("distributed"):
                refused = said(lambda model=model: model(IDS))
                held = model.state_dict()
                shards = {
                    key: distribute_tensor(t, mesh, held[key].placements) for key, t in base.items()
                }
                model.load_state_dict(shards)
            else:
                options = StateDictOptions(full_state_dict=True, strict=False)
                set_model_state_dict(model, base, options=options)
            started = {key: whole(p) for key, p in li.adapter_parameters(model).items()}
            first = model(IDS).detach()
            li.swap_adapter(model, li.adapter_state(small_with(config)))
            trained = small_steps(model, lambda model=model: [model(mine(rank))])
            found[f"{name}, {way}"] = (refused, started, first, trained)
    return found


def small_with(config: dict[str, Any]) -> nn.Module:
    """The small model with an adapter whose tensors are all random."""
    model = li.inject(small(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def fsdp_state_dicts(rank: int, model: Any) -> dict[str, Any]:
    """Whole state dicts by torch's own functions, where they mean the same and where not."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as torchs
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))

    def sharded(alpha: int) -> nn.Module:
        made = small_with(META["lora"] | {"alpha": alpha})
        return fully_shard(made, mesh=mesh)

    source, folder = sharded(4), Path(os.environ["DCP_FOLDER"], "state dicts")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    dcp.save(torchs.get_model_state_dict(source), checkpoint_id=folder)
    whole_dict = torchs.StateDictOptions(full_state_dict=True)
    state = torchs.get_model_state_dict(source, options=whole_dict)
    results: dict[str, Any] = {"wanted": source(IDS).detach()}
    for alpha in (4, 6):  # texts of one length

        def in_place(model: nn.Module) -> None:
            state = model.state_dict()
            dcp.load(state, checkpoint_id=folder)
            model.load_state_dict(state)

        def whole_state(model: nn.Module) -> None:
            torchs.set_model_state_dict(model, dict(state), options=whole_dict)

        for load in (in_place, whole_state):
            model = sharded(alpha)
            words = said(lambda load=load, model=model: load(model))
            results[f"{load.__name__}, {alpha}"] = words, model(IDS).detach()
    return results


def saved_by_all(rank: int, model: Any) -> dict[str, Any]:
    """Every process saves, at once or later, or the first one alone."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(model, wrapped, [mine(rank)])
    place = Path(os.environ["DCP_FOLDER"], "saved by all")
    found: dict[str, Any] = {"wanted": values(model)["state"], "paths": []}

    def save(name: str, **options: Any) -> None:
        found["paths"].append(li.save_adapter(wrapped, place / name, **options))
        li.load_adapter(li.eject(copy.deepcopy(model)), found["paths"][-1])  # it is there, whole

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
    found["refused"] = said(lambda: save("in turn"))
    return found


JOBS = {
    "fsdp": (fsdp, CONFIG),
    "fsdp, checkpointed": (fsdp_checkpointed, CONFIG),
    "ddp, weight updates too": (ddp, CONFIG),
    "ddp, forward updates": (ddp, FORWARD),
    "static graph": (ddp_static, FORWARD),
    "unused": (ddp_unused, FORWARD),
    "mixed precision": (fsdp_mixed, CONFIG),
    "swapped": (fsdp_swapped, CONFIG),
    "loaded": (fsdp_loaded, CONFIG),
    "loaded late": (fsdp_loaded_late, CONFIG),
    "loaded, HSDP": (fsdp_loaded_replicated, CONFIG),
    "older wrapper": (fsdp1, CONFIG),
    "older wrapper, checkpointed": (fsdp1_checkpointed, CONFIG),
    "tensor parallel": (tensor_parallel, TENSOR),
    "tp_plan": (tp_plan, FORWARD),
    "saved by all": (saved_by_all, CONFIG),
    "on meta": (fsdp_on_meta, FORWARD),
    "state dicts": (fsdp_state_dicts, FORWARD),
}
OF_FSDP2 = {name for name, (run, _) in JOBS.items() if run.__name__.startswith("fsdp_")} | {"fsdp"}


def work(folder: Path) -> dict[str, Any]:
    os.environ["DCP_FOLDER"] = str(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        jobs = {name: job for name, job in JOBS.items() if FSDP2_ON_CPU or name not in OF_FSDP2}
        found = {name: run(dist.get_rank(), build(config)) for name, (run, config) in jobs.items()}
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    """What each of two processes found at all jobs; they start once."""
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


# ------------------------------------------------------------------------------------- the tests

# The norms and the softmax of a Llama are float32, and so are sums over two processes' halves of
# what passed through them: a few roundings of float32, of the largest value of each tensor.
TOLERANCE = 1e-5


def far(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for step in range(STEPS):
        assert found["gradients"][step].keys() == wanted["gradients"][step].keys()
        for key, gradient in wanted["gradients"][step].items():
            assert far(found["gradients"][step][key], gradient) < TOLERANCE, (step, key)
    assert found["state"].keys() == wanted["state"].keys()
    for key, tensor in wanted["state"].items():
        assert far(found["state"][key], tensor) < TOLERANCE, key
    assert far(found["logits"], wanted["logits"]) < TOLERANCE


def base_logits(model: Any) -> Tensor:
    with li.disabled(model):
        return logits(model)


@needs_fsdp2
@pytest.mark.parametrize("job", [job for job in JOBS if "fsdp" in job])
def test_a_sharded_model_trains_like_an_unsharded_one(job: str, ranks: Any) -> None:
    ranks = [rank[job] for rank in ranks]
    model = build()
    if "checkpointed" in job:
        checkpointed(model)
    first = values(model)["state"]
    wanted = train(model, model, [mine(0), mine(1)])
    assert all(far(t, first[key]) > 1e-4 for key, t in wanted["state"].items()), "it trained"
    assert {k.rpartition(".")[2] for k in wanted["state"]} == {"A", "B", "weight"}
    assert "model.layers.1.self_attn.o_proj.weight.A" in wanted["state"]
    for found in ranks:
        compare(found, wanted)
        assert far(found["again"], wanted["logits"]) < TOLERANCE
        for key in ("base", "off"):
            assert far(found[key], base_logits(model)) < TOLERANCE
        assert found["sharded"] == {"", "model.layers.0", "model.layers.1"}
        assert "fully_shard holds its tensors" in found["refused"]["eject"]
        assert found["refused"]["merge"].startswith("LayerError: ")
        assert "sharded" in found["refused"]["merge"]
        assert "the model has one of that name" in found["refused"]["inject"]
    both = [sum(r["losses"][i] for r in ranks) / WORLD for i in range(STEPS)]
    assert both == pytest.approx(wanted["losses"], rel=TOLERANCE)


@pytest.mark.parametrize("job", [job for job in JOBS if "ddp" in job])
def test_data_parallel_training_equals_one_process(job: str, ranks: Any) -> None:
    ranks = [rank[job] for rank in ranks]
    model = build(JOBS[job][1])
    wanted = train(model, model, [mine(0), mine(1)])
    for found in ranks:
        compare(found, wanted)
        assert found["names"] == ["default"]
        assert all(torch.equal(t, found["state"][key]) for key, t in found["through"].items())
        for key in ("base", "off", "ejected"):
            assert far(found[key], base_logits(model)) < TOLERANCE, key
        assert far(found["merged"], wanted["logits"]) < TOLERANCE
        assert torch.equal(found["unmerged"], found["logits"])
        assert found["refused"]["inject"].startswith("LayerError: adapter 'b'")
        assert "Inject into the model first, then wrap it" in found["refused"]["inject"]
    assert all(torch.equal(t, ranks[1]["state"][key]) for key, t in ranks[0]["state"].items())


@pytest.mark.parametrize("job", ["static graph", "unused", "tensor parallel"])
def test_what_is_spread_in_other_ways_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build(JOBS[job][1])
    if job != "tensor parallel":
        two_adapters(model)
    if job == "unused":
        li.activate(model, "default")
    wanted = train(model, model, [mine(0), mine(1)])
    for found in ranks:
        compare(found[job], wanted)


@pytest.mark.parametrize("job", [job for job in JOBS if "older" in job])
def test_fsdp1_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build()
    wanted = train(model, model, [mine(0), mine(1)])
    for found in (rank[job] for rank in ranks):
        assert found["state"].keys() == wanted["state"].keys()
        for key, tensor in wanted["state"].items():
            assert far(found["state"][key], tensor) < TOLERANCE, key
        assert far(found["logits"], wanted["logits"]) < TOLERANCE
        assert far(found["base"], base_logits(model)) < TOLERANCE
        assert "this process holds a shard of it" in found["refused"]
        assert "Inject or load first, then shard" in found["inject"]


@needs_fsdp2
def test_fsdp_in_bfloat16_with_offload_trains_as_near_as_bfloat16_is(ranks: Any) -> None:
    model = build().float()
    wanted = train(model, model, [mine(0), mine(1)])
    for found in (rank["mixed precision"] for rank in ranks):
        assert found["masters"] == {torch.float32}
        for key, gradient in wanted["gradients"][0].items():
            assert 0 < far(found["gradients"][0][key].float(), gradient.float()) < 0.1, key
        for key, tensor in wanted["state"].items():
            assert far(found["state"][key].float(), tensor.float()) < 0.02, key


@needs_fsdp2
@pytest.mark.parametrize("job", [job for job in JOBS if "loaded" in job])
def test_an_adapter_loaded_onto_shards_trains_like_one_process(job: str, ranks: Any) -> None:
    model = build()
    first, served = values(model)["state"], logits(model)
    wanted = train(model, model, [mine(0), mine(1)])
    other = values(other_values(build()))["state"]
    for found in (rank[job] for rank in ranks):
        assert found["loaded"].keys() == first.keys()
        assert all(torch.equal(found["loaded"][key], tensor) for key, tensor in first.items())
        assert far(found["served"], served) < TOLERANCE
        assert found["local"] == {"DTensor"}
        compare(found, wanted)
        assert all(torch.equal(found["swapped"][key], tensor) for key, tensor in other.items())
        assert "fully_shard was called with this very layer" in found["refused"]


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_adapter_is_swapped_saved_and_checkpointed_in_shards(ranks: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = other_values(build())
    wanted = values(model)["state"]
    for found in (rank["swapped"] for rank in ranks):
        for where in ("state", "loaded"):
            assert found[where].keys() == wanted.keys()
            assert all(torch.equal(found[where][k], t) for k, t in wanted.items()), where
        assert far(found["logits"], logits(model)) < TOLERANCE
        assert found["fingerprint"], "sampled from shards as from whole weights"
        assert "made on another base" in found["refused"]
        again = li.load_adapter(li.eject(build()), found["saved"])  # of that base: compared
        assert all(torch.equal(values(again)["state"][k], t) for k, t in wanted.items())
    fresh = build()  # one process reads what two have written
    dcp.load({"adapter": li.adapter_parameters(fresh)}, checkpoint_id=folder)
    assert all(torch.equal(values(fresh)["state"][k], t) for k, t in wanted.items())


def test_the_plan_of_transformers_may_come_after_the_adapter(ranks: Any) -> None:
    model = build(EVERY, num_key_value_heads=WORLD)
    wanted = train(model, model, [mine(0), mine(1)])
    for found in (rank["tp_plan"] for rank in ranks):
        compare(found, wanted)


@needs_fsdp2
def test_fsdp_with_meta_initialization_equals_one_process(ranks: Any) -> None:
    for name, config in META.items():
        model = small_with(config)
        wanted = small_steps(model, lambda model=model: [model(mine(0)), model(mine(1))])
        fresh = li.adapter_parameters(li.inject(small(), config))
        for way in ("distributed by hand", "by torch's own function"):
            one, two = (rank["on meta"][f"{name}, {way}"] for rank in ranks)
            for refused, started, first, trained in (one, two):
                asked = way.startswith("distributed")
                assert ("made on the meta device or emptied" in refused) == asked
                assert far(first, small()(IDS).detach()) < TOLERANCE
                assert started.keys() == fresh.keys()
                for key, parameter in fresh.items():
                    assert started[key].shape == parameter.shape
                    if not key.endswith(("lora_A", "lora_B")) or not parameter.any():
                        torch.testing.assert_close(started[key], parameter.detach())
                    else:
                        assert started[key].std() > 0
                        assert len(started[key].unique()) == started[key].numel()
                for key, tensor in wanted.items():
                    assert far(trained[key], tensor) < TOLERANCE, key
            assert all(torch.equal(one[1][key], two[1][key]) for key in fresh)


@needs_fsdp2
@pytest.mark.parametrize("way", ["in_place", "whole_state"])
def test_state_dicts_of_shards_say_what_their_adapters_mean(way: str, ranks: Any) -> None:
    for rank in ranks:
        results = rank["state dicts"]
        words, given = results[f"{way}, 4"]
        assert words == ""
        assert far(given, results["wanted"]) < TOLERANCE
        words, _ = results[f"{way}, 6"]
        assert "scale 2 in the state dict, and 3 here" in words


def test_whichever_process_saves_there_is_one_adapter(ranks: Any, folder: Path) -> None:
    first, *others = (rank["saved by all"] for rank in ranks)
    for path in first["paths"]:
        if path.exists():  # of versions some are kept
            state = li.read_adapter(path)
            tensors = dict(state.trained)
            for key, site in state.sites.items():
                tensors |= {f"{key}.{role}": tensor for role, tensor in site.tensors.items()}
            assert tensors.keys() == first["wanted"].keys()
            assert all(torch.equal(tensors[key], t) for key, t in first["wanted"].items())
    place = folder / "saved by all"
    assert not [path for path in place.rglob("*") if "tmp" in path.name]
    assert {path.name for path in (place / "versions").iterdir()} == {"18", "19", "LATEST"}
    for found in (first, *others):
        assert "another process wrote other values" in found["refused"]


def stage(folder: Path) -> None:
    """Rank 1 alone has the part of a pipeline that is sharded, and saves it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        mesh = DeviceMesh("cpu", [1])  # a new group: every process takes part in making it
        if dist.get_rank() == 1:
            model = build(FORWARD)
            fully_shard(model, mesh=mesh)
            li.save_adapter(model, folder / "stage")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_the_first_process_that_has_shards_writes_and_nobody_else_is_waited_for(
    forks: Forks, tmp_path: Path
) -> None:
    for rank in forks.start_ranks(WORLD, stage, tmp_path):
        rank.result()
    state, wanted = li.read_adapter(tmp_path / "stage"), li.adapter_state(build(FORWARD))
    assert state.sites.keys() == wanted.sites.keys()
    for key, site in wanted.sites.items():
        assert torch.equal(state.sites[key].B, site.B.to(state.sites[key].B.dtype))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_by_fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return model


def sharded_by_columns(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel()})


def sharded_by_fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, sync_module_states=False
    )


def sharded_by_zero3(model: nn.Module) -> nn.Module:
    """As DeepSpeed leaves a parameter: its shard elsewhere, its own data empty."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id = index
        parameter.data = torch.empty(0)
    return model


def stepped_by_zero2(model: nn.Module) -> nn.Module:
    """As DeepSpeed leaves the parameters that its optimizer knows: whole, with an attribute."""
    for parameter in model.parameters():
        parameter._hp_mapping = None  # type: ignore[attr-defined]
    return model


def spread_by_older_transformers(model: nn.Module) -> nn.Module:
    """As before 5.21: this process's part of each weight is a plain tensor."""
    model[0]._hf_tp_plan = "colwise"
    return model


SHARDINGS = [sharded_by_fsdp2, sharded_by_columns, sharded_by_fsdp1, sharded_by_zero3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shard", [*SHARDINGS[2:], stepped_by_zero2, spread_by_older_transformers]
)  # DTensors take one
def test_sharding_comes_after_injecting(shard: Any, one_rank: None) -> None:
    """An adapter that is put onto shards would train alone in each process."""
    rule = {"rank": 2, "alpha": 3.0, "targets": ["0"]}
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    state = li.adapter_state(li.inject(copy.deepcopy(plain), rule))
    model = shard(copy.deepcopy(plain))
    before = {name: (type(m), len(m._parameters)) for name, m in model.named_modules()}
    verbs = [lambda: li.inject(model, rule), lambda: li.install(model, state, base="any")]
    for verb in verbs:
        refused = said(verb)
        assert refused.startswith("LayerError: adapter 'default': ")
        assert "Inject or load first, then shard" in refused
    if shard is stepped_by_zero2:  # which knows an adapter, and not the frozen base
        carrier = li.inject(copy.deepcopy(plain), rule)
        for parameter in li.adapter_parameters(carrier).values():
            parameter._hp_mapping = None  # type: ignore[attr-defined]
        assert "DeepSpeed ZeRO" in said(lambda: li.inject(carrier, rule, "second"))
    assert {name: (type(m), len(m._parameters)) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_asked_of_a_shard_that_older_torch_refuses(
    training: bool, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.11 a DTensor has no product that is added in place."""
    from torch.distributed.tensor import DTensor

    rule = {"rank": 2, "alpha": 3.0, "targets": ["0"]}
    model = filled_with(nn.Sequential(nn.Linear(4, 6)), rule, "default").float().train(training)
    x = torch.randn(3, 4, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), x)
    asked: list[str] = []
    for name in ("addmm_", "addmv_", "baddbmm_"):
        monkeypatch.setattr(DTensor, name, lambda *_, name=name, **__: asked.append(name))
    sharded_by_columns(model)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x), wanted)
    with torch.no_grad():
        model(x[:1])
    assert asked == []


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.fc = kind(4, 4, num_layers=2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cells(x)[0]).tanh()


def filled_with(model: nn.Module, config: dict[str, Any], *names: str) -> nn.Module:
    for i, name in enumerate(names):
        li.inject(model, config, name)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in li.adapter_parameters(model, name).values():
                parameter.normal_()
    return model.double()


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("context", ["routed", "disabled", "none"])
@pytest.mark.parametrize("target", [r"\d", r"0\.weight"])
def test_the_first_forward_of_shards_may_be_in_a_context(
    target: str, context: str, one_rank: None
) -> None:
    """In it FSDP2 reads each weight, to keep its shard."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    whole = filled_with(plain, {"rank": 2, "targets": [target]}, "a", "b")
    model = copy.deepcopy(whole)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
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
        torch.testing.assert_close(run(model), run(whole))
    torch.testing.assert_close(model(x).tanh(), whole(x).tanh())


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_sharded_weights_of_a_recurrent_layer(
    kind: type[nn.RNNBase], apart: bool, one_rank: None
) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    rule = {"rank": 2, "targets": [r"weight_[ih]h_l\d", "fc"], "train": [r"bias_ih_l0"]}
    whole_model = filled_with(Recurrent(kind), rule, "default")
    model = copy.deepcopy(whole_model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    if apart:
        fully_shard(model.cells, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    for of in (whole_model, model):
        for _ in range(2):
            of(x).square().sum().backward()
    torch.testing.assert_close(model(x), whole_model(x))
    wanted = li.adapter_parameters(whole_model)
    for key, parameter in li.adapter_parameters(model).items():
        torch.testing.assert_close(whole(parameter.grad), wanted[key].grad), key


def test_what_fsdp2_cannot_shard_with_its_layer_is_not_loaded(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.ParameterList([torch.ones(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) @ self.c[0]

    def refused(target: str, sharded: str) -> str:
        state = li.adapter_state(li.inject(Net(), {"rank": 2, "targets": [target]}))
        net = Net()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(net.get_submodule(sharded), mesh=mesh)
        found = said(lambda: li.install(net, state, base="any"))
        assert "Inject or load the adapter first, then shard the model" in found
        assert said(lambda: li.inject(net, {"rank": 2, "targets": [target]})) == found
        assert not li.adapters(net)
        return found

    assert "'a': fully_shard was called with this very layer" in refused("a", "a")
    assert "'a': it is not sharded by fully_shard alone" in refused("a", "b")
    assert r"'c.0': it has no forward" in refused(r"c\.0", "")


def of_two_adapters() -> nn.Module:
    """Of which "b" trains."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
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
    verbs = [lambda: li.train_only(here, "a"), lambda: li.train_only(here, ["a", "b"])]
    assert all("reduces what trained when it wrapped" in said(verb) for verb in verbs)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", SHARDINGS)
def test_shards_are_not_taken_for_tensors(shard: Any, one_rank: None) -> None:
    """Inject, shard, then save and merge: the whole tensors, or an error."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    li.inject(model, {"rank": 2, "alpha": 3.0, "targets": ["0"], "train": ["1"]})
    shapes = {key: p.shape for key, p in li.adapter_parameters(model).items()}
    model = shard(model)
    if shard is not sharded_by_fsdp1:  # which with one process keeps tensors whole
        assert "shard" in said(lambda: li.merge(model))
    refused = said(lambda: li.adapter_state(model))
    if refused or shard is sharded_by_zero3:
        assert "this process holds a shard of it" in refused
        return
    state = li.adapter_state(model)
    found = {f"0.lora_{role}": t.shape for role, t in state.sites["0"].tensors.items()}
    assert found | {key: t.shape for key, t in state.trained.items()} == shapes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_wrapped_for_activation_checkpointing(when: str, reentrant: bool) -> None:
    """The wrapper that sits between a module and its name, as FSDP users apply it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    how = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)]
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def wrap(model: nn.Module) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=how),
            check_fn=lambda m: isinstance(m, nn.Sequential),
        )

    torch.manual_seed(0)
    plain = Net().double()
    config = {"rank": 2, "targets": [r"layers\.\d\.0", r"layers\.\d\.2\.weight"]}
    wanted = li.inject(copy.deepcopy(plain), config)
    model = copy.deepcopy(plain)
    if when == "before":
        wrap(model)
    li.inject(model, config)
    if when == "after":
        wrap(model)
    with torch.no_grad():
        source, target = li.adapter_parameters(wanted), li.adapter_parameters(model)
        assert source.keys() == target.keys(), "canonical names do not hold the wrapper's part"
        for key, parameter in source.items():
            target[key].copy_(parameter.normal_())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for m in (wanted, model):
        m(x).square().sum().backward()
    for key, parameter in source.items():
        assert torch.equal(target[key].grad, parameter.grad), key
    assert li.adapter_state(model).sites.keys() == li.adapter_state(wanted).sites.keys()
    li.eject(model)
    assert torch.equal(model(x), plain(x))

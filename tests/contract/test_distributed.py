"""Two processes: FSDP2, DistributedDataParallel and tensor parallelism against one process.

Each trains on its half of a batch, and alone on both halves, in float64, and compares values.
"""

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.models import tiny_llama
from helpers.ranks import far, filled, from_first, mesh, near, same, steps, values, whole
from helpers.refusals import refused, said
from helpers.versions import FSDP2_ON_CPU, GLOO_TAKES_MEANS, needs_fsdp2
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
TARGETS = ["q_proj", r"o_proj\.weight", "embed_tokens", "down_proj"]
CONFIG = {"rank": 2, "alpha": 3.0, "targets": TARGETS, "train": [r"model\.norm"]}
FORWARD = {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "down_proj"]}
FRESH = FORWARD | {"train": [r"model\.norm"]}
IDS = torch.arange(4 * 6).view(4, 6) % 17
# The norms and the softmax of a Llama are float32, and so are sums over two processes' halves of
# what passed through them: a few roundings of float32, of the largest value of each tensor.
TOLERANCE = 1e-5


def plain_llama(**changes: Any) -> Any:
    return tiny_llama(initializer_range=0.2, num_key_value_heads=WORLD, **changes).double()


def build(config: dict[str, Any] = CONFIG) -> Any:
    """A tiny Llama with an adapter whose tensors are all random, the same in every process."""
    return filled(li.inject(plain_llama(), config))


def other_values(model: Any) -> Any:
    return filled(model, std=1.0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.clone()


def base_logits(model: Any) -> Tensor:
    with li.disabled(model):
        return logits(model)


def losses(model: Any, *batches: Tensor) -> Callable[[], Tensor]:
    """The mean of the loss of each batch, as several processes take it."""
    return lambda: torch.stack([model(ids, labels=ids).loss for ids in batches]).mean()


def mine() -> Tensor:
    return IDS.chunk(WORLD)[dist.get_rank()]


def check_trains_alike(model: Any, wrapped: Any, plain: Any, *batches: Tensor) -> None:
    """The gradients of the first step, the values of the last and the outputs are one process's."""
    before = values(plain)
    gradients = steps(model, losses(wrapped, *(batches or (mine(),))))
    near(gradients, steps(plain, losses(plain, *IDS.chunk(WORLD))), TOLERANCE)
    near(values(model), values(plain), TOLERANCE)
    assert all(far(t, before[key]) > 1e-4 for key, t in values(plain).items()), "it trains"
    assert far(logits(wrapped), logits(plain)) < TOLERANCE


def sharded(model: Any, *layers: nn.Module, on: Any = None, **how: Any) -> Any:
    """By FSDP2: each layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    on = mesh(dist.get_world_size()) if on is None else on
    for module in (*layers, model):
        fully_shard(module, mesh=on, **how)
    return model


def by_fsdp2(model: Any, **how: Any) -> Any:
    return sharded(model, *model.model.layers, **how)


def by_fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    how = {"auto_wrap_policy": policy, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(model, use_orig_params=True, **how)


def by_columns_and_rows(model: Any) -> Any:
    """The plan of transformers' config: a part of most layers."""
    from torch.distributed.tensor import parallel

    styles = {"colwise": parallel.ColwiseParallel, "rowwise": parallel.RowwiseParallel}
    plan = {name: styles[how]() for name, how in model.config.base_model_tp_plan.items()}
    plan["embed_tokens"] = parallel.RowwiseParallel(input_layouts=dist.tensor.Replicate())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parallel.parallelize_module(model.model, mesh(WORLD), plan)
    for name, parameter in model.named_parameters():  # before torch 2.9 all of them train again
        parameter.requires_grad_(name not in frozen)
    return model


def checkpointed(model: Any) -> Any:
    with warnings.catch_warnings():
        # The name of this call changed within transformers 5.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def two_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).double()


RULE = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


# -------------------------------------------------------------------------------------- training


def fsdp2_trains(folder: Path, prepare: Callable[[Any], Any] = nn.Module.train) -> None:
    model, plain = by_fsdp2(prepare(build())), build()
    check_trains_alike(model, model, plain)
    with refused(li.LoraInjectError, "shard"):
        li.merge(model)
    with refused(li.LoraInjectError, "'default'"):
        li.inject(model, FORWARD, "default")
    assert far(base_logits(model), base_logits(plain)) < TOLERANCE
    assert far(logits(model), logits(plain)) < TOLERANCE
    with refused(li.LoraInjectError, "fully_shard"):
        li.eject(model)
    assert far(logits(li.activate(model, None)), base_logits(plain)) < TOLERANCE


def fsdp2_in_bfloat16_with_offload(folder: Path) -> None:
    """As people run it: a bfloat16 forward over float32 masters that wait in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

    model, plain = build().float(), build().float()
    how = {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
    }
    by_fsdp2(model, **how)
    for module in () if GLOO_TAKES_MEANS else model.modules():  # what docs/guide says of torch 2.8
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    gradients = steps(model, losses(model, mine()))
    near(gradients, steps(plain, losses(plain, *IDS.chunk(WORLD))), 0.1)
    near(values(model), values(plain), 0.05)
    assert {tensor.dtype for tensor in values(model).values()} == {torch.float32}


def fsdp1_trains(folder: Path) -> None:
    """The older wrapper, whose parameters are views of one flat tensor while the model runs."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, plain = checkpointed(build()), build()
    wrapped = by_fsdp1(model)
    steps(model, losses(wrapped, mine()))
    steps(plain, losses(plain, *IDS.chunk(WORLD)))
    assert far(logits(wrapped), logits(plain)) < TOLERANCE
    assert far(base_logits(wrapped), base_logits(plain)) < TOLERANCE
    with refused(li.LoraInjectError, "shard"):
        li.adapter_state(model)
    with refused(li.LoraInjectError, "'second'", "shard"):
        li.inject(wrapped, FORWARD, "second")
    with FullyShardedDataParallel.summon_full_params(wrapped):
        near(values(model), values(plain), TOLERANCE)


def ddp_trains(folder: Path) -> None:
    model, plain = build(), build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    check_trains_alike(model, wrapped, plain)
    same(values(model), from_first(values(wrapped)))
    with refused(li.LoraInjectError, "'b'", "wrap"):
        li.inject(wrapped, FORWARD, "b")
    assert list(li.adapters(wrapped)) == ["default"]
    adapted, base = logits(wrapped), base_logits(plain)
    assert far(base_logits(wrapped), base) < TOLERANCE
    li.merge(wrapped)
    assert far(logits(wrapped), adapted) < TOLERANCE
    li.unmerge(wrapped)
    assert torch.equal(logits(wrapped), adapted)
    assert far(logits(li.activate(wrapped, None)), base) < TOLERANCE
    li.activate(wrapped, "default")
    assert far(logits(li.eject(wrapped)), base) < TOLERANCE


MIX = {"default": 1.0, "second": 0.5}


def ddp_trains_two_adapters(folder: Path, active: Any, **options: Any) -> None:
    """Of which both, or one, take part in every forward."""

    def two() -> Any:
        model = li.inject(build(FORWARD), FORWARD | {"rank": 3}, "second")
        li.activate(filled(model, "second", std=0.1), active)
        li.train_only(model, ["default", "second"])
        return model

    model = two()
    check_trains_alike(model, nn.parallel.DistributedDataParallel(model, **options), two())


SLICED = {"match": "gate_proj", "slices": {"a": 12, "b": 12}, "adapt": ["b"]}
PARTS = FORWARD | {
    "targets": ["embed_tokens", "q_proj", SLICED, r"up_proj\.weight", "down_proj", "lm_head"]
}


def tensor_parallel_trains(folder: Path) -> None:
    model = by_columns_and_rows(build(PARTS))
    check_trains_alike(model, model, build(PARTS), IDS)


def a_fresh_adapter_on_shards_trains(folder: Path) -> None:
    """Each process draws other numbers, and all start with those of the first one."""
    model, plain = by_fsdp2(plain_llama()), plain_llama()
    logits(model)
    torch.manual_seed(dist.get_rank())
    li.inject(model, FRESH)
    torch.manual_seed(0)
    li.inject(plain, FRESH)
    same(values(model), values(plain))
    assert all(hasattr(p, "full_tensor") for p in li.adapter_parameters(model).values())
    steps(model, losses(model, mine()))
    steps(plain, losses(plain, *IDS.chunk(WORLD)))
    near(values(model), values(plain), TOLERANCE)


# ------------------------------------------------------------------ files, swaps and state dicts


def fsdp2_swaps_saves_and_checkpoints(folder: Path) -> None:
    """New values, files and distributed checkpoints of the adapter after the model was sharded."""
    import torch.distributed.checkpoint as dcp

    model, plain = build(), other_values(build())
    state, fingerprint = li.adapter_state(plain), li.adapter_state(model).fingerprint
    by_fsdp2(model)
    logits(model)  # which leaves the root gathered
    li.swap_adapter(model, state)
    same(values(model), values(plain))
    assert far(logits(model), logits(plain)) < TOLERANCE
    assert li.adapter_state(model).fingerprint == fingerprint, "from shards as from whole weights"
    doubled = {
        name: known._replace(values=tuple(2 * x for x in known.values))
        for name, known in fingerprint.items()
    }
    foreign = dataclasses.replace(state, fingerprint=doubled)
    with refused(li.LoraInjectError, "another base"):
        li.swap_adapter(model, foreign)
    dcp.save({"adapter": li.adapter_parameters(model)}, checkpoint_id=folder / "dcp")
    again = build()  # of whole tensors
    dcp.load({"adapter": li.adapter_parameters(again)}, checkpoint_id=folder / "dcp")
    same(values(again), values(plain))
    li.save_adapter(model, folder / "swapped")
    again = li.load_adapter(li.eject(build()), folder / "swapped")  # of that base: compared
    same(values(again), values(plain))


def fsdp2_loads(folder: Path, *, late: bool = False, shape: tuple[int, ...] = (WORLD,)) -> None:
    """An adapter from files onto a model that was sharded, and maybe has run, before."""
    model, plain, path = plain_llama(), build(), folder / f"loaded-{late}-{len(shape)}"
    li.save_adapter(plain, path)
    by_fsdp2(model, on=mesh(*shape))
    warnings.filterwarnings("error", "FSDP2-wrapped module")  # that returns a view
    if late:
        logits(model)  # after which FSDP2 knows its modules
    li.load_adapter(model, path)
    same(values(model), values(plain))
    assert far(logits(model), logits(plain)) < TOLERANCE
    li.train_only(model, "default")
    check_trains_alike(model, model, plain)
    with refused(li.LoraInjectError, "'second'", "fully_shard"):
        li.load_adapter(model, path, "second")


def a_stage_saves_its_shards(folder: Path) -> None:
    """Rank 1 alone has the part of a pipeline that is sharded, and nobody is waited for."""
    from torch.distributed.device_mesh import DeviceMesh

    alone = DeviceMesh("cpu", [1])  # a new group: every process takes part in making it
    if dist.get_rank() == 1:
        li.save_adapter(sharded(build(FORWARD), on=alone), folder / "stage")
    dist.barrier()
    same(values(li.read_adapter(folder / "stage")), values(build(FORWARD)))


def whoever_saves_there_is_one_adapter(folder: Path) -> None:
    """Every process saves at once."""
    model, place = build(), folder / "saved by all"
    wrapped = nn.parallel.DistributedDataParallel(model)
    steps(model, losses(wrapped, mine()))
    wanted = from_first(values(model))

    def save(name: str, **options: Any) -> None:
        path = li.save_adapter(wrapped, place / name, **options)
        same(values(li.load_adapter(li.eject(copy.deepcopy(model)), path)), wanted)

    for attempt in range(6):
        dist.barrier()
        save(f"at once {attempt}")
        save(f"native {attempt}.safetensors", format="native")
    dist.barrier()
    assert not [path for path in place.rglob("*") if "tmp" in path.name]
    with torch.no_grad():
        li.adapter_parameters(model)["model.norm.weight"].add_(dist.get_rank() + 1)
    with refused(li.LoraInjectError, "at once 0"):
        save("at once 0")


META: dict[str, Any] = {
    "lora": {"rank": 2, "targets": ["2", "4", "0"], "train": ["1"]},
    "read": {"rank": 2, "targets": [r"[24]\.weight"], "tokens": {"0": [1, 2]}},
    "dora": {"rank": 2, "targets": ["2", "4"], "variant": "dora"},
}


def small(config: dict[str, Any] | None = None) -> Any:
    """Without buffers, which `to_empty` empties and no state dict has; FSDP2 wants no view."""
    torch.manual_seed(3)
    layers = [nn.Embedding(17, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 17)]
    model = nn.Sequential(*layers, nn.Tanh()).double()
    return filled(li.inject(model, config)) if config else model


def fsdp2_on_meta(folder: Path, config: dict[str, Any]) -> None:
    """Inject on meta, shard, get memory, load the base: the order of large models."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = li.inject(small(), config)
    sharded(model, model[2], model[4]).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, small().state_dict(), options=options)
    assert far(model(IDS), small()(IDS)) < TOLERANCE
    started = {key: whole(p) for key, p in li.adapter_parameters(model).items()}
    same(started, from_first(started))
    for key, parameter in li.adapter_parameters(li.inject(small(), config)).items():
        assert started[key].shape == parameter.shape
        if not key.endswith(("lora_A", "lora_B")) or not parameter.any():
            torch.testing.assert_close(started[key], parameter.detach())
        else:
            assert len(started[key].unique()) == started[key].numel()
    plain = small(config)
    li.swap_adapter(model, li.adapter_state(plain))
    steps(model, lambda: model(mine()).square().mean())
    steps(plain, lambda: plain(IDS).square().mean())
    near(values(model), values(plain), TOLERANCE)


def state_dicts_of_shards_say_what_they_mean(folder: Path) -> None:
    """By torch's own functions: loaded where they mean the same, else refused."""
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

    for load in (in_place, at_once):
        target, other = model(4), model(6)  # texts of one length
        load(target)
        assert far(target(IDS), source(IDS)) < TOLERANCE
        with refused(li.LoraInjectError, "scale 2", "3"):
            load(other)


# --------------------------------------------------------------------------- what a server gets

EVERY = {"rank": 2, "alpha": 3.0, "targets": ["all-linear", "embed_tokens", "lm_head"]}
SENT = {
    "bfloat16": (EVERY, torch.bfloat16),
    "read": (
        EVERY | {"targets": [r"up_proj\.weight", "lm_head"], "train": [r"model\.norm"]},
        torch.float64,
    ),
    "dora": (EVERY | {"variant": "dora", "targets": ["all-linear", "lm_head"]}, torch.float64),
}


def peft_state_is_gathered(folder: Path, shard: Callable[[Any], Any]) -> None:
    """On every rank, or on the first alone."""
    model, plain = shard(build(EVERY)), build(EVERY)
    for options in ({}, {"portable": True}):
        tensors, config = li.peft_state(model, **options)
        due, due_config = li.peft_state(plain, **options)
        same(tensors, due)
        assert config == due_config
    first, _ = li.peft_state(model, first_only=True)
    same(first, li.peft_state(plain)[0] if dist.get_rank() == 0 else {})


def merged_weights_are_gathered(folder: Path, shard: Callable[[Any], Any], case: str) -> None:
    """Of a mix and of one adapter, with what rounding kept; and the model stays as it was."""
    config, dtype = SENT[case]

    def two() -> Any:
        """A second adapter is active with the first one, unless that has a gain."""
        model = build(config).to(dtype)
        if case != "dora":
            second = li.inject(model, {"rank": 3, "targets": ["gate_proj"]}, "second")
            li.activate(filled(second, "second"), {"default": 0.5, "second": 1.0})
        return model

    model, plain = shard(two()), two()
    before = {name: whole(p) for name, p in model.named_parameters()}
    kept: list[dict[str, float]] = [{}, {}]
    for options in ({}, {"name": "default"}):
        sent, due = (
            {n: t.clone() for n, t in li.merged_weights(m, kept=k, **options)}
            for m, k in zip((model, plain), kept, strict=True)
        )
        same(sent, due)
    assert kept[0] == kept[1]
    assert bool(kept[0]) == (dtype is torch.bfloat16)
    same(before, {name: whole(p) for name, p in model.named_parameters()})


def what_cannot_be_gathered_is_refused_by_every_process(folder: Path) -> None:
    """A NaN in the shard of one process is seen by all, and none waits for another."""
    model = by_fsdp2(build())
    words = [said(lambda: li.merged_weights(li.activate(model, None)))]
    li.activate(model, "default")
    words += [said(lambda: li.merged_weights(model, dequantize="bfloat16"))]
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.mul_(float("nan") if dist.get_rank() == 0 else 1.0)
    words += [said(lambda: dict(li.merged_weights(model)))]
    tenants = {"ann": li.Trial({"rank": 2, "targets": ["q_proj"]}, lr=1e-2)}
    plain = by_fsdp2(plain_llama())
    words += [said(lambda: li.Trials(plain, tenants))]
    assert not li.adapters(plain)
    assert words == from_first(words)
    names = ("no adapter", "dequantized", "NaN", "'model.embed_tokens.weight'")
    assert all(name in each for name, each in zip(names, words, strict=True))


# ------------------------------------------------------------ what FSDP2 is told, and what it lacks

EACH = RULE | {"targets": [r"\d"]}


def x() -> Tensor:
    return torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)


def gradients_are_divided_as_the_base_s(folder: Path) -> None:
    model = sharded(two_layers())
    model.set_gradient_divide_factor(1.0)
    filled(li.inject(model, EACH))
    plain = filled(li.inject(two_layers(), EACH))
    for each, inputs in ((model, x().chunk(WORLD)[dist.get_rank()]), (plain, x())):
        each(inputs).square().sum().backward()
    gradients = {key: whole(p.grad) for key, p in li.adapter_parameters(model).items()}
    near(gradients, {key: p.grad for key, p in li.adapter_parameters(plain).items()}, 1e-12)


def the_policy_is_the_base_s(folder: Path, *, late: bool) -> None:
    """A and B are gathered in the dtype of the base's policy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, seen = two_layers().float(), set[torch.dtype]()
    verbs = [
        lambda: filled(li.inject(model, EACH)),
        lambda: sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    ]
    for verb in reversed(verbs) if late else verbs:
        verb()
    model[0].register_forward_pre_hook(
        lambda layer, _: seen.update(p.dtype for p in layer._parameters.values())
    )
    model(x().float())
    assert seen == {torch.bfloat16}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0].tanh()


def what_a_parent_reads_is_refused(folder: Path) -> None:
    for more in ({}, {"bias": "adapted"}):
        model = sharded(Attends().double())
        with refused(li.LayerError, "attention.out_proj", "shard"):
            li.inject(model, RULE | {"targets": ["out_proj"], **more})
        model(x()[None])  # it is as it was


def single_tokens_are_refused_on_columns_and_rows(folder: Path, *, late: bool) -> None:
    from torch.distributed.tensor import Replicate, parallel

    tokens = {"rank": 2, "targets": [], "tokens": {"0": [1, 5]}}
    model = nn.Sequential(nn.Embedding(8, 4)).double()
    if not late:
        li.inject(model, tokens)
    plan = {"0": parallel.RowwiseParallel(input_layouts=Replicate())}
    parallel.parallelize_module(model, mesh(WORLD), plan)
    with refused(li.LayerError, "fully_shard"):
        li.inject(model, tokens) if late else model(torch.arange(8)[None])


SHARDINGS = {"FSDP2": by_fsdp2, "columns and rows": by_columns_and_rows}
JOBS: dict[str, Callable[[Path], None]] = {
    **{f"FSDP2 on meta: {name}": partial(fsdp2_on_meta, config=c) for name, c in META.items()},
    "FSDP2": fsdp2_trains,
    "FSDP2, checkpointed": partial(fsdp2_trains, prepare=checkpointed),
    "FSDP2 in bfloat16 with offload": fsdp2_in_bfloat16_with_offload,
    "FSDP2: a fresh adapter": a_fresh_adapter_on_shards_trains,
    "FSDP2: swap, save, checkpoint": fsdp2_swaps_saves_and_checkpoints,
    "FSDP2: load": fsdp2_loads,
    "FSDP2: load late": partial(fsdp2_loads, late=True),
    "FSDP2: load onto copies of shards": partial(fsdp2_loads, shape=(WORLD, 1)),
    "FSDP2: a stage saves": a_stage_saves_its_shards,
    "FSDP2: state dicts": state_dicts_of_shards_say_what_they_mean,
    "FSDP2: refusals": what_cannot_be_gathered_is_refused_by_every_process,
    "FSDP2: the divisor": gradients_are_divided_as_the_base_s,
    "FSDP2: a layer that its parent reads": what_a_parent_reads_is_refused,
    "FSDP1, checkpointed": fsdp1_trains,
    "DDP": ddp_trains,
    "DDP, static graph": partial(ddp_trains_two_adapters, active=MIX, static_graph=True),
    "DDP, unused": partial(ddp_trains_two_adapters, active="default", find_unused_parameters=True),
    "tensor parallel": tensor_parallel_trains,
    "whoever saves": whoever_saves_there_is_one_adapter,
}
for order, late in (("inject first", False), ("shard first", True)):
    JOBS[f"FSDP2: the policy, {order}"] = partial(the_policy_is_the_base_s, late=late)
    tokens = partial(single_tokens_are_refused_on_columns_and_rows, late=late)
    JOBS[f"FSDP2 is the remedy for single tokens, {order}"] = tokens
for how, shard in SHARDINGS.items():
    JOBS[f"{how}: PEFT's tensors"] = partial(peft_state_is_gathered, shard=shard)
    for case in SENT:
        gathered = partial(merged_weights_are_gathered, shard=shard, case=case)
        JOBS[f"{how}: merged weights, {case}"] = gathered
JOBS = {name: job for name, job in JOBS.items() if FSDP2_ON_CPU or "FSDP2" not in name}


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_come_to_what_one_does(job: str, failed: dict[str, str]) -> None:
    assert not failed[job], failed[job]


# ------------------------------------------------------------- what one process is enough to see


def flattened_by_fsdp1(model: nn.Module) -> nn.Module:
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
        parameter._hp_mapping = None
    return model


def spread_by_older_transformers(model: nn.Module) -> nn.Module:
    """As before 5.21: this process's part of each weight is a plain tensor."""
    model[0]._hf_tp_plan = "colwise"
    return model


def second_alone(model: nn.Module) -> nn.Module:
    """FSDP2 could not shard an adapter with the first layer."""
    sharded(model[1])
    return model


def by_columns(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import parallel

    return parallel.parallelize_module(model, mesh(1), {"0": parallel.ColwiseParallel()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shard",
    [
        flattened_by_fsdp1, sharded_by_zero3, stepped_by_zero2, spread_by_older_transformers,
        by_columns, pytest.param(second_alone, marks=needs_fsdp2),
    ],
)  # fmt: skip
def test_sharding_comes_after_injecting(shard: Any, one_rank: None) -> None:
    """An adapter that is put onto shards would train alone in each process."""
    state, model = li.adapter_state(li.inject(two_layers(), RULE)), shard(two_layers())
    before = {name: (type(m), len(m._parameters)) for name, m in model.named_modules()}
    for verb in (lambda: li.inject(model, RULE), lambda: li.install(model, state, base="any")):
        with refused(li.LayerError, "'default'", "nject or load"):
            verb()
    assert {name: (type(m), len(m._parameters)) for name, m in model.named_modules()} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [sharded, flattened_by_fsdp1, sharded_by_zero3])
def test_shards_are_not_taken_for_tensors(shard: Any, one_rank: None) -> None:
    """Inject, shard, then save and merge: the whole tensors, or an error."""
    model = li.inject(two_layers(), RULE | {"train": ["1"]})
    shapes = {key: tensor.shape for key, tensor in values(model).items()}
    shard(model)
    if shard is not flattened_by_fsdp1:  # which with one process keeps tensors whole
        with refused(li.LoraInjectError, "shard"):
            li.merge(model)
    if words := said(lambda: li.adapter_state(model)):
        assert "shard" in words
    else:
        assert shard is not sharded_by_zero3
        assert {key: tensor.shape for key, tensor in values(model).items()} == shapes


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_gathered_without_its_base_is_not_read(one_rank: None) -> None:
    """Its file would say that it was made on a base of shards, and fit no other."""
    model = li.inject(two_layers(), RULE)
    whole = {key: p.data for key, p in li.adapter_parameters(model).items()}
    sharded_by_zero3(model)
    for key, parameter in li.adapter_parameters(model).items():
        parameter.data = whole[key]
    with refused(li.LoraInjectError, "'0.weight'", "GatheredParameters(list(model.parameters()))"):
        li.adapter_state(model)


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    ("target", "routes"), [(r"\d", True), (r"\d", False), (r"0\.weight", False)]
)
def test_the_first_forward_of_shards_may_be_in_a_context(
    target: str, routes: bool, one_rank: None
) -> None:
    """In it FSDP2 reads each weight, to keep its shard."""
    plain = two_layers()
    for name in "ab":
        filled(li.inject(plain, {"rank": 2, "targets": [target]}, name), name)
    model = copy.deepcopy(plain)
    sharded(model, *model)

    def run(of: nn.Module) -> Tensor:
        with li.routed(of, ["a", "b", None] * 2) if routes else li.disabled(of):
            return of(x()).tanh()

    torch.testing.assert_close(run(model), run(plain))
    torch.testing.assert_close(model(x()).tanh(), plain(x()).tanh())


def of_two_adapters() -> nn.Module:
    """Of which "b" trains."""
    model = two_layers()
    for name in "ab":
        li.inject(model, {"rank": 2, "targets": [r"\d"]}, name)
    return model


@pytest.mark.parametrize("inside", [False, True])
def test_what_ddp_would_not_reduce_is_refused(inside: bool, one_rank: None, tmp_path: Path) -> None:
    """It reduces what trained when it wrapped the model; the rest would differ in each process."""
    model = of_two_adapters()
    wrapped = nn.parallel.DistributedDataParallel(model)
    here = model if inside else wrapped
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for names in ("a", ["a", "b"]):
        with refused(li.LoraInjectError, "wrap"):
            li.train_only(here, names)
    state, path = li.adapter_state(model, "a"), li.save_adapter(model, tmp_path / "a", "a")
    rule = {"rank": 2, "targets": ["0"]}
    for verb in (
        lambda: li.inject(here, rule, "c"),
        lambda: li.load_adapter(here, path, "c", trainable=True),
    ):
        with refused(li.LoraInjectError, "'c'", "wrap"):
            verb()
    li.load_adapter(here, path, "c")  # which has no gradients to reduce
    li.install(here, state, "d")
    wrapped(x()).square().mean().backward()
    with refused(li.LoraInjectError, "'c'", "wrap"):
        li.train_only(here, "c")
    for name in "cd":
        li.eject(here, name)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_ddp_lets_train_what_trained_when_it_wrapped(one_rank: None) -> None:
    model = of_two_adapters()
    li.train_only(model, ["a", "b"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    for names in ("a", "b", None, ["a", "b"]):
        li.train_only(wrapped, names)
    li.train_only(of_two_adapters(), "a")  # another model, which no wrapper holds
    del wrapped
    li.train_only(li.inject(model, RULE, "c"), "c")


@pytest.mark.parametrize("how", ["REENTRANT", "NO_REENTRANT"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_wrapped_for_activation_checkpointing(when: str, how: str) -> None:
    """The wrapper that sits between a module and its name, as FSDP users apply it."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

    def wrap(model: nn.Module) -> None:
        wrapper = partial(torchs.checkpoint_wrapper, checkpoint_impl=torchs.CheckpointImpl[how])
        which = {"check_fn": lambda m: isinstance(m, nn.Sequential)}
        torchs.apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, **which)

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


@needs_fsdp2
@pytest.mark.parametrize("order", ["inject first", "shard first"])
def test_a_sharded_model_goes_with_its_last_reference(order: str, one_rank: None) -> None:
    gone = list[weakref.ref[Any]]()
    for _ in range(10):
        model = two_layers()
        if order == "inject first":
            sharded(li.inject(model, EACH), *model)
        else:
            li.inject(sharded(model), EACH)
        model(x()).square().sum().backward()
        li.activate(model, "default")
        gone += [weakref.ref(each) for each in (model, *model.parameters())]
        del model
        gc.collect()
        assert not any(ref() is not None for ref in gone)


@needs_fsdp2
def test_what_an_adapter_moves_is_sampled_of_shards_too(one_rank: None) -> None:
    """Else its own merged base passes for its base."""
    marks = []
    for shard in (sharded, lambda model: model):
        torch.manual_seed(0)
        model = li.inject(nn.Sequential(nn.Embedding(64, 8)), {"rank": 2, "targets": ["0"]})
        with torch.no_grad():
            for parameter in li.adapter_parameters(model).values():
                parameter.copy_(torch.eye(*parameter.shape))  # it moves two tokens
        marks.append(li.adapter_state(shard(model)).fingerprint)
    assert marks[0] == marks[1]
    assert marks[0]["0.weight"].moved


@needs_fsdp2
@pytest.mark.parametrize(
    ("rule", "gathered"),
    [({}, 0), ({"init": "gaussian"}, 0), ({"init": "pissa"}, 1), ({"variant": "dora"}, 1)],
    ids=str,
)
def test_inject_after_fully_shard_gathers_what_its_start_is_made_of(
    rule: dict[str, Any], gathered: int, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model each W would be once whole in each process."""
    model, calls = nn.Sequential(two_layers()), []
    sharded(model)
    cls: Any = dist.tensor.DTensor
    whole = cls.full_tensor
    monkeypatch.setattr(cls, "full_tensor", lambda t, **how: calls.append(t) or whole(t, **how))
    li.inject(model, RULE | rule | {"targets": [r"0\.0"]})
    assert len(calls) == gathered

"""Models that are spread over processes: two of them against one, and what lives on in one."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import far, filled, mesh, whole
from helpers.refusals import refused
from helpers.versions import needs_fsdp2
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
CONFIG = {"rank": 2, "alpha": 3.0, "targets": [r"\d"]}


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).double()


def x() -> Tensor:
    return torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)


def shard(model: nn.Module, **how: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer, mesh=mesh(dist.get_world_size()), **how)
    return fully_shard(model, mesh=mesh(dist.get_world_size()), **how)


def grads(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model(inputs).square().sum().backward()
    return {key: whole(p.grad) for key, p in li.adapter_parameters(model).items()}


def block(model: nn.Module, **how: Any) -> Any:
    """The same by one group for all layers, which are no groups of their own."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh(dist.get_world_size()), **how)


def gradients_are_divided_as_the_base_s(folder: Path) -> None:
    model = block(two_layers())
    model.set_gradient_divide_factor(1.0)
    filled(li.inject(model, CONFIG))
    got = grads(model, x().chunk(WORLD)[dist.get_rank()])
    wanted = grads(filled(li.inject(two_layers(), CONFIG)), x())
    for key, gradient in wanted.items():
        assert far(got[key], gradient) < 1e-12, key


def the_policy_is_the_base_s(folder: Path) -> None:
    """A and B are gathered in the dtype of the base's policy, in either order."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for late in (True, False):
        model, seen = two_layers().float(), set[torch.dtype]()
        if not late:
            filled(li.inject(model, CONFIG))
        block(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        if late:
            filled(li.inject(model, CONFIG))
        model[0].register_forward_pre_hook(
            lambda layer, _: seen.update(p.dtype for p in layer._parameters.values())  # noqa: B023
        )
        model(x().float())
        assert seen == {torch.bfloat16}, late


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0]


def what_a_parent_reads_is_refused(folder: Path) -> None:
    config = {"rank": 2, "alpha": 3.0, "targets": [r"out_proj"]}
    for more in ({}, {"bias": "adapted"}):
        model = block(Attends().double())
        with refused(li.LayerError, "attention.out_proj", "shard"):
            li.inject(model, config | more)
        model(x()[None])  # it is as it was


def single_tokens_are_refused_in_either_order(folder: Path) -> None:
    from torch.distributed.tensor import Replicate, parallel

    tokens = {"rank": 2, "targets": [], "tokens": {"0": [1, 5]}}
    for first in (True, False):
        model = nn.Sequential(nn.Embedding(8, 4)).double()
        if first:
            li.inject(model, tokens)
        plan = {"0": parallel.RowwiseParallel(input_layouts=Replicate())}
        parallel.parallelize_module(model, mesh(WORLD), plan)
        with refused(li.LayerError, "fully_shard"):
            model(torch.arange(8)[None]) if first else li.inject(model, tokens)


JOBS: dict[str, Callable[[Path], None]] = {
    job.__name__: job
    for job in (
        gradients_are_divided_as_the_base_s,
        the_policy_is_the_base_s,
        what_a_parent_reads_is_refused,
        single_tokens_are_refused_in_either_order,
    )
}


@needs_fsdp2
@pytest.mark.parametrize("job", JOBS)
def test_two_processes(job: str, failed: dict[str, str]) -> None:
    assert not failed[job], failed[job]


@needs_fsdp2
@pytest.mark.parametrize("order", ["inject first", "shard first"])
def test_a_sharded_model_goes_with_its_last_reference(order: str, one_rank: None) -> None:
    gone = list[weakref.ref[Any]]()
    for _ in range(10):
        if order == "inject first":
            model = shard(li.inject(two_layers(), CONFIG))
        else:
            model = li.inject(block(two_layers()), CONFIG)
        grads(model, x())
        li.activate(model, "default")
        gone += [weakref.ref(each) for each in (model, *model.parameters())]
        del model
        gc.collect()
        assert not any(ref() is not None for ref in gone)


@needs_fsdp2
def test_what_an_adapter_moves_is_sampled_of_shards_too(one_rank: None) -> None:
    """Else its own merged base passes for its base."""
    from torch.distributed.fsdp import fully_shard

    marks = []
    for shards in (fully_shard, lambda model, **_: model):
        torch.manual_seed(0)
        model = li.inject(nn.Sequential(nn.Embedding(64, 8)), {"rank": 2, "targets": ["0"]})
        with torch.no_grad():
            for parameter in li.adapter_parameters(model).values():
                parameter.copy_(torch.eye(*parameter.shape))  # it moves two tokens
        marks.append(li.adapter_state(shards(model, mesh=mesh(1))).fingerprint)
    assert marks[0] == marks[1]
    assert marks[0]["0.weight"].moved

"""What the tests of several processes share: jobs that each of them does, and whole tensors."""

import copy
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.forks import Forks
from torch import Tensor

import lora_inject as li

Jobs = Mapping[str, Callable[[Path], object]]


def do(jobs: Jobs, folder: Path) -> dict[str, str]:
    """Do jobs, as one of the processes that torchrun starts; what failed in each, or nothing.

    Where one fails the rest are not done: the other processes may wait for this one.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    failed = dict.fromkeys(jobs, "not done, since a job before it failed")
    for name, job in jobs.items():
        try:
            job(folder)
            dist.barrier()
            failed[name] = ""
        except BaseException:  # noqa: BLE001 - handed on
            failed[name] = traceback.format_exc()
            break
    dist.destroy_process_group()
    return failed


def failures(forks: Forks, world: int, jobs: Jobs, folder: Path) -> dict[str, str]:
    """Do jobs in several processes, which start once; return what failed in each job."""
    ranks = [rank.result() for rank in forks.start_ranks(world, do, jobs, folder)]
    return {name: "\n".join(rank[name] for rank in ranks).strip() for name in jobs}


def mesh(*shape: int) -> Any:
    names = ("replicated", "sharded")[-len(shape) :]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def from_first(value: Any) -> Any:
    """What the first process has."""
    listed = [value]
    dist.broadcast_object_list(listed)
    return listed[0]


def whole(tensor: Any) -> Tensor:
    """The unsharded values of a tensor, a copy."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def tensors_of(state: li.AdapterState) -> dict[str, Tensor]:
    roles = {f"{key}.{r}": t for key, s in state.sites.items() for r, t in s.tensors.items()}
    return {**roles, **state.trained}


def values(adapted: Any, name: str = "default") -> dict[str, Tensor]:
    """All tensors of an adapter of a model, or of its state."""
    state = adapted if isinstance(adapted, li.AdapterState) else li.adapter_state(adapted, name)
    return {key: whole(tensor) for key, tensor in tensors_of(state).items()}


def far(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value, or over 1 where all are zero."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / (wanted.abs().max() or 1.0))


def near(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], within: float) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert far(got[key], tensor) < within, key


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


@torch.no_grad()
def filled(model: Any, name: str = "default", *, std: float = 0.3) -> Any:
    """A model, maybe a spread one or a part of one, with noise by the name of each tensor."""
    state = copy.deepcopy(li.adapter_state(model, name))
    for key, tensor in tensors_of(state).items():
        generator = torch.Generator().manual_seed(sum(map(ord, name + key)))
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.add_(noise, alpha=std)
    return li.swap_adapter(model, state, name)


def steps(
    model: Any, run: Callable[[], Tensor], optimizer: Any = torch.optim.SGD, lr: float = 0.1
) -> dict[str, Tensor]:
    """Train an adapter for three steps on a loss; return the gradients of the first."""
    parameters = li.adapter_parameters(model)
    stepping, first = optimizer(parameters.values(), lr=lr), {}
    for _ in range(3):
        run().backward()
        first = first or {k: whole(p.grad) for k, p in parameters.items() if p.grad is not None}
        stepping.step()
        stepping.zero_grad()
    return first

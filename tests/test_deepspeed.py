"""DeepSpeed, where it is installed: ZeRO-2 and ZeRO-3 of two processes train as one does."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
x, y = torch.linspace(-1, 1, 64).view(4, 16), torch.linspace(2, -1, 32).view(4, 8)


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    li.inject(net, {"rank": 2, "alpha": 3.0, "targets": ["0", "2"]})
    with torch.no_grad():
        for parameter in li.adapter_parameters(net).values():
            parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter))
    return net


def loss(net: Any, rows: slice) -> Tensor:
    return (net(x[rows]) - y[rows]).square().mean()


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(li.adapter_parameters(net).values(), lr=0.1)


def values(net: nn.Module) -> dict[str, Tensor]:
    sites = li.adapter_state(net).sites
    return {f"{k}.{r}": t.clone() for k, site in sites.items() for r, t in site.tensors.items()}


def work(rank: int, stage: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.torch

    # It would compile an extension first.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", rank=rank, world_size=2)
    net = build()
    how = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
    how |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=how)
    for _ in range(2):
        engine.backward(loss(engine, slice(2 * rank, 2 * rank + 2)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        torch.save(values(net), f"{out}.{rank}")
    for late in (net, engine):  # its optimizer would not know the adapter
        with pytest.raises(li.LayerError, match="Inject"):
            li.inject(late, {"rank": 2, "targets": [r"(.*\.)?0"]}, "late")
    torch.distributed.destroy_process_group()  # a group that lives on may abort its process


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process_does(stage: int, tmp_path: Any) -> None:
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (stage, port, str(tmp_path / "found")), 2)
    net = build()
    plain = optimizer(net)
    for _ in range(2):
        plain.zero_grad()
        loss(net, slice(0, 4)).backward()
        plain.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}")
        for key, wanted in values(net).items():
            torch.testing.assert_close(found[key], wanted, rtol=1e-6, atol=1e-6)

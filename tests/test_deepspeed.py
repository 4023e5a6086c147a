"""DeepSpeed, where it is installed: two processes train as one does, and Trainer as without it."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_models import CONFIG, curve, injected, llama, trainer

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


def started(rank: int, world: int, port: int) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu")
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.torch

    # It would compile an extension first.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", rank=rank, world_size=world)
    return deepspeed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def work(rank: int, stage: int, port: int, out: str) -> None:
    deepspeed = started(rank, 2, port)
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
    torch.multiprocessing.spawn(work, (stage, free_port(), str(tmp_path / "found")), 2)
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


# ------------------------------------------------------------------------------------- Trainer

STEPS = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2}
STEPS |= {"per_device_train_batch_size": 2}


def train(_: int, stage: int, port: int, out: str) -> None:
    started(0, 1, port)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    how = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    how |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    how |= {"gradient_clipping": "auto"}
    made = trainer(Path(out), injected(), deepspeed=how, use_cpu=False, **STEPS)
    made.train()
    engine: Any = made.model_wrapped
    assert engine.zero_optimization_stage() == stage
    with pytest.raises(li.LayerError, match="wrapped in DeepSpeedEngine"):
        li.inject(engine, {"rank": 2, "targets": ["o_proj"]}, "late")
    again = trainer(Path(out), injected(), deepspeed=how, use_cpu=False, **STEPS)
    again.train(resume_from_checkpoint=str(Path(out, "checkpoint-2")))
    torch.save([curve(each.state.log_history) for each in (made, again)], f"{out}.curves")

    model = llama()
    model.spare = nn.Linear(16, 16)  # type: ignore[assignment]
    li.inject(model, CONFIG | {"targets": ["q_proj", "spare"]})
    with pytest.raises(li.StateError, match=r"reached 'spare' \(1 such site\)"):
        trainer(Path(out, "spare"), model, deepspeed=how, use_cpu=False, **STEPS).train()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_trainer_trains_saves_and_resumes_as_without(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    torch.multiprocessing.spawn(train, (stage, free_port(), str(tmp_path / "found")))
    plain = trainer(tmp_path / "plain", injected(), **STEPS)
    plain.train()
    for found in torch.load(tmp_path / "found.curves"):
        wanted = curve(plain.state.log_history)
        assert [at[:2] for at in found] == [at[:2] for at in wanted]
        losses = [[at[2] for at in each] for each in (found, wanted)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for step in ("checkpoint-2", "checkpoint-4"):
        found, wanted = (
            load_file(tmp_path / run / step / "adapter_model.safetensors")
            for run in ("found", "plain")
        )
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)

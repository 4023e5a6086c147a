"""DeepSpeed, where it is installed: two processes train as one does, and Trainer as without it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forks import Forks
from helpers.ranks import values
from helpers.training import CONFIG, curve, injected, llama, trainer
from safetensors.torch import load_file
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


def started() -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu")
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.torch

    # It would compile an extension first.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    return deepspeed


def work(stage: int) -> dict[str, Tensor]:
    deepspeed, net = started(), build()
    how = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
    how |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=how)
    first = 2 * int(os.environ["RANK"])
    for _ in range(2):
        engine.backward(loss(engine, slice(first, first + 2)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        trained = values(net)
    for late in (net, engine):  # its optimizer would not know the adapter
        with pytest.raises(li.LayerError, match="Inject"):
            li.inject(late, {"rank": 2, "targets": [r"(.*\.)?0"]}, "late")
    torch.distributed.destroy_process_group()  # a group that lives on may abort its process
    return trained


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process_does(stage: int, forks: Forks) -> None:
    pytest.importorskip("deepspeed")
    ranks = forks.start_ranks(2, work, stage)
    net = build()
    plain = optimizer(net)
    for _ in range(2):
        plain.zero_grad()
        loss(net, slice(0, 4)).backward()
        plain.step()
    for rank in ranks:
        torch.testing.assert_close(rank.result(), values(net), rtol=1e-6, atol=1e-6)


STEPS = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2}
STEPS |= {"per_device_train_batch_size": 2}


def train(stage: int, out: Path) -> list[Any]:
    started()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    how = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    how |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    how |= {"gradient_clipping": "auto"}

    def run(out: Path, model: Any, resume: str | None = None) -> Any:
        made = trainer(out, model, deepspeed=how, use_cpu=False, **STEPS)
        made.train(resume_from_checkpoint=resume)
        return made

    made = run(out, injected())
    engine: Any = made.model_wrapped
    assert engine.zero_optimization_stage() == stage
    with pytest.raises(li.LayerError, match="wrapped in DeepSpeedEngine"):
        li.inject(engine, {"rank": 2, "targets": ["o_proj"]}, "late")
    again = run(out, injected(), str(out / "checkpoint-2"))
    model = llama()
    model.spare = nn.Linear(16, 16)  # type: ignore[assignment]
    li.inject(model, CONFIG | {"targets": ["q_proj", "spare"]})
    with pytest.raises(li.StateError, match=r"reached 'spare' \(1 such site\)"):
        run(out / "spare", model)
    torch.distributed.destroy_process_group()
    return [curve(each.state.log_history) for each in (made, again)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_trainer_trains_saves_and_resumes_as_without(
    stage: int, tmp_path: Path, forks: Forks
) -> None:
    pytest.importorskip("deepspeed")
    [rank] = forks.start_ranks(1, train, stage, tmp_path / "zero")
    plain = trainer(tmp_path / "plain", injected(), **STEPS)
    plain.train()
    wanted = curve(plain.state.log_history)
    for logged in rank.result():
        assert [at[:2] for at in logged] == [at[:2] for at in wanted]
        assert [at[2] for at in logged] == pytest.approx([at[2] for at in wanted], rel=1e-6)
    for step in ("checkpoint-2", "checkpoint-4"):
        zero, wanted = (
            load_file(tmp_path / run / step / "adapter_model.safetensors")
            for run in ("zero", "plain")
        )
        torch.testing.assert_close(zero, wanted, rtol=1e-6, atol=1e-6)

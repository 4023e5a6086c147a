"""The contract on a device: outputs and gradients against the dense layer in float64 on the CPU.

pytest -m cuda                                  on a machine with a GPU
LORA_INJECT_DEVICE=mps pytest -m cuda           on another device of torch's
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from contract.test_dense import cases, hold_to_twin

DEVICE = os.environ.get("LORA_INJECT_DEVICE", "cuda")

ELSEWHERE = ("autocast", "compiled")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device"
    ),
]


@pytest.fixture(autouse=True)
def _as_exact_as_a_cpu() -> Iterator[None]:
    """Without TF32, which rounds float32 products to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before)


# Autocast is asked for the CPU, and compiled graphs have tests of their own.
@pytest.mark.parametrize(
    ("kind", "condition"),
    [case for case in cases(refused=False) if case.values[1].partition(" ")[0] not in ELSEWHERE],
)
def test_it_computes_and_trains_as_its_dense_twin(
    kind: str, condition: str, tmp_path: Path
) -> None:
    hold_to_twin(kind, condition, tmp_path, DEVICE)


def _layer(dtype: torch.dtype, **config: object) -> nn.Module:
    """A linear layer with an adapter on the device."""
    layer = nn.Sequential(nn.Linear(96, 160, bias=False)).to(dtype)
    return fill(li.inject(layer, {"rank": 4, "targets": ["0"], **config})).to(DEVICE)


def test_dropout_is_of_torchs_generator_and_is_recomputed_alike() -> None:
    model = _layer(torch.float32, dropout=0.25)
    model.train()
    x = torch.randn(256, 96, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert same_bits(model(x).cpu(), y.cpu())
    assert not same_bits(model(x).cpu(), y.cpu())
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in li.adapter_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA can refuse a sync and capture a graph")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compute", ["base", "float32"])
def test_a_step_waits_for_nothing_and_is_captured_in_a_graph(dropout: float, compute: str) -> None:
    model = _layer(torch.bfloat16, dropout=dropout, compute=compute)
    model.train()
    x = torch.randn(64, 96, device=DEVICE, dtype=torch.bfloat16)
    g = torch.randn(64, 160, device=DEVICE, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(x).backward(g)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        y.backward(g)
    graph.replay()
    assert torch.isfinite(y).all()
    if not dropout:
        assert error(y.cpu(), model(x).cpu()) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA can refuse a sync")
def test_choosing_adapters_and_routing_rows_wait_for_nothing() -> None:
    model = _layer(torch.bfloat16)
    li.inject(model, {"rank": 4, "targets": ["0"]}, "two")
    x = torch.randn(4, 8, 96, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in ("two", None, "default"):
            li.activate(model, name)
            model(x)
        for rows in (["two", None, "default", "two"], ["two"] * 4):
            with li.routed(model, rows):
                model(x).sum().backward()
        with li.disabled(model):
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA has streams")
def test_rows_are_right_on_each_stream() -> None:
    """Another stream does not wait for a copy of the rows, and would read what is not there yet."""
    model = _layer(torch.float32)
    x, current = torch.randn(2, 8, 96, device=DEVICE), torch.cuda.current_stream()
    with torch.no_grad(), li.routed(model, ["default", None]):
        wanted = model(x)
        for _ in range(3):
            stream = torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                y = model(x)
            current.wait_stream(stream)
            assert same_bits(y.cpu(), wanted.cpu())


def test_a_trial_with_dropout_trains_as_it_does_alone() -> None:
    def trained(names: str) -> dict[str, list[Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(96, 160)).to(DEVICE).train()
        config = {"rank": 4, "targets": ["0"], "dropout": 0.3}
        trials = {n: li.Trial(config, lr=1e-2, seed=ord(n)) for n in names}
        running = li.Trials(net, trials, loss=lambda out, _: out.square().mean())
        for step in range(3):
            x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            running.step(dict.fromkeys(names, (x,)))
        return {
            n: [p.detach().cpu() for p in li.adapter_parameters(net, n).values()] for n in names
        }

    both = trained("ab")
    for name in "ab":
        for found, alone in zip(both[name], trained(name)[name], strict=True):
            assert error(found, alone) < 1e-5


@pytest.mark.skipif(DEVICE != "cuda", reason="torch forks the generators of CUDA devices")
def test_a_start_by_decomposition_and_a_probe_move_no_random_number_of_the_device() -> None:
    model = nn.Sequential(nn.Linear(200, 200)).to(DEVICE)
    torch.manual_seed(0)
    wanted = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)

    def probe() -> None:
        model(torch.rand(2, 200, device=DEVICE))

    li.inject(model, {"rank": 2, "targets": ["0"], "init": "pissa"}, probe=probe)
    assert torch.equal(torch.rand(3, device=DEVICE), wanted)

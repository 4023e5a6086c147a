"""The arithmetic of `routed`: a batch against each row alone. Nothing is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits
from contract.kinds import KINDS, host
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from lora_inject.core.functional.factors import Update
from lora_inject.rows.bank import routed_update

Rows = list[str | None]
# Eight rows of two adapters of one rank, in their order too, or of three of unequal rank.
ROWS: dict[str, Rows] = {
    "few adapters": ["default", "wide", None, "default", "wide", "default", "wide", None],
    "in order": ["default"] * 4 + ["wide"] * 4,
    "many adapters": ["thin", "wide", None, "default", "thin", "wide", "default", "thin"],
}


def crowded(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = host(KINDS[kind], dtype)
    for name, rank in (("default", 2), ("wide", 2), ("thin", 1)):
        fill(li.inject(model, {**KINDS[kind].config, "rank": rank, **options}, name), name)
    return model.eval()


def batch(kind: str, dtype: torch.dtype, n_tokens: int | None) -> Tensor:
    n_in = KINDS[kind].inputs(dtype)[0].shape[-1]
    return torch.randn((8, n_in) if n_tokens is None else (8, n_tokens, n_in)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [None, 1, 3, 32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["linear", "one slice", "conv1d"])
def test_with_and_without_gradients_alike(kind, rows, n_tokens, dtype) -> None:
    model, x = crowded(kind, dtype), batch(kind, dtype, n_tokens)
    with li.routed(model, ROWS[rows]):
        wanted = model(x)
        with torch.no_grad():
            found = model(x)
    assert found.dtype == dtype
    assert same_bits(found, wanted.detach())
    with li.disabled(model):
        plain = model(x)
    base = [i for i, name in enumerate(ROWS[rows]) if name is None]
    assert same_bits(found[base], plain[base].detach())
    assert error(found, plain) > 1e-3


def fused_step(model: nn.Module) -> None:
    """Writes without a change of any version counter."""
    parameters = list(li.adapter_parameters(model, "wide").values())
    for p in parameters:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def replace(model: nn.Module) -> None:
    B = model.layer._parameters["lora_B__wide"]
    model.layer._parameters["lora_B__wide"] = nn.Parameter(B.detach() + 1)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [fused_step, replace])
def test_new_values_are_seen_inside_the_context(change: Any, inference: bool) -> None:
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    mode = torch.inference_mode if inference else torch.no_grad
    with li.routed(model, ROWS["few adapters"]):
        with mode():
            before = model(x).clone()
        change(model)
        with mode():
            found = model(x).clone()
        wanted = model(x).detach()
    assert error(found, wanted) < TOLERANCE[torch.float64]
    assert error(before, wanted) > 1e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n_tokens", [1, 3, 32])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_adapter_spoils_its_own_rows_only(factor: str, rows: str, n_tokens: int) -> None:
    """Tenants share a batch, not their mistakes."""
    model, x = crowded("linear"), batch("linear", torch.float64, n_tokens)
    with li.routed(model, ROWS[rows]), torch.no_grad():
        wanted = model(x)
        broken = [p for k, p in li.adapter_parameters(model, "wide").items() if factor in k]
        broken[0].fill_(torch.inf)
        found = model(x)
    for i, name in enumerate(ROWS[rows]):
        if name == "wide":
            assert not found[i].isfinite().any()
        else:
            assert error(found[i], wanted[i]) < TOLERANCE[torch.float64]


def test_a_forward_with_gradients_after_one_of_inference_mode() -> None:
    """What layers share for the context was made in inference mode."""
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    li.train_only(model, ["default", "wide"])
    with li.routed(model, ROWS["few adapters"]):
        with torch.inference_mode():
            found = model(x).clone()
        wanted = model(x)
        wanted.sum().backward()
    assert error(found, wanted) < TOLERANCE[torch.float64]
    assert all(p.grad is not None for p in li.adapter_parameters(model, "wide").values())


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, circular": (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (9,)),
    "2d, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (8, 7)),
    "3d, dilated": (lambda: nn.Conv3d(4, 6, 2, dilation=(1, 2, 1), bias=False), (4, 5, 4)),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_rows_of_convolutions_are_those_of_each_adapter_alone(conv, checkpointed) -> None:
    make, size = CONVOLUTIONS[conv]
    model = nn.Sequential(make()).double()
    for name, rank, init in (("a", 2, "kaiming"), ("b", 1, "pissa"), ("idle", 3, "kaiming")):
        fill(li.inject(model, {"rank": rank, "init": init, "targets": ["0"]}, name), name)
    li.train_only(model, ["a", "b", "idle"])
    x = torch.randn(4, 4, *size).double().requires_grad_()
    rows = ["b", None, "a", "b"]
    with li.routed(model, rows):
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    g = torch.randn_like(y)
    trained = [x, *(p for name in ("a", "b") for p in li.adapter_parameters(model, name).values())]
    check_rows(model, rows, x, y, g, trained)
    idle = [*li.adapter_parameters(model, "idle").values()]
    assert torch.autograd.grad(y, idle, g, allow_unused=True) == (None,) * len(idle)


def check_rows(
    model: Any, rows: Rows, x: Tensor, y: Tensor, g: Tensor, trained: list[Any], off: float = 1e-12
) -> None:
    """Outputs and gradients are those of each row under its own adapter alone."""
    gradients = torch.autograd.grad(y, trained, g, retain_graph=True)
    alone = []
    for i, name in enumerate(rows):
        li.activate(model, name)
        alone.append(model(x[i : i + 1]))
    wanted = torch.autograd.grad(torch.cat(alone), trained, g)
    for mine, theirs in zip((y, *gradients), (torch.cat(alone), *wanted), strict=True):
        assert error(mine, theirs) < off


@pytest.mark.parametrize("compute", ["base", "float32"])
def test_gradients_over_a_16_bit_base_are_those_of_each_row_alone(compute: str) -> None:
    model, rows = crowded("linear", torch.bfloat16, compute=compute), ROWS["many adapters"]
    x = batch("linear", torch.bfloat16, 3).requires_grad_()
    li.train_only(model, [name for name in dict.fromkeys(rows) if name is not None])
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    with li.routed(model, rows):
        y = model(x)
    check_rows(model, rows, x, y, torch.randn_like(y), trained, TOLERANCE[torch.bfloat16])


def test_a_convolution_without_a_batch_is_refused() -> None:
    model = li.inject(nn.Sequential(nn.Conv1d(2, 3, 1)), {"rank": 1, "targets": ["0"]}, "a")
    with li.routed(model, ["a", None]), pytest.raises(li.LayerError, match=r"without a batch"):
        model(torch.randn(2, 5))


def with_trained_layers() -> nn.Module:
    """Adapters that train a head, a norm or biases, and some that adapt the same layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    for name, config in {
        "head": {"targets": ["0"], "train": ["2"]},
        "norm": {"targets": ["0"], "train": [r"1\.weight", r"2\.bias"]},
        "none": {"targets": ["0"]},
        "low": {"targets": ["2"], "bias": "adapted"},
        "of B": {"targets": ["0", "2"], "lora_bias": True},
        "dora": {"targets": ["0"], "variant": "dora", "bias": "adapted"},
    }.items():
        fill(li.inject(model, {"rank": 1, **config}, name), name)
        for key, parameter in li.adapter_parameters(model, name).items():
            if "lora_A" not in key and "lora_B" not in key:
                torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_rows_get_the_layers_and_biases_that_their_adapters_train(checkpointed: bool) -> None:
    model = with_trained_layers()
    rows = ["head", "head", "norm", None, "none", "low", "of B", "dora", "norm", "head"]
    names = [name for name in dict.fromkeys(rows) if name is not None]
    li.train_only(model, names)
    x = torch.randn(len(rows), 5, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(rows), 5, 3, dtype=torch.float64)
    trained = [x, *(p for n in names for p in li.adapter_parameters(model, n).values())]
    with li.routed(model, rows):
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    check_rows(model, rows, x, y, g, trained)
    with li.routed(model, rows), pytest.raises(li.LayerError, match="not the number of rows"):
        model[2](torch.ones(3, 6, dtype=torch.float64))


def test_compiled_rows_get_their_biases() -> None:
    model = with_trained_layers()
    li.train_only(model, None)
    x, compiled = torch.randn(3, 5, 4, dtype=torch.float64), torch.compile(model, backend="eager")
    for rows in (["low", None, "of B"], ["of B", "of B", "low"]):
        with li.routed(model, rows):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-13)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_as_long_as_time_is_refused_where_either_may_come_first(compiled: bool) -> None:
    """Rows of a time-major input would be steps of time."""
    model = li.inject(TimeMajor(), {"rank": 1, "targets": ["fc"]})
    run = torch.compile(model, backend="eager") if compiled else model
    with li.routed(model, ["default", None, None]):
        with pytest.raises(li.LayerError, match="not the number of rows"):
            model(torch.ones(5, 3, 4))
        with pytest.raises((li.LayerError, RuntimeError), match="which dimension is the batch"):
            run(torch.ones(3, 3, 4))
    model = li.inject(TimeMajor(), {"rank": 1, "targets": ["fc"]})
    part = li.routed(model.fc, ["default", None, None])  # which does not see what is next to it
    with part, pytest.raises(li.LayerError, match="which dimension is the batch"):
        model(torch.ones(3, 3, 4))
    first = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True))
    li.inject(first, {"rank": 1, "targets": ["0"]})
    with li.routed(first, ["default", None, None]):
        first(torch.ones(3, 3, 4))


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize(
    ("rows", "ranks"),
    [
        ([1, 2, 3, 4], (2, 2, 2, 2)),
        ([0, 2, 1, 2, 2, 1, 0, 2], (1, 3)),
        ([2, 2, 2, 2, 2, 2, 2, 1], (4, 1)),
        ([3, 3, 3, 3, 3, 3, 1, 2, 3], (2, 2, 2)),
        ([0, 0, 1], (2,)),
    ],
)
def test_any_distribution_of_rows_by_hand(rows, ranks, n_tokens) -> None:
    """Output against dense matrices row by row; two derivatives against finite differences."""
    tensors = [
        t.double().requires_grad_() for r in ranks for t in (torch.randn(r, 5), torch.randn(7, r))
    ]
    x = torch.randn(len(rows), n_tokens, 5).double().requires_grad_()
    y = torch.randn(len(rows), n_tokens, 7).double().requires_grad_()

    def run(y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        adapters = [[Update(A, B, 0.5 + i % 2)] for i, (A, B) in enumerate(pairs)]
        return routed_update(y, x, torch.tensor(rows), adapters, float32=False)

    deltas = [torch.zeros(7, 5).double()]
    deltas += [(0.5 + i % 2) * tensors[2 * i + 1] @ tensors[2 * i] for i in range(len(ranks))]
    wanted = torch.stack([y[i] + x[i] @ deltas[row].T for i, row in enumerate(rows)])
    assert error(run(y, x, *tensors), wanted) < 1e-14
    assert torch.autograd.gradcheck(run, (y, x, *tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (y, x, *tensors), fast_mode=True)

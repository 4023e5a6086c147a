"""Exactness: outputs and gradients in float64 against the textbook formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.measure import Options, Result
from benchmarks.models import opaque, randomise
from lora_inject import Config, activate, adapter_parameters, adapters, inject, routed

OURS = "lora_inject"
LIMIT = 1e-12


@dataclass
class _Case:
    """A module with one site or more, and an input.

    Attributes:
        module: In float64; its sites are found by `targets`.
        x: The input.
        targets: Entries of a config.
        mix: Adapter name to weight; each is injected with a rank of its own.
        rows: For a routed batch, the adapter of each row.
    """

    module: nn.Module
    x: Tensor
    targets: list[Any]
    mix: Mapping[str, float] = field(default_factory=lambda: {"default": 1.0})
    rows: list[str | None] | None = None


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 5))
        self.down = nn.Parameter(torch.randn(3, 7, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ni,eoi->eno", x, self.up)
        return torch.einsum("eno,eoi->ni", hidden.tanh(), self.down)


def _cases() -> dict[str, _Case]:
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(6, 3, 5)
    fused = {"match": "0", "slices": ["q", "k", "v"], "adapt": ["q", "v"]}
    two = {"one": 0.7, "two": -0.3}
    banks = [{"match": "up", "layout": "out_in"}, {"match": "down", "layout": "in_out"}]
    return {
        "linear": _Case(nn.Sequential(nn.Linear(5, 7)), x, ["0"]),
        "linear, general path": _Case(opaque(nn.Sequential(nn.Linear(5, 7))), x, ["0"]),
        "linear, two slices of three": _Case(nn.Sequential(nn.Linear(5, 9)), x, [fused]),
        "linear, mix of two": _Case(nn.Sequential(nn.Linear(5, 7)), x, ["0"], two),
        "linear, its weight": _Case(nn.Sequential(nn.Linear(5, 7)), x, [r"0\.weight"]),
        "linear, routed": _Case(
            nn.Sequential(nn.Linear(5, 7)),
            x,
            ["0"],
            two,
            ["one", "two", None, "two", "two", "one"],
        ),
        "Conv1D": _Case(nn.Sequential(Conv1D(7, 5)), x, ["0"]),
        "Conv1D, two slices of three": _Case(nn.Sequential(Conv1D(9, 5)), x, [fused]),
        "embedding": _Case(nn.Sequential(nn.Embedding(11, 7)), torch.arange(6).view(2, 3), ["0"]),
        "convolution": _Case(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6), ["0"]),
        "three experts": _Case(_Experts(), torch.randn(6, 5), banks),
    }


def exactness(options: Options) -> Result:  # noqa: ARG001 - there is nothing smaller to do
    """Compare outputs and gradients with the textbook formula in float64; check derivatives."""
    result = Result()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        for name, case in _cases().items():
            _against_textbook(result, name, case)
        for name in ("linear", "linear, general path", "Conv1D", "embedding", "three experts"):
            _differentiable(result, name, _cases()[name])
        _transforms(result)
    finally:
        torch.set_default_dtype(before)
    result.notes.append(
        "The textbook formula forms W + scale * B A with autograd and runs the plain module on it."
    )
    return result


def _prepared(case: _Case) -> tuple[nn.Module, Tensor]:
    """Return the module with its adapters, all of them training, and its input."""
    net = copy.deepcopy(case.module)
    for rank, name in enumerate(case.mix, start=2):
        inject(net, Config(rank=rank, alpha=3.0, targets=case.targets), name)
        randomise(adapter_parameters(net, name).values(), std=1.0)
    activate(net, dict(case.mix))
    for tensor in adapter_parameters(net).values():
        tensor.requires_grad_()
    x = case.x.clone()
    return net, x.requires_grad_() if x.is_floating_point() else x


def _against_textbook(result: Result, name: str, case: _Case) -> None:
    net, x = _prepared(case)
    factors = list(adapter_parameters(net).values())
    leaves = [*([x] if x.requires_grad else []), *factors]
    if case.rows is None:
        y, wanted = net(x), _textbook(case.module, net, x, case.mix)
    else:
        with routed(net, case.rows):
            y = net(x)
        mixes = [{} if row is None else {row: 1.0} for row in case.rows]
        rows = [_textbook(case.module, net, x[i : i + 1], mix) for i, mix in enumerate(mixes)]
        wanted = torch.cat(rows)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, g)
    right = torch.autograd.grad(wanted, leaves, g)
    result.add(name, OURS, "outputs, relative error", _relative(y, wanted), LIMIT)
    worst = max(_relative(a, b) for a, b in zip(found, right, strict=True))
    result.add(name, OURS, "gradients, relative error", worst, LIMIT)


def _textbook(plain: nn.Module, net: nn.Module, x: Tensor, mix: Mapping[str, float]) -> Tensor:
    """Run the plain module on `W + sum of weight * alpha / rank * B A`."""
    weights = dict(plain.named_parameters())
    for adapter, weight in mix.items():
        found = adapter_parameters(net, adapter)
        prefix = f"{adapter}:"
        tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
        for site, spec in adapters(net)[adapter].sites.items():
            A, B = tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"]
            delta = weight * spec.alpha / spec.rank * _product(spec, A, B)
            weights[spec.weight] = weights[spec.weight] + delta
    return functional_call(plain, weights, (x,))


def _product(spec: Any, A: Tensor, B: Tensor) -> Tensor:
    """Return `B A` in the shape of the weight, part by part along the output."""
    if spec.slices is None:
        dense = B @ A
    else:
        parts, at = [], 0
        rank = spec.rank
        adapted = [name for name, _ in spec.slices.sizes if name in spec.slices.adapt]
        for name, width in spec.slices.sizes:
            if name not in adapted:
                parts.append(torch.zeros(width, A.shape[1]))
                continue
            i = adapted.index(name)
            parts.append(B[at : at + width] @ A[i * rank : (i + 1) * rank])
            at += width
        dense = torch.cat(parts)
    return (dense.mT if spec.transposed else dense).reshape(spec.weight_shape)


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).detach().norm() / right.detach().norm())


def _differentiable(result: Result, name: str, case: _Case) -> None:
    """Run torch's own checks of first and second derivatives."""
    net, x = _prepared(case)
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    factors = [net.get_parameter(n) for n in names]
    leaves = [*([x] if x.requires_grad else []), *factors]

    def call(*tensors: Tensor) -> Tensor:
        values = list(tensors)
        data = values.pop(0) if x.requires_grad else x
        return functional_call(net, dict(zip(names, values, strict=True)), (data,))

    for which, check in (
        ("gradcheck", torch.autograd.gradcheck),
        ("gradgradcheck", torch.autograd.gradgradcheck),
    ):
        inputs = [t.detach().clone().requires_grad_() for t in leaves]
        failed = not check(call, inputs, raise_exception=False)
        result.add(name, OURS, f"{which} fails", float(failed), 0.0)


def _transforms(result: Result) -> None:
    """Run torch.func's transforms over an adapted layer."""
    case = _cases()["linear"]
    net, _ = _prepared(case)
    A = next(n for n, p in net.named_parameters() if p.requires_grad)
    x = case.x

    def loss(a: Tensor, data: Tensor) -> Tensor:
        return functional_call(net, {A: a}, (data,)).square().sum()

    a = net.get_parameter(A).detach()
    each = torch.stack([torch.autograd.grad(loss(b, r), b)[0] for b, r in _leaves(a, x)])
    direction = torch.randn_like(a)
    wanted = (each.sum(0) * direction).sum()
    found: dict[str, Callable[[], float]] = {
        "vmap of grad": lambda: _relative(
            torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(a, x), each
        ),
        "jvp": lambda: _relative(
            torch.func.jvp(lambda b: loss(b, x), (a,), (direction,))[1], wanted
        ),
    }
    for name, run in found.items():
        result.add(f"torch.func, {name}", OURS, "relative error", run(), LIMIT)


def _leaves(a: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(a.clone().requires_grad_(), row) for row in x]

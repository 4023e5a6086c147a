"""Training: step-fp32, step-bf16, step-float32, saved-bytes, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    AGAIN,
    BARE,
    Options,
    Result,
    interleave,
    paired,
    peak_bytes,
    saved_bytes,
    some_ids,
    threads,
)
from benchmarks.models import (
    ALPHA,
    RANK,
    frozen,
    gpt2,
    llama,
    opaque,
    randomise,
    training_step,
    with_bare,
    with_kernels,
    with_lora,
    with_loralib,
    with_peft,
)
from lora_inject import adapter_parameters, inject

OURS, GENERAL = "lora_inject", "lora_inject, general path"
FLOAT32 = "lora_inject, compute: float32"
MIB = 2**20

Maker = Callable[[torch.dtype], Any]


def _models(options: Options) -> dict[str, Maker]:
    if options.quick:
        small = {"vocab_size": 512, "num_hidden_layers": 2}
        return {
            "GPT-2 tiny": lambda dtype: gpt2(dtype, vocab_size=512, n_layer=2, n_embd=96),
            "Llama tiny": lambda dtype: llama(
                dtype, **small, hidden_size=96, intermediate_size=256
            ),
        }
    return {"GPT-2 124M": gpt2, "Llama 124M": llama}


def _ids(options: Options) -> Tensor:
    shape = (2, 16) if options.quick else (4, 128)
    return some_ids(*shape)


def step_fp32(options: Options) -> Result:
    """Time a training step in float32."""
    result = Result()
    for name, make in _models(options).items():
        _steps(result, options, f"{name} fp32", make, torch.float32, rounds=3)
    return result


def step_bf16(options: Options) -> Result:
    """Time a training step in bfloat16, on one thread and on two."""
    result = Result()
    result.notes.append(
        "In bf16, PEFT keeps the low-rank arithmetic in float32 by default, loralib and "
        "lora_inject in bf16; `compute: float32` is lora_inject's choice that equals PEFT's. See "
        "step-float32 for what each does to the gradients of A and B."
    )
    counts = [options.threads] if options.threads else [1, 2]
    for n in counts:
        with threads(n):
            for name, make in _models(options).items():
                case = f"{name} bf16, {n} thread{'s' * (n > 1)}"
                _steps(result, options, case, make, torch.bfloat16, rounds=3 if n == 1 else 2)
    return result


def _steps(
    result: Result,
    options: Options,
    case: str,
    make: Maker,
    dtype: torch.dtype,
    rounds: int,
) -> None:
    ids = _ids(options)
    base = make(dtype)
    made = {
        "floor": frozen(copy.deepcopy(base)),
        AGAIN: frozen(copy.deepcopy(base)),
        OURS: with_lora(copy.deepcopy(base)),
        GENERAL: with_lora(opaque(copy.deepcopy(base))),
        "PEFT": with_peft(copy.deepcopy(base)),
        "loralib": with_loralib(copy.deepcopy(base)),
        BARE: with_bare(copy.deepcopy(base)),
    }
    for who in ("unsloth", "liger") if _on_gpu() and case.startswith("Llama") else ():
        try:
            made[who] = with_kernels(copy.deepcopy(base), who)
        except Exception as error:  # noqa: BLE001 - each refuses a model or a version in its own way
            result.notes.append(f"{case} without {who}: {type(error).__name__}: {error}.")
    if dtype == torch.bfloat16:
        made[FLOAT32] = with_lora(copy.deepcopy(base), compute="float32")
    del base
    runs = {name: training_step(model, ids) for name, model in made.items()}
    times = interleave(runs, options.n_rounds(rounds))
    result.ratios(case, times)
    result.over_bare(case, times, {OURS: 1.02, GENERAL: 1.05})
    if _on_gpu():
        for name, run in runs.items():
            result.add(case, name, "peak, MiB", peak_bytes(run) / MIB)


def _on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


# ---------------------------------------------------------------------------------- one layer


def step_float32(options: Options) -> Result:
    """Time one bf16 layer with float32 low-rank arithmetic, and compare its gradients."""
    result = Result()
    shapes = [(64, 64)] if options.quick else [(768, 768), (768, 3072), (3072, 768)]
    n_tokens = 32 if options.quick else 512
    for n_in, n_out in shapes:
        case = f"{n_in} to {n_out}, {n_tokens} tokens, bf16"
        _layer(result, options, case, n_in, n_out, n_tokens, target=1.25)
    return result


def _layer(
    result: Result,
    options: Options,
    case: str,
    n_in: int,
    n_out: int,
    n_tokens: int,
    target: float,
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(n_in, n_out, bias=False)).to(torch.bfloat16)
    x = torch.randn(n_tokens, n_in, dtype=torch.bfloat16)
    g = torch.randn(n_tokens, n_out, dtype=torch.bfloat16)
    A, B = torch.randn(RANK, n_in) / n_in**0.5, torch.randn(n_out, RANK) * 0.1
    config = {"rank": RANK, "alpha": ALPHA, "targets": ["0"]}
    made = {
        "floor": copy.deepcopy(base).requires_grad_(False),
        AGAIN: copy.deepcopy(base).requires_grad_(False),
        FLOAT32: inject(copy.deepcopy(base), {**config, "compute": "float32"}),
        "lora_inject, compute: base": inject(copy.deepcopy(base), config),
        "PEFT": with_peft(copy.deepcopy(base), target_modules=["0"], fan_in_fan_out=False),
    }
    wanted = _textbook_gradients(base[0].weight, x, g, A, B)
    for name, model in made.items():
        factors = {n[-12:]: p for n, p in model.named_parameters() if p.requires_grad}
        if not factors:
            continue
        gA, gB = _gradients(model, x, g, A, B)
        errors = [_relative(found, right) for found, right in zip((gA, gB), wanted, strict=True)]
        goal = 1e-6 if name == FLOAT32 else None
        for which, error in zip(("A", "B"), errors, strict=True):
            result.add(case, name, f"gradient of {which}, relative error", error, goal)
    x.requires_grad_()

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(x).backward(g)
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None

        return run

    runs = {name: _repeat(step(model), 20) for name, model in made.items()}
    times = interleave(runs, options.n_rounds(7))
    result.ratios(case, times, targets={FLOAT32: target})


def _repeat(run: Callable[[], None], calls: int) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(calls):
            run()

    return loop


def _gradients(model: nn.Module, x: Tensor, g: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
    """Set A and B, run once, and return their gradients."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    a = next(p for n, p in trained.items() if "lora_A" in n)
    b = next(p for n, p in trained.items() if "lora_B" in n)
    with torch.no_grad():
        a.copy_(A)
        b.copy_(B)
    model(x).backward(g)
    assert a.grad is not None
    assert b.grad is not None
    return [a.grad, b.grad]


def _textbook_gradients(
    W: Tensor, x: Tensor, g: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    A64, B64 = A.double().requires_grad_(), B.double().requires_grad_()
    y = x.double() @ (W.detach().double() + ALPHA / RANK * B64 @ A64).T
    return torch.autograd.grad(y, (A64, B64), g.double())  # type: ignore[return-value]


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


# ------------------------------------------------------------------------------- memory, dropout


def saved(options: Options) -> Result:
    """Count the bytes that are kept for the backward, over those of the floor."""
    result = Result()
    ids = _ids(options)
    for name, make in reversed(_models(options).items()):
        for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            _saved(result, f"{name} {label}", make(dtype), ids, options)
    result.notes.append(
        "Distinct storages that autograd's hooks see, without parameters. The targets are for the "
        "Llama in bf16: x once, h, and the factors in bf16, which are kept to start two launches "
        "less; that of dropout allows one bit more for each element of x."
    )
    return result


def _saved(result: Result, case: str, base: Any, ids: Tensor, options: Options) -> None:
    made = {
        OURS: with_lora,
        FLOAT32: lambda m: with_lora(m, compute="float32"),
        "lora_inject, dropout 0.05": lambda m: with_lora(m, dropout=0.05),
        GENERAL: lambda m: with_lora(opaque(m)),
        "PEFT": with_peft,
        "PEFT, dropout 0.05": lambda m: with_peft(m, lora_dropout=0.05),
        "loralib": with_loralib,
    }
    floor = _kept(frozen(copy.deepcopy(base)), ids)
    result.add(case, "floor", "MiB", floor / MIB)
    judged = not options.quick and case.startswith("Llama") and "bf16" in case
    targets = {OURS: 44.7, GENERAL: 44.7, "lora_inject, dropout 0.05": 49.6}
    for name, make in made.items():
        over = _kept(make(copy.deepcopy(base)), ids) - floor
        result.add(case, name, "MiB over floor", over / MIB, targets.get(name) if judged else None)


def _kept(model: Any, ids: Tensor) -> int:
    model.train()
    return saved_bytes(model, lambda: model(input_ids=ids, labels=ids, use_cache=False))


def dropout(options: Options) -> Result:
    """Time what dropout adds to a step, in points of the floor, and check what it does."""
    result = Result()
    ids = _ids(options)
    sizes = {"num_hidden_layers": 4, "vocab_size": 4096}
    if options.quick:
        sizes |= {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        base = llama(dtype, **sizes)
        made = {
            "floor": frozen(copy.deepcopy(base)),
            AGAIN: frozen(copy.deepcopy(base)),
            OURS: with_lora(copy.deepcopy(base)),
            "lora_inject, dropout 0.05": with_lora(copy.deepcopy(base), dropout=0.05),
            "PEFT": with_peft(copy.deepcopy(base)),
            "PEFT, dropout 0.05": with_peft(copy.deepcopy(base), lora_dropout=0.05),
        }
        runs = {name: training_step(model, ids) for name, model in made.items()}
        times = interleave(runs, options.n_rounds(5))
        case = f"Llama of {sizes['num_hidden_layers']} layers {label}"
        result.ratios(case, times)
        for who in (OURS, "PEFT"):
            pairs = zip(times[f"{who}, dropout 0.05"], times[who], times["floor"], strict=True)
            points = [100 * (dropped - plain) / floor for dropped, plain, floor in pairs]
            result.add(case, who, "points that dropout adds", points)
        ratio = paired(times["lora_inject, dropout 0.05"], times["PEFT, dropout 0.05"])
        result.add(case, "lora_inject, dropout 0.05", "time / PEFT", ratio, 1.0)
    _check_dropout(result)
    return result


def _check_dropout(result: Result) -> None:
    """Show the statistics of the mask, and that checkpointing replays it."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
    config = {"rank": 64, "alpha": 64, "dropout": 0.05, "targets": ["0"]}
    inject(net, config).train()
    factors = adapter_parameters(net)
    with torch.no_grad():
        for tensor in factors.values():
            tensor.copy_(torch.eye(64))
    torch.manual_seed(0)
    out = net(torch.ones(4096, 64)).detach()
    result.add(
        "x of ones through A = B = 1", OURS, "share dropped", float((out == 0).float().mean())
    )
    result.add("x of ones through A = B = 1", OURS, "mean", float(out.mean()))
    randomise(factors.values())
    x = torch.randn(32, 64)
    plain = _seeded_gradients(net, factors, lambda: net(x))
    again = _seeded_gradients(
        net, factors, lambda: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    )
    worst = max(float((a - b).abs().max()) for a, b in zip(plain, again, strict=True))
    result.add("gradients with and without checkpointing", OURS, "largest difference", worst, 0.0)


def _seeded_gradients(
    net: nn.Module, factors: dict[str, nn.Parameter], run: Callable[[], Tensor]
) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    run().square().sum().backward()
    return [p.grad.clone() for p in factors.values() if p.grad is not None]

"""Weights that many share: experts (stacked weights), train-many and trials (one frozen base)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.launches import Counted
from benchmarks.measure import AGAIN, Options, Result, interleave, paired, peak_bytes, some_ids
from benchmarks.models import (
    ALPHA,
    LLAMA,
    RANK,
    frozen,
    llama,
    quiet,
    randomise,
    training_step,
    with_lora,
    with_peft,
)
from lora_inject import Trial, Trials, activate, adapter_parameters, inject, routed, train_only

OURS = "lora_inject"
MIB = 2**20


# ------------------------------------------------------------------------------------ experts


def experts(options: Options) -> Result:
    """Time adapters on the stacked weights of a Mixtral block, and measure their peak memory."""
    result = Result()
    sizes = (64, 224, 32) if options.quick else (1024, 3584, 512)
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        _experts(result, options, label, dtype, *sizes)
    result.notes.append(
        "A Mixtral block (8 experts, 2 a token) at a quarter of its widths, adapters of r = 8 on "
        "gate_up_proj and down_proj; one step is forward, backward with the gradient of the input, "
        "without an optimizer. The peak is what torch's allocator holds above the start of a step."
    )
    return result


def _experts(
    result: Result,
    options: Options,
    label: str,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    n_tokens: int,
) -> None:
    base = _mixtral_block(hidden, inner).to(dtype)
    x = torch.randn(1, n_tokens, hidden, dtype=dtype, requires_grad=True)
    names = ("experts.gate_up_proj", "experts.down_proj")
    config = {"rank": RANK, "alpha": ALPHA}
    targets = [{"match": name.replace(".", r"\."), "layout": "out_in"} for name in names]
    made = {
        "floor": copy.deepcopy(base).requires_grad_(False),
        AGAIN: copy.deepcopy(base).requires_grad_(False),
        OURS: inject(copy.deepcopy(base), {**config, "targets": targets}),
        "PEFT": _peft_experts(copy.deepcopy(base), names),
    }
    for model in made.values():
        randomise(p for p in model.parameters() if p.requires_grad)
    steps = {name: _block_step(model, x) for name, model in made.items()}
    times = interleave(steps, options.n_rounds(3))
    case = f"8 experts, {hidden} to {inner}, {n_tokens} tokens, {label}"
    result.ratios(case, times)
    judged = not options.quick
    against = paired(times[OURS], times["PEFT"])
    result.add(case, OURS, "time / PEFT", against, 0.6 if judged else None)
    peaks = {name: peak_bytes(step) / MIB for name, step in steps.items() if name != AGAIN}
    for name, peak in peaks.items():
        result.add(case, name, "peak, MiB", peak)
    goal = 0.5 if judged else None
    result.add(case, OURS, "peak / PEFT's peak", peaks[OURS] / peaks["PEFT"], goal)


def _mixtral_block(hidden: int, inner: int) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=hidden, intermediate_size=inner))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    return block


def _peft_experts(block: nn.Module, names: tuple[str, ...]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=list(names))
    with quiet():
        return get_peft_model(block, config)


def _block_step(model: Any, x: Tensor) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(x).float().square().mean().backward()
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return step


# --------------------------------------------------------------------------------- train-many


def train_many(options: Options) -> Result:
    """Time the training of eight adapters at once against eight runs in turn."""
    result = Result()
    sizes: dict[str, int] = {"num_hidden_layers": 4, "vocab_size": 4096}
    if options.quick:
        sizes |= {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    names = [f"a{i}" for i in range(8)]
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = llama(dtype, **sizes)
        for name in names:
            inject(model, {"rank": RANK, "alpha": ALPHA, "targets": [LLAMA]}, name)
            randomise(adapter_parameters(model, name).values())
        train_only(model, names)
        for n_tokens, goal in ((8, 0.5), (32, 0.7), (128, 1.0)):
            case = f"Llama of {sizes['num_hidden_layers']} layers {label}, {n_tokens} tokens a run"
            target = None if options.quick else goal
            _train_many(result, options, case, model, names, n_tokens, target)
    result.notes.append(
        "A run is one row of its own tokens with a mean loss of its own; all rows of the joint "
        "step are of equal length, so eight times its mean loss is the sum of theirs. Both sides "
        "step one AdamW over all adapters."
    )
    return result


def _train_many(
    result: Result,
    options: Options,
    case: str,
    model: Any,
    names: list[str],
    n_tokens: int,
    target: float | None,
) -> None:
    ids = some_ids(8, n_tokens)
    trained = [p for p in model.parameters() if p.requires_grad]

    def at_once() -> None:
        with routed(model, names):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (8 * loss).backward()

    def in_turn() -> None:
        for i, name in enumerate(names):
            activate(model, name)
            row = ids[i : i + 1]
            model(input_ids=row, labels=row, use_cache=False).loss.backward()

    model.train()
    gradients = [_gradients(model, run) for run in (in_turn, at_once)]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def with_optimizer(run: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            run()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    runs = {
        "in turn": with_optimizer(in_turn),
        "in turn again": with_optimizer(in_turn),
        "at once": with_optimizer(at_once),
    }
    times = interleave(runs, options.n_rounds(3))
    result.ratios(case, times, "time / in turn", "in turn", {"at once": target} if target else None)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    fine = 1e-5 if model.dtype == torch.float32 else None
    result.add(case, "at once", "gradients, relative difference", float(error), fine)


def _gradients(model: nn.Module, run: Callable[[], None]) -> Tensor:
    model.zero_grad(set_to_none=True)
    run()
    found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


# ------------------------------------------------------------------------------------- trials

TRIALS_GOALS = {  # of 8, 32 and 128 tokens a trial
    (8, "fp32"): (0.25, 0.50, 0.85),
    (8, "bf16"): (0.25, 0.35, 0.62),
    (32, "fp32"): (0.20, 0.42, 0.87),
}


def trials(options: Options) -> Result:
    """Time a step of many trials at once against the same runs in turn."""
    result = Result()
    sizes = {"num_hidden_layers": 4, "vocab_size": 4096, "hidden_size": 512,
             "intermediate_size": 1376, "num_attention_heads": 8}  # fmt: skip
    if options.quick:
        sizes |= {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    for n, label in ((8, "fp32"), (8, "bf16"), (32, "fp32"), (32, "bf16")):
        dtype = torch.float32 if label == "fp32" else torch.bfloat16
        base = llama(dtype, **sizes)
        goals = () if options.quick else TRIALS_GOALS.get((n, label), ())
        _trials(result, options, f"{n} trials {label}", base, n, goals)
    for n in (2, 8, 32):
        case = f"{n} trials of one rank"
        result.add(case, OURS, "launches of a step", launches_of_trials(n))
    result.notes.append(
        "A trial is one row of its own tokens, adapters of r = 8 on all linear layers, its own "
        "loss and AdamW; whole steps, optimizers included. In turn is as many steps of one "
        "adapter on a model of its own, with the fused AdamW."
    )
    return result


def _trials(
    result: Result, options: Options, case: str, base: Any, n: int, goals: tuple[float, ...]
) -> None:
    alone, peft = with_lora(copy.deepcopy(base)), with_peft(copy.deepcopy(base))
    floor = frozen(copy.deepcopy(base))
    rules = {"rank": RANK, "alpha": ALPHA, "targets": [LLAMA]}
    together = Trials(base.train(), {f"t{i}": Trial(rules, lr=1e-4) for i in range(n)})
    for i, n_tokens in enumerate((8, 32, 128)):
        ids = some_ids(n, n_tokens)
        rows = {f"t{j}": {"input_ids": row, "labels": row} for j, row in enumerate(ids.split(1))}
        runs = {
            "in turn": _in_turn(alone, ids),
            "in turn again": _in_turn(alone, ids),
            "at once": lambda rows=rows: together.step(rows),
            "PEFT in turn": _in_turn(peft, ids),
            "the base at once": training_step(floor, ids),
        }
        times = interleave(runs, options.n_rounds(3))
        target = {"at once": goals[i]} if goals else None
        where = f"{case}, {n_tokens} tokens each"
        result.ratios(where, times, "time / in turn", "in turn", target)
        peak = peak_bytes(runs["at once"]) / peak_bytes(runs["the base at once"])
        goal = 1.25 if goals and n_tokens == 128 else None
        result.add(where, "at once", "peak / peak of the base at once", peak, goal)


def _in_turn(model: Any, ids: Tensor) -> Callable[[], None]:
    """Return a step of each row's run, one after the other."""
    steps = [training_step(model, row) for row in ids.split(1)]

    def run() -> None:
        for step in steps:
            step()

    return run


def launches_of_trials(n: int, dtype: torch.dtype = torch.float32, compute: str = "base") -> float:
    """Count what a step starts on any device but the CPU, on a tiny model."""
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 31}
    model = llama(dtype, **tiny, num_attention_heads=2, device="cpu").train()
    rules = {"rank": 2, "compute": compute, "targets": [LLAMA]}
    many = Trials(model, {f"t{i}": Trial(rules, lr=1e-4) for i in range(n)})
    ids = some_ids(1, 6).cpu() % 31
    batch = {"input_ids": ids, "labels": ids}
    many.step(batch)
    with Counted() as counted:
        many.step(batch)
    return float(counted.total)

"""Gradient checkpointing of adapted models works, or says what to call."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import error, fill, refusal
from helpers.reference import gpt2_of_two_layers
from helpers.refusals import refused
from torch import nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_inject as li
from contract.kinds import ALPHA, RANK

CONFIG = {"rank": RANK, "alpha": ALPHA}


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte"], [r"c_fc\.weight"]], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, targets: list[str]) -> None:
    """Works, or says what to call: with frozen embeddings the reentrant mode passes no gradient."""
    model = fill(li.inject(gpt2_of_two_layers(), {**CONFIG, "targets": targets})).train()
    ids = torch.arange(10).view(2, 5)
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in li.adapter_parameters(model).items()}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    told = refusal(lambda: model(ids, labels=ids).loss.backward(), li.LayerError)
    if told is not None:  # newer versions of transformers call it themselves
        assert reentrant
        assert "enable_input_require_grads" in str(told)
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    for name, parameter in li.adapter_parameters(model).items():
        assert error(parameter.grad, wanted[name]) < 1e-5


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("frozen", ["nothing", "lora_A"])
@pytest.mark.parametrize(
    "config",
    [{"targets": ["0"]}, {"targets": [r"0\.weight"]}, {"train": ["0"]}, {"bias": "all"}],
    ids=str,
)
def test_gradient_checkpointing_never_trains_in_vain(config: dict[str, Any], frozen: str) -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(5, 5)), {**CONFIG, **config}))
    for name, parameter in li.adapter_parameters(model).items():
        parameter.requires_grad_(not name.endswith(frozen))
    x = torch.randn(2, 5)
    contexts = [nullcontext(), li.routed(model, ["default", None])]
    for context in contexts if config == {"targets": ["0"]} else contexts[:1]:
        with context, refused(li.LayerError, "use_reentrant=False", "enable_input_require_grads()"):
            checkpoint(model, x, use_reentrant=True)
    checkpoint(model.eval(), x, use_reentrant=True)


ATEN = torch.ops.aten
SAVED = {
    "mm": {ATEN.mm.default},  # torchtitan's policy, of its matrix products
    "products": {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default},
    "everything": None,
}


class Two(nn.Module):
    """Linear layers with and without bias, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


def selectively(model: nn.Module, saved: str, allow: bool, x: torch.Tensor) -> torch.Tensor:
    ops = SAVED[saved]

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = ops is None or op in ops
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(
        create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=allow
    )
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


RULES: list[dict[str, Any]] = [
    {},
    {"dropout": 0.1},
    {"init": "pissa"},
    {"variant": "dora"},
    {"slices": {"a": 3, "b": 3}, "adapt": ["b"]},
    {"slices": {"a": 2, "b": 1, "c": 3}, "adapt": ["a", "c"]},
    {"match": r"(up|down)\.weight"},
]
# The dtype, the limit of the error, and the shape of the inputs: many tokens, and one.
CALLS = [(torch.float64, 1e-12, (3, 20, 6)), (torch.bfloat16, 2e-2, (1, 1, 6))]


@pytest.mark.parametrize(("dtype", "limit", "shape"), CALLS, ids=str)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_selective_checkpoints_change_no_gradient(saved, rule, dtype, limit, shape) -> None:
    sites = "down" if "slices" in rule else "up|down"
    compute = "base" if "match" in rule else "float32"
    config = {"rank": 2, "compute": compute, "targets": [{"match": sites, **rule}]}
    model = fill(li.inject(Two().to(dtype), config)).train()
    x, tuned = torch.randn(shape).to(dtype), list(li.adapter_parameters(model).values())
    grads = []
    for run in (model, *(partial(selectively, model, saved, allow) for allow in (False, True))):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(run(x).square().sum(), tuned))
    for one, *others in zip(*grads, strict=True):
        assert all(error(one, other) < limit for other in others)


CHANGES: dict[str, Callable[[nn.Module, li.AdapterState], Any]] = {
    "merge": lambda model, _: li.merge(model),
    "eject": lambda model, _: li.eject(model, "default"),
    "swap": lambda model, other: li.swap_adapter(model, other),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("beside", ["nothing", "another adapter on another layer"])
def test_a_change_before_the_backward_is_refused_there(
    beside: str, change: str, training: bool, reentrant: bool
) -> None:
    """Where the last adapter of a layer was ejected, the plain layer ran again in its place."""
    model, other = (
        fill(li.inject(Two().double(), {"rank": 2, "targets": ["up", "down"]})) for _ in range(2)
    )
    if beside != "nothing":
        li.inject(model, {"rank": 2, "targets": ["down"]}, "beside")
        li.activate(model, "default")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model.train(training).up, x, use_reentrant=reentrant).square().sum()
    CHANGES[change](model, li.adapter_state(other))
    with pytest.raises((li.StateError, CheckpointError)):
        loss.backward()

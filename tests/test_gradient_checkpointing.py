"""Gradient checkpointing of adapted models works, or says what to call."""

import contextlib
import warnings
from typing import Any

import pytest
import torch
from conftest import ALPHA, RANK, error, fill, refusal
from helpers.reference import gpt2_of_two_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li

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
    refused = refusal(lambda: model(ids, labels=ids).loss.backward(), li.LayerError)
    if refused is not None:  # newer versions of transformers call it themselves
        assert reentrant
        assert "enable_input_require_grads" in str(refused)
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    for name, parameter in li.adapter_parameters(model).items():
        assert error(parameter.grad, wanted[name]) < 1e-5


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("config", "routed"),
    [
        ({"targets": ["0"]}, False),
        ({"targets": ["0"]}, True),
        ({"targets": [r"0\.weight"]}, False),
        ({"train": ["0"]}, False),
        ({"bias": "all"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", ["nothing", "lora_A"])
def test_gradient_checkpointing_never_trains_in_vain(
    config: dict[str, Any], routed: bool, frozen: str
) -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(5, 5)), {**CONFIG, **config}))
    for name, parameter in li.adapter_parameters(model).items():
        parameter.requires_grad_(not name.endswith(frozen))
    x = torch.randn(2, 5)
    context = li.routed(model, ["default", None]) if routed else contextlib.nullcontext()
    words = "no input of the checkpoint requires a gradient"
    with context, pytest.raises(li.LayerError, match=words):
        checkpoint(model, x, use_reentrant=True)
    checkpoint(model.eval(), x, use_reentrant=True)

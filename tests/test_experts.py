"""Stacked experts: equal to the dense model, in each family's way, and in files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.experts import MOE, expert_rule, experts
from helpers.reference import EXACT, SCALE, base_state, config, logits, refused, saved
from torch import nn

import lora_inject as li

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms


def with_expert_deltas(plain: nn.Module, model: nn.Module, layout: str) -> nn.Module:
    """The plain model with the dense deltas in its experts, expert by expert."""
    wide = copy.deepcopy(plain)
    for site in li.adapter_state(model).sites.values():
        W = wide.get_parameter(site.spec.weight)
        with torch.no_grad():
            for e in range(len(W)):
                delta = (SCALE * site.B[e].double() @ site.A[e].double()).to(W.dtype)
                W[e] += delta if layout == "out_in" else delta.t()
    return wide


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_equal_the_dense_model(family: str) -> None:
    plain, layout = experts(family)
    plain = plain.double()
    model = copy.deepcopy(plain)
    li.inject(model, config(expert_rule(layout)))
    assert same_bits(logits(model), logits(plain))
    assert all(s.experts in (3, 4) for s in li.adapters(model)["default"].sites.values())
    fill(model)
    wide = with_expert_deltas(plain, model, layout)
    assert error(logits(plain), logits(wide)) > 1e-3
    assert error(logits(model), logits(wide)) < EXACT
    gradients_of_experts(model, wide, layout)
    li.merge(model)
    assert error(logits(model), logits(wide)) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())


def gradients_of_experts(model: nn.Module, wide: nn.Module, layout: str) -> None:
    """dL/dA and dL/dB follow from the dense dL/dW by hand: scale B^T G and scale G A^T."""
    weights = torch.randn(2, 4, 13, dtype=torch.float64)
    (logits(wide) * weights).sum().backward()
    (logits(model) * weights).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        G = wide.get_parameter(site.spec.weight).grad
        G = G if layout == "out_in" else G.transpose(1, 2)
        A, B = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
        assert error(A.grad, SCALE * B.transpose(1, 2) @ G) < 1e-10
        assert error(B.grad, SCALE * G @ A.transpose(1, 2)) < 1e-10


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_in_the_family_s_own_way(family: str) -> None:
    """By default transformers multiplies all experts by one grouped kernel, in float32."""
    plain, layout = experts(family, "default")
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout))))
    wide = with_expert_deltas(plain, model, layout)
    assert error(logits(model), logits(wide)) < FLOAT32
    assert li.unreached(model, lambda: logits(model)) == []
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in li.adapter_parameters(model).values())


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", MOE)
def test_the_delta_of_experts_is_not_formed(family, how, monkeypatch) -> None:
    from lora_inject.core.functional.weight import LowRank

    plain, layout = experts(family, how)
    model = fill(li.inject(plain, config(expert_rule(layout))))
    formed: list[Any] = []
    real = LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda *a: formed.append(a) or real(*a))
    logits(model).sum().backward()
    assert not formed
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())


def test_dropout_on_stacked_experts_is_refused() -> None:
    model, layout = experts("mixtral")
    bad = config(expert_rule(layout), dropout=0.1)
    refused(model, lambda: li.inject(model, bad), li.MatchError, "experts.*dropout")


@pytest.mark.parametrize("family", MOE)
def test_the_layout_of_stacked_experts_is_asked_for_where_their_class_does_not_state_it(
    family: str,
) -> None:
    model, layout = experts(family)
    bare = config(r"experts\.(gate_up_proj|down_proj)")
    if family == "llama4":
        refused(model, lambda: li.inject(model, bare), li.MatchError, "which side is the input")
    else:
        assert li.plan(model, bare).sites == li.plan(model, config(expert_rule(layout))).sites


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacked_experts_travel(family: str, tmp_path: Path) -> None:
    plain, layout = experts(family)
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout), "q_proj")))
    path, _ = saved(model, tmp_path, "native")
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(logits(again), logits(model))

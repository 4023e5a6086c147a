"""Stacked experts: equal to the dense model, and in each family's way."""

import copy

import pytest
from conftest import error, fill
from helpers.experts import MOE, check_like_dense, expert_rule, experts, with_expert_deltas
from helpers.reference import config, logits, refused

import lora_inject as li
from lora_inject.core.functional.weight import LowRank

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_equal_the_dense_model_and_their_layout_is_that_of_the_class(
    family,
) -> None:
    model = check_like_dense(family, expert_rule)
    assert all(s.experts in (3, 4) for s in li.adapters(model)["default"].sites.values())
    plain, layout = experts(family)
    bare = config(r"experts\.(gate_up_proj|down_proj)")
    assert li.plan(plain, bare).sites == li.plan(plain, config(expert_rule(layout))).sites


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", MOE)
def test_in_each_way_of_the_family_the_delta_is_right_and_not_formed(
    family, how, monkeypatch
) -> None:
    """By default transformers multiplies all experts by one grouped kernel, in float32."""
    plain, layout = experts(family, how)
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout))))
    wide, formed, real = with_expert_deltas(plain, model, layout), [], LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda *a: formed.append(a) or real(*a))
    assert error(logits(model), logits(wide)) < FLOAT32
    logits(model).square().sum().backward()
    assert not formed
    assert all(p.grad is not None and p.grad.any() for p in li.adapter_parameters(model).values())
    assert li.unreached(model, lambda: logits(model)) == []


def test_dropout_on_stacked_experts_is_refused() -> None:
    model, layout = experts("mixtral")
    bad = config(expert_rule(layout), dropout=0.1)
    refused(model, lambda: li.inject(model, bad), li.MatchError, "experts.*dropout")

"""Stacked experts: equal to the dense model, in each family's way, and in files."""

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import error, fill, same_bits
from helpers.experts import (
    MOE,
    check_like_dense,
    expert_rule,
    experts,
    with_expert_deltas,
)
from helpers.reference import config, logits, refused, saved

import lora_inject as li

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_equal_the_dense_model(family: str) -> None:
    model = check_like_dense(family, expert_rule)
    assert all(s.experts in (3, 4) for s in li.adapters(model)["default"].sites.values())


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
def test_the_layout_of_stacked_experts_is_known_by_their_class(family: str) -> None:
    model, layout = experts(family)
    bare = config(r"experts\.(gate_up_proj|down_proj)")
    assert li.plan(model, bare).sites == li.plan(model, config(expert_rule(layout))).sites


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacked_experts_travel(family: str, tmp_path: Path) -> None:
    plain, layout = experts(family)
    model = fill(li.inject(copy.deepcopy(plain), config(expert_rule(layout), "q_proj")))
    path, _ = saved(model, tmp_path, "native")
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(logits(again), logits(model))

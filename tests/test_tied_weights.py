"""Embeddings and heads: tied by the tensor whatever the config says, not resized while adapted."""

from typing import Any

import pytest
import torch
from conftest import ALPHA, RANK, TOLERANCE, error, fill, same_bits, snapshot
from helpers.reference import gpt2_of_two_layers

import lora_inject as li

CONFIG = {"rank": RANK, "alpha": ALPHA}


@pytest.mark.parametrize("says", [True, False])
def test_tied_weight_is_known_by_the_tensor_not_by_the_config(says: bool) -> None:
    model = gpt2_of_two_layers(tie_word_embeddings=not says)
    model.config.tie_word_embeddings = says
    assert (model.lm_head.weight is model.transformer.wte.weight) is not says
    fill(li.inject(model, {**CONFIG, "targets": ["wte"]}))
    ids = torch.arange(10).view(2, 5)
    wanted, head = model(ids).logits, model.lm_head.weight
    li.merge(model)
    assert error(model(ids).logits, wanted) < TOLERANCE[torch.float32]
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is (says and model.lm_head.weight is not None)


RESIZED = [
    {"targets": ["wte"]},
    {"targets": ["lm_head"]},
    {"targets": ["c_attn"], "train": ["wte"]},
    {"targets": ["wte", "c_attn"]},
]


@pytest.mark.parametrize("part", ["", "transformer"])
@pytest.mark.parametrize("config", RESIZED, ids=str)
def test_resize(config: dict[str, Any], part: str) -> None:
    """Right, or an error that says to eject first."""
    model = fill(li.inject(gpt2_of_two_layers(), {**CONFIG, **config}))
    ids = torch.arange(10).view(2, 5)
    wanted, before = model(ids).logits, snapshot(model)
    with pytest.raises(li.LayerError, match="Eject first, resize, then inject again"):
        model.get_submodule(part).resize_token_embeddings(20)
    assert snapshot(model) == before
    assert same_bits(model(ids).logits, wanted)
    li.eject(model)
    model.resize_token_embeddings(20)
    fill(li.inject(model, {**CONFIG, **config}))
    assert model(ids).logits.shape == (2, 5, 20)


def test_resize_of_what_is_not_adapted() -> None:
    model = fill(li.inject(gpt2_of_two_layers(), {**CONFIG, "targets": ["c_attn"]}))
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids).logits
    model.resize_token_embeddings(20)
    assert error(model(ids).logits[..., :13], wanted) < TOLERANCE[torch.float32]
    assert model.lm_head.weight is model.transformer.wte.weight

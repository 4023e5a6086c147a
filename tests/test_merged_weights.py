"""Merged weights handed out one at a time, as to a server beside a run: W is not written."""

import weakref

import pytest
import torch
from conftest import fill, same_bits, snapshot
from training_models import llama

import lora_inject as li

CONFIG = {"rank": 2, "targets": ["q_proj", "down_proj", "lm_head"], "train": [r"model\.norm"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_is_what_a_merge_would_leave_and_nothing_is_written(tied, dtype) -> None:
    model = llama(tie_word_embeddings=tied).to(dtype)
    names = set(model.state_dict())
    fill(li.inject(model, CONFIG))
    before = snapshot(model)
    received = {name: tensor.clone() for name, tensor in li.merged_weights(model)}
    assert snapshot(model) == before
    assert set(received) == names
    li.merge(model)
    wanted = model.state_dict()
    assert all(same_bits(tensor, wanted[name]) for name, tensor in received.items())


def test_one_merged_tensor_exists_at_a_time() -> None:
    model = fill(li.inject(llama(), CONFIG))
    base = {id(parameter) for parameter in model.parameters()}
    alive: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in li.merged_weights(model):
        assert not [ref for ref in alive if ref() is not None]
        if id(tensor) not in base and tensor.data_ptr() not in {
            p.data_ptr() for p in model.parameters()
        }:
            alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) == 6


def test_what_cannot_be_merged_is_refused_before_the_first() -> None:
    model = fill(li.inject(llama(), CONFIG))
    li.activate(model, None)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.merged_weights(model)
    name = next(iter(li.adapter_parameters(model)))
    with torch.no_grad():
        li.adapter_parameters(model)[name].fill_(float("nan"))
    with pytest.raises(li.StateError, match="NaN or Inf"):
        li.merged_weights(model, name="default")

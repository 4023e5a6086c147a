"""What torch can do with a layer, an adapted one does as well, or says that it does not."""

import copy

import pytest
import torch
from conftest import error, fill
from helpers.reference import random
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertForMaskedLM

import lora_inject as li

LINEAR = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


def adapted(layer: nn.Module, target: str = "0") -> nn.Module:
    return fill(li.inject(nn.Sequential(layer).double(), {**LINEAR, "targets": [target]}))


def test_a_trace_of_a_convolution_computes_with_its_adapter() -> None:
    model, x = adapted(nn.Conv1d(4, 6, 3)), random(2, 4, 9)
    assert error(make_fx(model)(x)(x), model(x)) < 1e-12


def test_a_sparse_bag_trains_its_adapter() -> None:
    sparse, bag = (nn.EmbeddingBag(7, 4, sparse=s) for s in (True, False))
    bag.load_state_dict(sparse.state_dict())
    ids = torch.tensor([[1, 2, 2], [3, 4, 6]])
    gradients = []
    for layer in (sparse, bag):
        torch.manual_seed(0)
        model = adapted(layer, "0.weight")
        model(ids).square().sum().backward()
        gradients.append([p.grad.to_dense() for p in li.adapter_parameters(model).values()])
    for got, wanted in zip(*gradients, strict=True):
        assert error(got, wanted) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_may_be_frozen_by_inductor() -> None:
    model, x = adapted(nn.Linear(4, 4)).float().eval(), torch.randn(3, 4)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert error(torch.compile(model)(x), model(x)) < 1e-5


def test_a_tied_model_of_which_one_end_trains_is_merged() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 13}
    plain = BertForMaskedLM(BertConfig(num_attention_heads=2, **sizes)).eval().double()
    ends = ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    both = li.inject(
        copy.deepcopy(plain), {"rank": 2, "targets": ["query"], "train": ["word_embeddings"]}
    )
    state = li.adapter_state(fill(both))
    assert set(ends) <= state.trained.keys()
    one = copy.deepcopy(state)
    del one.trained[ends[1]]
    ids = torch.tensor([[1, 2, 3]])
    model = li.install(plain, one)
    before = model(ids).logits
    li.merge(model)
    assert error(model(ids).logits, before) < 1e-9

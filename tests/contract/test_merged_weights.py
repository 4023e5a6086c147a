"""Merged weights handed out one at a time, as to a server beside a run: W is not written."""

import weakref
from typing import Any

import pytest
import torch
import transformers
from conftest import fill, same_bits, snapshot
from helpers.experts import expert_rule, experts
from helpers.refusals import refused
from helpers.training import llama
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file

import lora_inject as li

CONFIG = {"rank": 2, "targets": ["q_proj", "down_proj", "lm_head"], "train": [r"model\.norm"]}


def fused() -> Any:
    """A model whose checkpoint has one tensor for several of the model's, in each layer."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31}
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(**sizes, num_hidden_layers=4, head_dim=8)
    return transformers.HrmTextForCausalLM(config)


def of_experts() -> Any:
    return experts("mixtral", "eager")[0]


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
    base = {parameter.data_ptr() for parameter in model.parameters()}
    alive: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in li.merged_weights(model):
        assert not [ref for ref in alive if ref() is not None]
        if tensor.data_ptr() not in base:
            alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) == 6


@pytest.mark.parametrize("event", ["a step", "a merge"])
def test_tensors_of_two_moments_are_not_handed_out_as_one_model(event: str) -> None:
    model = fill(li.inject(llama(), CONFIG))
    weights = li.merged_weights(model)
    assert next(weights)
    if event == "a merge":
        li.merge(model)
    else:
        with torch.no_grad():
            for parameter in li.adapter_parameters(model).values():
                parameter.add_(1.0)
    with refused(li.StateError, "merged_weights", "q_proj"):
        dict(weights)


def test_what_cannot_be_merged_is_refused_before_the_first() -> None:
    model = fill(li.inject(llama(), CONFIG))
    li.activate(model, None)
    with refused(li.StateError, "activate(model, name)"):
        li.merged_weights(model)
    name = next(iter(li.adapter_parameters(model)))
    with torch.no_grad():
        li.adapter_parameters(model)[name].fill_(float("nan"))
    with refused(li.StateError, "model.layers.0.self_attn.q_proj.weight"):
        li.merged_weights(model, name="default")


@needs_transformers_5
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, ["q_proj", "lm_head"]),
        (of_experts, [expert_rule("out_in"), "q_proj"]),
        pytest.param(fused, ["all-linear"], marks=pytest.mark.recent),  # transformers 5.24
    ],
    ids=["llama", "experts", "fused"],
)
def test_names_of_the_checkpoint_are_those_that_save_pretrained_writes(
    make, targets, loaded, tmp_path
) -> None:
    plain = make()
    if loaded:
        plain.save_pretrained(tmp_path / "base")
        plain = type(plain).from_pretrained(tmp_path / "base")
    model = fill(li.inject(plain, {"rank": 2, "targets": targets}))
    own = [name for name, _ in li.merged_weights(model)]
    received = {n: t.clone() for n, t in li.merged_weights(model, names="checkpoint")}
    li.merge(model, eject=True)
    model.save_pretrained(tmp_path / "merged")
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    assert received.keys() == wanted.keys()
    assert all(same_bits(tensor, wanted[name]) for name, tensor in received.items())
    assert ({*own} == {*received}) is (make is llama)


def test_names_of_a_checkpoint_are_refused_where_none_knows_them() -> None:
    net = fill(li.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}))
    with refused(li.LayerError, "names='checkpoint'"):
        li.merged_weights(net, names="checkpoint")
    with refused(li.StateError, "'vllm'", "'model'", "'checkpoint'"):
        li.merged_weights(net, names="vllm")  # type: ignore[arg-type]

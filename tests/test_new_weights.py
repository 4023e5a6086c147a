"""Weights that no checkpoint had: an adapter that leaves them out is not all of what was trained.

transformers gives such weights random values, other ones in each process.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_inject as li

QV = {"rank": 2, "targets": ["query", "value"]}
Q = {"rank": 2, "targets": ["q_proj"]}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretrained BERT without a head."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A pretrained Llama, whose output head is not tied."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def classifier(path: Path) -> Any:
    return transformers.BertForSequenceClassification.from_pretrained(path, num_labels=3)


def test_a_new_head_that_nobody_trains_is_refused_and_the_remedies_work(encoder: Path) -> None:
    model = classifier(encoder)
    keys = [*model.state_dict()]
    assert "train: ['classifier']" in str(li.plan(model, QV)).replace("\n  ", " ")
    with pytest.raises(li.LayerError, match=r"'classifier\.weight'.*checkpoint") as raised:
        li.inject(model, QV)
    assert [*model.state_dict()] == keys, "nothing has changed"
    line = re.search(r"train: (\[.*?\])", str(raised.value))
    assert line is not None
    assert "leave_new=True" in str(raised.value)
    config = {**QV, "train": eval(line[1])}
    assert "checkpoint" not in str(li.plan(model, config))
    li.inject(model, config)
    assert [*li.adapter_state(model).trained] == ["classifier.weight", "classifier.bias"]
    with pytest.raises(li.LayerError, match=r"'classifier\.weight'"):
        li.inject(model, QV, "a second one, which does not hold what the first one trains")
    assert not li.adapter_state(li.inject(li.eject(model), QV, leave_new=True)).trained


def test_trials_and_searches_ask_the_same_question(encoder: Path) -> None:
    model, batches = classifier(encoder), [torch.arange(8).view(2, 4)]
    space = {"targets": {"qv": QV["targets"]}, "lr": [1e-3, 1e-2], "budget": {"steps": 10}}
    calls = {"forward": lambda ids: model(ids).logits, "loss": lambda y, _: y.square().mean()}
    for ask in (
        lambda **more: li.Trials(model, {"one": li.Trial(QV, lr=1e-3)}, **more),
        lambda **more: li.search(model, space, batches, batches, **calls, **more),
    ):
        with pytest.raises(li.LayerError, match=r"'classifier\.weight'.*leave_new=True"):
            ask()
        assert not li.adapters(model)
        ask(leave_new=True)
        li.eject(model)


def test_what_stays_new_is_named_and_a_bias_of_zeros_may_stay(encoder: Path) -> None:
    """Every process starts from the same zeros."""
    li.inject(classifier(encoder), {**QV, "train": [r"classifier\.weight"]})
    with pytest.raises(li.LayerError, match=r"'classifier\.weight'"):
        li.inject(classifier(encoder), {**QV, "train": [r"classifier\.bias"]})
    on_it = {"rank": 2, "targets": ["all-linear"]}  # an adapter does not hold its weight
    with pytest.raises(li.LayerError, match=r"'classifier\.weight'.*exclude: \['classifier'\]"):
        li.inject(classifier(encoder), on_it)
    li.inject(classifier(encoder), {**on_it, "train": ["classifier"], "exclude": ["classifier"]})


def test_a_pooler_that_the_checkpoint_lacks_is_named_also_on_loading(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")

    def loaded(seed: int = 0, **how: Any) -> Any:
        torch.manual_seed(seed)
        return transformers.BertModel.from_pretrained(tmp_path / "base", **how)

    with pytest.raises(li.LayerError, match=r"'0\.pooler\.dense\.weight'"):
        li.inject(nn.Sequential(loaded()), QV)  # as in sentence-transformers
    li.inject(loaded(add_pooling_layer=False), QV)
    li.save_adapter(li.inject(loaded(1), QV, leave_new=True), tmp_path / "a")
    with pytest.raises(li.FormatError, match=r"'pooler\.dense\.weight'.*leave_new=True"):
        li.load_adapter(loaded(2), tmp_path / "a")
    li.load_adapter(loaded(2), tmp_path / "a", leave_new=True)


def test_a_reward_model_trains_its_new_head_or_is_refused(decoder: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    packed = {"quantization_config": four_bits, "device_map": "cpu"}
    cls = transformers.LlamaForSequenceClassification
    for how in ({}, packed):
        with pytest.raises(li.LayerError, match=re.escape("train: ['score']")):
            li.inject(cls.from_pretrained(decoder, num_labels=1, **how), Q)
        li.inject(transformers.LlamaForCausalLM.from_pretrained(decoder, **how), Q)
    as_peft = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = li.inject(cls.from_pretrained(decoder, num_labels=1), as_peft)
    assert [*li.adapter_state(model).trained] == ["score.weight"]


def resized(model: Any) -> Any:
    model.resize_token_embeddings(44)
    return model


def with_a_head_of_its_own(model: Any) -> Any:
    model.extra = nn.Linear(16, 2)
    return model


def with_a_copied_layer(model: Any) -> Any:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    return model


@pytest.mark.parametrize("change", [resized, with_a_head_of_its_own, with_a_copied_layer])
def test_a_model_whose_weights_were_all_in_the_checkpoint_is_adapted(
    decoder: Path, change: Callable[[Any], Any]
) -> None:
    li.inject(change(transformers.LlamaForCausalLM.from_pretrained(decoder)), Q)


TIED = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
BUFFERED = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=40)
MODELS = [(transformers.LlamaForCausalLM, TIED, "q_proj")]
MODELS += [(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES), "query")]
MODELS += [(transformers.GPT2LMHeadModel, BUFFERED, "c_attn")]


@pytest.mark.parametrize(("cls", "config", "target"), MODELS)
def test_tied_heads_buffers_and_models_from_a_config_are_adapted(
    cls: Any, config: Any, target: str, tmp_path: Path
) -> None:
    model = li.inject(cls(config), {"targets": [target]})
    li.eject(model).save_pretrained(tmp_path / "base")
    li.inject(cls.from_pretrained(tmp_path / "base"), {"targets": [target]})

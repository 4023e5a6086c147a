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
from lora_inject.errors import LayerError

QV = {"rank": 2, "targets": ["query", "value"]}
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


def test_a_new_head_that_nobody_trains_is_refused_and_the_remedy_works(encoder: Path) -> None:
    model = classifier(encoder)
    keys = [*model.state_dict()]
    with pytest.raises(LayerError, match=r"'classifier\.weight'.*checkpoint") as raised:
        li.inject(model, QV)
    assert [*model.state_dict()] == keys, "nothing has changed"
    line = re.search(r"train: (\[.*?\])", str(raised.value))
    assert line is not None
    assert "leave_new=True" in str(raised.value)
    li.inject(model, {**QV, "train": eval(line[1])})
    assert [*li.adapter_state(model).trained] == ["classifier.weight", "classifier.bias"]


def test_a_new_head_can_be_left_on_purpose(encoder: Path) -> None:
    model = classifier(encoder)
    li.inject(model, QV, leave_new=True)
    assert not li.adapter_state(model).trained


def test_trials_and_searches_ask_the_same_question(encoder: Path, tmp_path: Path) -> None:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids).logits

    def loss(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.square().mean()

    model, one = classifier(encoder), {"one": li.Trial(QV, lr=1e-3)}
    space = {"targets": {"qv": QV["targets"]}, "lr": [1e-3, 1e-2], "budget": {"steps": 10}}
    batches = [torch.arange(8).view(2, 4)]
    with pytest.raises(LayerError, match=r"'classifier\.weight'.*leave_new=True"):
        li.Trials(model, one)
    with pytest.raises(LayerError, match=r"'classifier\.weight'.*leave_new=True"):
        li.search(model, space, batches, batches, forward=forward, loss=loss)
    assert not li.adapters(model)
    trials = li.Trials(model, one, leave_new=True)
    trials.step(batches[0], forward=forward, loss=loss)
    trials.save(tmp_path / "trials")
    li.eject(model)
    assert li.Trials.resume(model, tmp_path / "trials").n_steps == {"one": 1}
    li.eject(model)
    calls = {"forward": forward, "loss": loss, "leave_new": True}
    assert li.search(model, space, batches, batches, **calls).config


def test_the_plan_says_that_a_new_head_would_be_refused(encoder: Path) -> None:
    model = classifier(encoder)
    assert "train: ['classifier']" in str(li.plan(model, QV)).replace("\n  ", " ")
    assert "checkpoint" not in str(li.plan(model, {**QV, "train": ["classifier"]}))


def test_a_new_bias_of_zeros_may_stay_as_every_process_starts_from_it(encoder: Path) -> None:
    li.inject(classifier(encoder), {**QV, "train": [r"classifier\.weight"]})
    with pytest.raises(LayerError, match=r"'classifier\.weight'"):
        li.inject(classifier(encoder), {**QV, "train": [r"classifier\.bias"]})


def test_an_adapter_on_a_new_head_does_not_hold_its_weight(encoder: Path) -> None:
    with pytest.raises(LayerError, match=r"'classifier\.weight'") as raised:
        li.inject(classifier(encoder), {"rank": 2, "targets": ["all-linear"]})
    assert "exclude: ['classifier']" in str(raised.value)
    config = {"rank": 2, "targets": ["all-linear"], "train": ["classifier"]}
    li.inject(classifier(encoder), {**config, "exclude": ["classifier"]})


def test_a_head_of_several_layers_is_one_line(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES)
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    cls = transformers.RobertaForSequenceClassification
    model = cls.from_pretrained(tmp_path / "base")
    with pytest.raises(LayerError, match=re.escape("train: ['classifier']")):
        li.inject(model, QV)


def test_a_pooler_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    with pytest.raises(LayerError, match=r"'pooler\.dense\.weight'"):
        li.inject(model, QV)
    inside = nn.Sequential(model)  # as in sentence-transformers
    with pytest.raises(LayerError, match=r"'0\.pooler\.dense\.weight'"):
        li.inject(inside, QV)
    bare = transformers.BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    li.inject(bare, QV)


def test_a_pooler_that_nothing_uses_may_be_another_one_on_loading(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")

    def loaded(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.BertModel.from_pretrained(tmp_path / "base")

    li.save_adapter(li.inject(loaded(1), QV, leave_new=True), tmp_path / "a")
    with pytest.raises(li.FormatError, match=r"'pooler\.dense\.weight'.*leave_new=True"):
        li.load_adapter(loaded(2), tmp_path / "a")
    li.load_adapter(loaded(2), tmp_path / "a", leave_new=True)


def test_another_head_under_an_adapter_is_noticed(encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier(encoder).save_pretrained(tmp_path / "tuned")
    li.save_adapter(li.inject(classifier(tmp_path / "tuned"), QV), tmp_path / "a")
    li.load_adapter(classifier(tmp_path / "tuned"), tmp_path / "a")
    with pytest.raises(li.FormatError, match=r"another base: 'classifier\.weight'"):
        li.load_adapter(classifier(encoder), tmp_path / "a")


def test_a_reward_model_trains_its_new_head_or_is_refused(decoder: Path) -> None:
    cls = transformers.LlamaForSequenceClassification
    with pytest.raises(LayerError, match=re.escape("train: ['score']")):
        li.inject(cls.from_pretrained(decoder, num_labels=1), {"targets": ["q_proj"]})
    peft = pytest.importorskip("peft")
    as_peft = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = li.inject(cls.from_pretrained(decoder, num_labels=1), as_peft)
    assert [*li.adapter_state(model).trained] == ["score.weight"]


def test_a_quantized_base_has_its_new_head_trained_too(decoder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)

    def loaded(cls: Any, **how: Any) -> Any:
        return cls.from_pretrained(decoder, quantization_config=four_bits, device_map="cpu", **how)

    config = {"rank": 2, "targets": ["q_proj"]}
    reward = loaded(transformers.LlamaForSequenceClassification, num_labels=1)
    with pytest.raises(LayerError, match=re.escape("train: ['score']")):
        li.inject(reward, config)
    li.inject(loaded(transformers.LlamaForCausalLM), config)


# What is no new weight ----------------------------------------------------------------------------


def resized(model: Any) -> Any:
    model.resize_token_embeddings(44)
    return model


def with_a_head_of_its_own(model: Any) -> Any:
    model.extra = nn.Linear(16, 2)
    return model


def with_a_copied_layer(model: Any) -> Any:
    layers = model.model.layers
    layers.append(copy.deepcopy(layers[0]))
    return model


def cast(model: Any) -> Any:
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        copy.deepcopy,
        resized,
        with_a_head_of_its_own,
        with_a_copied_layer,
        cast,
    ],
    ids=["as loaded", "copied", "resized", "own head", "a copied layer", "cast"],
)
def test_a_model_whose_weights_were_all_in_the_checkpoint_is_adapted(
    decoder: Path, change: Callable[[Any], Any]
) -> None:
    model = change(transformers.LlamaForCausalLM.from_pretrained(decoder))
    li.inject(model, {"rank": 2, "targets": ["q_proj"]})


def test_tied_heads_and_models_from_a_config_are_adapted(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    model = li.inject(transformers.LlamaForCausalLM(config), {"targets": ["q_proj"]})
    li.eject(model).save_pretrained(tmp_path / "tied")
    tied = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tied")
    li.inject(tied, {"rank": 2, "targets": ["q_proj"]})
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "m")
    li.inject(transformers.BertForMaskedLM.from_pretrained(tmp_path / "m"), QV)


def test_buffers_that_no_checkpoint_holds_are_no_new_weights(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    li.inject(loaded, {"rank": 2, "targets": ["c_attn"]})


def test_a_second_adapter_does_not_hold_what_the_first_one_trains(encoder: Path) -> None:
    model = li.inject(classifier(encoder), {**QV, "train": ["classifier"]}, "first")
    with pytest.raises(LayerError, match=r"'classifier\.weight'"):
        li.inject(model, QV, "second")

"""Full copies of tied weights, exchanged with PEFT, which knows them by their names one by one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import merged_on_disk
from helpers.models import tiny_llama
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.adapter.state import AdapterState
from lora_inject.formats import read_adapter, write_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_llama() -> Any:
    sizes = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 1}
    return tiny_llama(**sizes, tie_word_embeddings=True).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(6)[None]).logits  # type: ignore[no-any-return]


def off(found: Tensor, due: Tensor) -> float:
    return float((found - due).abs().max())


def with_copies(copies: dict[str, Tensor]) -> Any:
    """The plain model with these tensors in place, tied to nothing."""
    model = copy.deepcopy(tied_llama())
    for name, value in copies.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = nn.Parameter(value.clone())
    return model


def test_peft_reads_a_tied_copy_under_each_of_its_names(tmp_path: Path) -> None:
    model, value = tied_llama(), torch.randn(30, 12)
    copies = {EMBEDDING: value, HEAD: value}
    path = write_adapter(
        AdapterState({}, copies),
        tmp_path / "a",
        module_names=[name for name, _ in model.named_modules()],
        tensor_names=list(model.state_dict()),
    )
    read = peft.PeftModel.from_pretrained(model, path)
    assert off(logits(read), logits(with_copies(copies))) < 1e-6


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_of_peft_are_read_live_and_merged_on_disk(saved: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, r=2)
    wrapped = peft.get_peft_model(tied_llama(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    state = read_adapter(tmp_path / "peft")
    names = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
    assert {*state.trained} == {names[name] for name in saved}
    assert off(logits(wrapped), logits(with_copies(dict(state.trained)))) < 1e-6
    model = li.load_adapter(tied_llama(), tmp_path / "peft")
    assert off(logits(model), logits(wrapped)) < 1e-6
    li.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "ours")
    assert off(logits(again), logits(wrapped)) < 1e-6
    merged = merged_on_disk(tied_llama(), tmp_path / "peft", tmp_path)
    assert off(logits(merged), logits(wrapped)) < 1e-6


def test_an_optimizer_gets_the_copy_of_a_tied_tensor_once() -> None:
    model = li.inject(tied_llama(), {"rank": 2, "targets": ["q_proj"], "train": ["lm_head"]})
    found = li.adapter_parameters(model)
    assert EMBEDDING in found
    assert len({id(parameter) for parameter in found.values()}) == len(found)


@pytest.mark.parametrize("train", [r"model\.embed_tokens\.weight", r"lm_head\.weight"])
def test_a_tied_copy_that_was_trained_is_read_the_same_by_peft(train: str, tmp_path: Path) -> None:
    model = li.inject(tied_llama(), {"rank": 2, "targets": ["q_proj"], "train": [train]})
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    li.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "ours")
    assert off(logits(again), logits(model)) < 1e-6
    assert off(logits(li.load_adapter(tied_llama(), tmp_path / "ours")), logits(model)) < 1e-6
    merged = merged_on_disk(tied_llama(), tmp_path / "ours", tmp_path)
    assert off(logits(merged), logits(model)) < 1e-6


@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_rows_of_peft_follow_the_tie_of_the_input_embedding_only(named, tmp_path: Path) -> None:
    rows = {name: [1, 4] for name in named}
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows, r=2)
    wrapped = peft.get_peft_model(tied_llama(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    model = li.load_adapter(tied_llama(), tmp_path / "peft")
    assert off(logits(model), logits(wrapped)) < 1e-6
    li.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "ours")
    assert off(logits(again), logits(wrapped)) < 1e-6

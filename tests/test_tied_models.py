"""Models with tied weights: merged, saved and loaded by their own class again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.reference import (
    EXACT,
    IDS,
    adapted,
    base_state,
    config,
    dense,
    gpt2,
    llama,
    logits,
    refused,
)
from torch import Tensor

import lora_inject as li


def t5(tied: bool) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    made = T5Config(**sizes, **tokens, dropout_rate=0.0, tie_word_embeddings=tied)
    return T5ForConditionalGeneration(made).eval().double()


def t5_logits(model: Any) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


HEADS = {"llama": "embed_tokens", "gpt2": "wte"}


BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("which", ["head", "embedding", "both"])
@pytest.mark.parametrize("family", BUILD)
def test_a_tied_model_merges_saves_and_reloads(family, which, undo, tmp_path) -> None:
    plain = BUILD[family]()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    targets = {"head": ["lm_head"], "embedding": [HEADS[family]]}
    model = adapted(plain, *targets.get(which, ["lm_head", HEADS[family]]))
    ends = {"head": model.lm_head, "embedding": model.get_input_embeddings()}
    wanted = logits(dense(plain, model))
    assert error(logits(plain), wanted) > 0.01
    assert error(logits(model), wanted) < EXACT
    before = snapshot(model)
    report = li.merge(model, undo=undo)
    assert report.n_tensors == (2 if which == "both" else 1)
    for name in ends.keys() - {which} if which != "both" else ():
        assert same_bits(ends[name].weight, plain.lm_head.weight), "the other end stays"
    assert ends["head"].weight is not ends["embedding"].weight
    assert model.config.tie_word_embeddings is False
    assert error(logits(model), wanted) < EXACT
    done = copy.deepcopy(model)
    li.eject(done)
    done.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert error(logits(again), wanted) < EXACT
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    if undo:
        li.unmerge(model)
        assert snapshot(model) == before
        assert ends["head"]._parameters["weight"] is ends["embedding"]._parameters["weight"]
        assert model.config.tie_word_embeddings is True


T5 = [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q", "embed_tokens"]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", T5, ids=str)
def test_a_t5_merges_saves_and_reloads(targets: list[str], tied: bool, tmp_path: Path) -> None:
    plain = t5(tied)
    # transformers ties a T5 whatever the flag says; the flag decides on scaling the outputs.
    assert plain.lm_head.weight is plain.shared.weight
    says = plain.config.tie_word_embeddings
    model = adapted(plain, *targets)
    assert li.unreached(model, lambda: t5_logits(model)) == []
    wanted = t5_logits(dense(plain, model))
    assert error(t5_logits(plain), wanted) > 0.001
    assert error(t5_logits(model), wanted) < EXACT
    li.merge(model)
    assert error(t5_logits(model), wanted) < EXACT
    done = copy.deepcopy(model)
    li.eject(done)
    done.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert error(t5_logits(again), wanted) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())
    holders = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens]
    assert len({id(m._parameters["weight"]) for m in holders}) == 1
    assert model.lm_head._parameters["weight"] is holders[0]._parameters["weight"]
    assert model.config.tie_word_embeddings is says


def test_a_tied_name_that_is_never_called_is_refused_by_a_probe() -> None:
    model = t5(tied=True)
    run = lambda: li.inject(model, config("shared"), probe=lambda: t5_logits(model))  # noqa: E731
    refused(model, run, li.LayerError, "'shared'.*neither reached its layer nor read")


def test_untying_a_model_whose_forward_reads_the_flag_is_refused() -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    sparse = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_experts": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "num_decoder_layers": 1}
    made = SwitchTransformersConfig(**sizes, **sparse, **tokens, tie_word_embeddings=True)
    model = SwitchTransformersForConditionalGeneration(made).eval()
    assert model.lm_head.weight is model.shared.weight
    fill(li.inject(model, config("lm_head")))
    # It scales what goes into a tied head: untied, merged would not equal unmerged.
    refused(model, lambda: li.merge(model), li.LayerError, "tie_word_embeddings")

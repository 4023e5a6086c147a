"""Tied weights in a live model: known by their memory, whatever a config says.

Merging unties them where it must, unmerging ties them again, and what is saved loads again.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPHA, RANK, TOLERANCE, error, fill, same_bits, snapshot
from helpers.reference import (
    EXACT,
    IDS,
    adapted,
    base_state,
    config,
    dense,
    gpt2,
    gpt2_of_two_layers,
    llama,
    logits,
    refused,
    with_deltas,
)
from torch import Tensor, nn

import lora_inject as li

# -------------------------------------------------------- two Parameters over one memory

V, D = 7, 5
TOKENS = torch.tensor([[0, 3, 5], [2, 6, 1]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


def assigned(model: Any) -> None:
    """What a tied checkpoint gives, loaded with `assign=True`."""
    W = model.emb.weight.detach()
    model.load_state_dict({"emb.weight": W, "head.weight": W}, assign=True)


TIES: dict[str, Callable[[Any], None]] = {
    "assign": assigned,
    "another Parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.emb.weight)),
    "data": lambda m: setattr(m.head.weight, "data", m.emb.weight.data),
}


@pytest.mark.parametrize("targets", [["head"], ["emb"], ["head", "emb"]], ids=str)
@pytest.mark.parametrize("tie", TIES)
def test_merging_unties_and_unmerging_ties_again(tie: str, targets: list[str]) -> None:
    torch.manual_seed(0)
    plain = Tied().double()
    TIES[tie](plain)
    assert plain.head.weight is not plain.emb.weight
    assert plain.head.weight.data_ptr() == plain.emb.weight.data_ptr()
    model: Any = fill(li.inject(plain, {"rank": 2, "alpha": 3.0, "targets": targets}))
    wide: Any = copy.deepcopy(model)
    li.eject(wide)
    wide.head.weight = nn.Parameter(wide.head.weight.detach().clone())
    wide = with_deltas(wide, model)
    assert error(model(TOKENS), wide(TOKENS)) < 1e-12
    before, emb = snapshot(model), model.emb._parameters["weight"].detach().clone()
    li.merge(model)
    assert error(model(TOKENS), wide(TOKENS)) < 1e-12
    if targets == ["head"]:
        assert same_bits(model.emb._parameters["weight"], emb)
    li.unmerge(model)
    assert snapshot(model) == before
    head, table = (m._parameters["weight"] for m in (model.head, model.emb))
    assert head.data_ptr() == table.data_ptr()


def test_a_trained_copy_is_read_under_both_names() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    TIES["assign"](model)
    li.inject(model, {"targets": [], "train": [r"emb\.weight"]})
    with torch.no_grad():
        li.adapter_parameters(model)["emb.weight"].normal_()
    T = li.adapter_parameters(model)["emb.weight"]
    assert error(model(TOKENS), T[TOKENS] @ T.t()) < 1e-12


def test_merging_into_memory_that_overlaps_in_part_is_refused() -> None:
    model = Tied()
    whole = torch.randn(2 * V, D)
    model.emb.weight, model.head.weight = nn.Parameter(whole[:V]), nn.Parameter(whole[3 : V + 3])
    for name, other in (("head", "emb"), ("emb", "head")):
        fill(li.inject(model, {"rank": 2, "targets": [name]}))
        before = snapshot(model)
        with pytest.raises(li.LayerError, match=rf"'{name}\.weight'.*memory.*'{other}\.weight'"):
            li.merge(model)
        assert snapshot(model) == before
        li.eject(model)


@pytest.mark.parametrize("rows", [V, 2])
def test_merging_into_memory_that_a_buffer_holds_is_refused(rows: int) -> None:
    model = Tied()
    model.register_buffer("kept", model.head.weight.detach()[:rows])
    fill(li.inject(model, {"rank": 2, "targets": ["head"]}))
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"'head\.weight'.*memory.*'kept'"):
        li.merge(model)
    assert snapshot(model) == before


def test_neighbors_in_one_buffer_are_not_tied() -> None:
    model = Tied()
    whole = torch.randn(2 * V, D)
    model.emb.weight, model.head.weight = nn.Parameter(whole[:V]), nn.Parameter(whole[V:])
    li.inject(model, {"rank": 2, "targets": ["head", "emb"]})
    assert li.plan(model, {"rank": 1, "targets": ["head"]}).tied == ()


@pytest.mark.parametrize("untie", ["merge", "load"])
def test_eject_gives_the_flag_back_under_every_name_of_a_tie(untie: str) -> None:
    model = Tied()
    model.head.weight = model.emb.weight
    fill(li.inject(model, {"rank": 2, "targets": ["head"]}))
    if untie == "merge":
        li.merge(model)
    else:
        values = {name: torch.randn(V, D) for name in ("emb.weight", "head.weight")}
        model.load_state_dict(values, assign=True)
    li.eject(model)
    assert model.head.weight is not model.emb.weight
    assert model.head.weight.requires_grad
    assert model.emb.weight.requires_grad


# ------------------------------------------------- models of transformers: merge, save, reload


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


# ------------------------------------------------------------------------------------- resizing

NUMBERS = {"rank": RANK, "alpha": ALPHA}


@pytest.mark.parametrize("says", [True, False])
def test_tied_weight_is_known_by_the_tensor_not_by_the_config(says: bool) -> None:
    model = gpt2_of_two_layers(tie_word_embeddings=not says)
    model.config.tie_word_embeddings = says
    assert (model.lm_head.weight is model.transformer.wte.weight) is not says
    fill(li.inject(model, {**NUMBERS, "targets": ["wte"]}))
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
    model = fill(li.inject(gpt2_of_two_layers(), {**NUMBERS, **config}))
    ids = torch.arange(10).view(2, 5)
    wanted, before = model(ids).logits, snapshot(model)
    with pytest.raises(li.LayerError, match="Eject first, resize, then inject again"):
        model.get_submodule(part).resize_token_embeddings(20)
    assert snapshot(model) == before
    assert same_bits(model(ids).logits, wanted)
    li.eject(model)
    model.resize_token_embeddings(20)
    fill(li.inject(model, {**NUMBERS, **config}))
    assert model(ids).logits.shape == (2, 5, 20)


def test_resize_of_what_is_not_adapted() -> None:
    model = fill(li.inject(gpt2_of_two_layers(), {**NUMBERS, "targets": ["c_attn"]}))
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids).logits
    model.resize_token_embeddings(20)
    assert error(model(ids).logits[..., :13], wanted) < TOLERANCE[torch.float32]
    assert model.lm_head.weight is model.transformer.wte.weight

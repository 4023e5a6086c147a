"""One test for each way in which PEFT 0.21.2 was seen to fail.

Each shows that it is right here (against a dense float64 reference that is formed by hand, and
gradients against finite differences of that reference) or that it is refused before anything
changed.

Where PEFT has a feature that does not exist here, the nearest thing that does exist is tested:

there                           | here
--------------------------------|----------------------------------------------------------
ensure_weight_tying             | none: head and embedding are two sites, merging unties them
pissa_niter_N (random svd)      | pissa only, exact, and its start travels with the adapter
layer_replication               | none: one layer that runs several times is the nearest
add_weighted_adapter            | activate() with weights; it makes no third adapter
low_cpu_mem_usage               | none: a load with missing tensors, and a base without values
set_scale                       | none: alpha belongs to the site; weights to the selection
rank_pattern, alpha_pattern     | rules, first match wins
layers_to_transform             | a pattern that names the layers
modules_to_save                 | train
all-linear                      | none: a pattern says what is meant
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill, same_bits, snapshot
from helpers.reference import (
    ALPHA,
    EXACT,
    IDS,
    LLAMA,
    RANK,
    SCALE,
    adapted,
    config,
    dense,
    gpt2,
    hold,
    llama,
    logits,
    random,
    refused,
    saved,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
)

import lora_inject as li

# ------------------------------------------------------------------------- wrong numbers, no error


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return found


class Concatenated(nn.Module):
    """Reads the weights of its children in one product, and calls neither."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(5, 4, bias=False)
        self.k = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q.weight, self.k.weight]))


def test_attentions_out_proj_gets_its_delta_once() -> None:
    plain, x = Attention().double(), random(2, 3, 8)
    model = adapted(plain, "attn")
    assert "attn.out_proj" in li.adapters(model)["default"].sites
    hold(plain, model, lambda m: m(x))


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]], ids=str)
def test_an_encoder_layer_in_eval_mode_is_adapted(targets: list[str]) -> None:
    plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double().eval()
    model, x = adapted(plain, *targets).eval(), random(2, 3, 8)
    hold(plain, model, lambda m: m(x))
    with torch.no_grad():  # torch's fast path is taken here
        assert error(model(x), dense(plain, model)(x)) < EXACT


def test_a_parent_that_concatenates_its_childrens_weights_is_refused_or_adapted() -> None:
    plain, x = Concatenated().double(), random(3, 5)
    hold(plain, adapted(plain, "q", "k"), lambda m: m(x))
    hold(plain, adapted(plain, r"q\.weight", r"k\.weight"), lambda m: m(x))


def test_out_proj_named_alone_is_adapted() -> None:
    plain, x = Attention().double(), random(2, 3, 8)
    model = adapted(plain, "out_proj")
    assert li.unreached(model, lambda: model(x)) == []
    hold(plain, model, lambda m: m(x))


def test_attention_matched_with_its_own_child_is_adapted_once_or_refused(tmp_path: Path) -> None:
    plain, x = Attention().double(), random(2, 3, 8)
    bare = copy.deepcopy(plain)
    refused(
        bare,
        lambda: li.inject(bare, config("attn", "out_proj")),
        li.MatchError,
        r"rule 2.*taken by rule 1",
    )
    model = adapted(plain, "out_proj", "attn")
    assert {*li.adapters(model)["default"].sites} == {"attn.out_proj", "attn.in_proj_weight"}
    hold(plain, model, lambda m: m(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())
    _, file = saved(model, tmp_path, "native")
    shapes = sorted(tuple(t.shape) for t in load_file(file).values())
    assert shapes == [(2, 8), (2, 8), (8, 2), (24, 2)]


@pytest.mark.parametrize("targets", [["a", "b"], ["b"], ["a"], ["[ab]"]], ids=str)
def test_one_linear_under_two_names_is_one_site(targets: list[str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(torch.tanh(self.a(x)))
            return found

    plain, x = Twice().double(), random(3, 5)
    if targets == ["a", "b"]:
        bare = copy.deepcopy(plain)
        refusal = r"rule 2 \('b'\).*taken by rule 1"
        refused(bare, lambda: li.inject(bare, config(*targets)), li.MatchError, refusal)
        return
    model = adapted(plain, *targets)
    assert [*li.adapters(model)["default"].sites] == ["a"]

    def dense_run(m: nn.Module) -> Tensor:
        m.b = m.a  # type: ignore[assignment]
        found: Tensor = m(x)
        return found

    hold(plain, model, dense_run)


class TiedHead(nn.Module):
    """Tied by hand, with no config that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.emb(ids))
        return found


@pytest.mark.parametrize("targets", [["head"], ["emb"]], ids=str)
def test_merging_a_head_tied_by_hand_leaves_the_embedding(targets: list[str]) -> None:
    plain = TiedHead().double()
    model = adapted(plain, *targets)
    other = "emb" if targets == ["head"] else "head"
    bits = plain.get_submodule(other).weight.detach().clone()  # type: ignore[operator]
    hold(plain, model, lambda m: m(IDS))
    li.merge(model)
    assert same_bits(model.get_submodule(other).weight, bits)
    assert model.head.weight is not model.emb.weight


def test_merging_a_tied_head_and_embedding_adds_each_delta_once() -> None:
    plain = llama(tie_word_embeddings=True)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    model = adapted(plain, "lm_head", "embed_tokens")
    hold(plain, model, logits, LLAMA)
    wanted = dense(plain, model)
    li.merge(model)
    assert error(model.lm_head.weight, wanted.lm_head.weight) < EXACT  # type: ignore[union-attr]
    table = wanted.get_submodule("model.embed_tokens").weight
    assert error(model.model.embed_tokens.weight, table) < EXACT  # type: ignore[arg-type]


def test_a_subclass_that_scales_its_weight_merges_to_the_same() -> None:
    class Tenth(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 0.1, self.bias)

    plain, x = nn.Sequential(Tenth(5, 4)).double(), random(3, 5)
    hold(plain, adapted(plain, "0"), lambda m: m(x))


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "dilation 2, padding same": {"dilation": 2, "padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "padding 2, dilation 2": {"padding": 2, "dilation": 2},
}


@pytest.mark.parametrize("how", CONVOLUTIONS)
def test_dilation_and_padding_mode_of_a_convolution_are_kept(how: str) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 3, **CONVOLUTIONS[how])).double()
    model, x = adapted(plain, "0"), random(1, 2, 6, 5)
    hold(plain, model, lambda m: m(x))


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_pissa_adapter_loads_to_the_same_numbers_under_any_seed(
    layout: str, tmp_path: Path
) -> None:
    plain = llama()
    model = li.inject(copy.deepcopy(plain), config("q_proj", "v_proj", init="pissa"))
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    path, _ = saved(model, tmp_path, layout)
    torch.manual_seed(12345)
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert error(logits(again), logits(model)) < EXACT
    assert error(logits(plain), logits(model)) > 0.01


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_taking_off_a_pissa_or_olora_adapter_restores_the_base(init: str) -> None:
    model = llama()
    before = snapshot(model)
    li.inject(model, config("q_proj", init=init))
    li.inject(model, config("q_proj", init=init), "second")
    with torch.no_grad():
        li.adapter_parameters(model, "second")["model.layers.0.self_attn.q_proj.lora_B"].add_(1.0)
    li.activate(model, {"default": 0.5, "second": 0.5})
    li.eject(model)
    assert snapshot(model) == before


def test_loading_over_a_name_in_use_is_refused(tmp_path: Path) -> None:
    plain = llama()
    other = adapted(plain, "q_proj", alpha=64)
    li.save_adapter(other, tmp_path / "alpha64")
    model = adapted(plain, "q_proj", alpha=8)
    refused(
        model,
        lambda: li.load_adapter(model, tmp_path / "alpha64", "default"),
        li.StateError,
        "'default'.*has one of that name",
    )
    li.eject(model)
    li.load_adapter(model, tmp_path / "alpha64", "default")
    assert {site.scale for site in li.adapter_state(model).sites.values()} == {32.0}
    assert error(logits(model), logits(other)) < EXACT


def test_merging_folds_every_active_adapter_unless_one_is_named() -> None:
    plain = llama()
    model = adapted(plain, "q_proj")
    fill(li.inject(model, config("q_proj", "v_proj"), "b"), "b")
    li.activate(model, {"default": 1.0, "b": 1.0})
    both = logits(dense(dense(plain, model), model, "b"))
    report = li.merge(model)
    assert [name for name, _ in report.adapters] == ["default", "b"]
    assert error(logits(model), both) < EXACT
    li.unmerge(model)
    # Naming one is a statement; the other is then not active, and cannot be while merged.
    assert li.merge(model, name="default").adapters == (("default", 1.0),)
    assert error(logits(model), logits(dense(plain, model_state_of(plain, model)))) < EXACT
    refused(model, lambda: li.activate(model, "b"), li.StateError, "unmerge")
    li.unmerge(model)
    assert error(logits(model), both) < EXACT


def model_state_of(plain: nn.Module, merged: nn.Module) -> nn.Module:
    """A copy of a merged model, unmerged, so that its adapters can be read."""
    again = copy.deepcopy(merged)
    li.unmerge(again)
    return again


@pytest.mark.parametrize(
    "run",
    [
        lambda m: li.merge(m, name="typo"),
        lambda m: li.merge(m, name={"default": 1.0, "typo": 1.0}),
        lambda m: li.activate(m, "typo"),
        lambda m: li.train_only(m, "typo"),
        lambda m: li.eject(m, "typo"),
    ],
    ids=["merge", "merge a mix", "activate", "train_only", "eject"],
)
def test_a_misspelt_adapter_is_refused_by_every_verb(run: Callable[[nn.Module], Any]) -> None:
    model = adapted(llama(), "q_proj")
    refused(model, lambda: run(model), li.StateError, "'typo'")


def test_merging_while_disabled_is_refused() -> None:
    model = adapted(llama(), "q_proj")
    with li.disabled(model):
        refused(model, lambda: li.merge(model), li.StateError, "Leave the context")
    li.activate(model, None)
    refused(model, lambda: li.merge(model), li.StateError, "no adapter is active|Nothing is active")


def test_a_layer_that_runs_several_times_merges_to_the_same() -> None:
    plain = llama()
    layers = plain.model.layers
    plain.model.layers = nn.ModuleList([layers[0], layers[1], layers[0], layers[1]])
    plain.config.num_hidden_layers = 4
    plain.config.use_cache = False
    model = adapted(plain, "q_proj", r"mlp\.down_proj")
    assert len(li.adapters(model)["default"].sites) == 4
    hold(plain, model, logits, LLAMA)


@pytest.mark.parametrize("undo", [True, False])
def test_adapters_changed_while_merged_do_not_change_what_unmerge_restores(undo: bool) -> None:
    plain = llama()
    model = adapted(plain, "q_proj")
    held = [p for n, p in model.named_parameters() if "lora_" in n]
    before = logits(model)
    li.merge(model, undo=undo)
    with torch.no_grad():
        for parameter in held:
            parameter.mul_(3.0)
    assert error(logits(model), before) < EXACT
    if not undo:
        refused(model, lambda: li.unmerge(model), li.StateError, "undo=False")
        return
    li.unmerge(model)
    kept = {key: t for key, t in model.state_dict().items() if "lora_" not in key}
    assert all(same_bits(t, kept[key]) for key, t in plain.state_dict().items())


@pytest.mark.parametrize("context", ["routed", "disabled"])
def test_a_forward_that_raises_leaves_the_selection_as_it_was(context: str) -> None:
    model = adapted(llama(), "q_proj")
    adapter = logits(model)

    def inside() -> None:
        rows = [None, "default"]
        with li.routed(model, rows) if context == "routed" else li.disabled(model):
            model(torch.full((2, 4), 99))

    with pytest.raises(IndexError):
        inside()
    assert same_bits(logits(model), adapter)


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_load_with_missing_tensors_is_refused(layout: str, tmp_path: Path) -> None:
    plain = llama()
    path, file = saved(adapted(plain, "q_proj"), tmp_path, layout)
    drop_tensors(file, lambda key: "layers.1" in key and ("lora_A" in key or key[0] == "A"))
    refused(plain, lambda: li.load_adapter(plain, path), li.FormatError, "layers.1")
    assert not any(p.is_meta for p in plain.parameters())


def drop_tensors(file: Path, gone: Callable[[str], bool]) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    held = load_file(file)
    kept = {key: t for key, t in held.items() if not gone(key)}
    assert 0 < len(kept) < len(held)
    save_file(kept, file, metadata)


def test_nan_in_an_adapter_is_not_merged() -> None:
    model = adapted(llama(), "q_proj")
    with torch.no_grad():
        li.adapter_parameters(model)["model.layers.1.self_attn.q_proj.lora_B"][0, 0] = torch.nan
    refused(model, lambda: li.merge(model), li.StateError, "layers.1.self_attn.q_proj.*NaN")


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_half_of_one_and_half_of_another_is_the_sum_of_both(scaling: str) -> None:
    plain = nn.Sequential()
    plain.add_module("lora_in", nn.Linear(6, 5))
    plain = plain.double()
    alpha = ALPHA if scaling == "standard" else SCALE * RANK**0.5
    model = adapted(plain, "lora_in", scaling=scaling, alpha=alpha)
    fill(li.inject(model, config("lora_in", scaling=scaling, alpha=alpha), "b"), "b")
    x = random(3, 6)
    halves = dense(dense(plain, model, weight=0.5), model, "b", 0.5)
    li.activate(model, {"default": 0.5, "b": 0.5})
    assert error(model(x), halves(x)) < EXACT
    li.merge(model)
    assert error(model.lora_in.weight, halves.lora_in.weight) < EXACT  # type: ignore[union-attr]


def test_tensors_that_the_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    deep = adapted(llama(num_hidden_layers=3), "q_proj")
    li.save_adapter(deep, tmp_path / "deep")
    shallow = llama()
    refused(
        shallow,
        lambda: li.load_adapter(shallow, tmp_path / "deep", base="any"),
        li.FormatError,
        r"layers\.2\.self_attn\.q_proj.*no such module",
    )
    # A PEFT file with tensors of a k_proj that its config does not target.
    li.save_adapter(adapted(llama(), "q_proj"), tmp_path / "extra")
    file = tmp_path / "extra" / "adapter_model.safetensors"
    stem = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    save_file({**load_file(file), stem: torch.zeros(2, 8)}, file, {"format": "pt"})
    plain = llama()
    run = lambda: li.load_adapter(plain, tmp_path / "extra")  # noqa: E731
    refused(plain, run, li.FormatError, "k_proj")


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    li.save_adapter(adapted(llama(), "q_proj"), tmp_path / "a")
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.normal_()
    run = lambda: li.load_adapter(other, tmp_path / "a")  # noqa: E731
    refused(other, run, li.FormatError, "another base.*layers.0.self_attn.q_proj")


def test_a_second_adapter_from_disk_stands_beside_the_first(tmp_path: Path) -> None:
    base = llama()
    models = [adapted(base, "q_proj"), adapted(base, "q_proj")]
    for i, model in enumerate(models):
        li.save_adapter(model, tmp_path / str(i))
    loaded = li.load_adapter(copy.deepcopy(base), tmp_path / "0")
    first = logits(loaded)
    run = lambda: li.load_adapter(loaded, tmp_path / "1")  # noqa: E731
    refused(loaded, run, li.StateError, "has one of that name")
    li.load_adapter(loaded, tmp_path / "1", "second")
    assert same_bits(logits(loaded), first)
    li.activate(loaded, "second")
    assert error(logits(loaded), logits(models[1])) < EXACT


def test_injecting_twice_under_one_name_is_refused() -> None:
    model = adapted(llama(), "q_proj")
    run = lambda: li.inject(model, config("q_proj"))  # noqa: E731
    refused(model, run, li.StateError, "has one of that name")


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_an_adapter_named_like_a_module_leaves_the_others_file(layout: str, tmp_path: Path) -> None:
    model = adapted(llama(), "q_proj", "down_proj")
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    _, before = saved(model, tmp_path / "before", layout)
    fill(li.inject(model, config("q_proj"), "mlp"), "mlp")
    _, after = saved(model, tmp_path / "after", layout)
    assert len(load_file(after)) == 8
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("target", ["embed_tokens", r"model\.embed_tokens"])
def test_an_adapter_of_the_embedding_does_not_carry_the_base(target: str, tmp_path: Path) -> None:
    plain = llama()
    model = adapted(plain, target)
    li.save_adapter(model, tmp_path / "a")
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted(tuple(t.shape) for t in held.values()) == [(2, 13), (8, 2)]
    again = copy.deepcopy(plain)
    table = again.model.embed_tokens.weight
    bits = table.detach().clone()
    li.load_adapter(again, tmp_path / "a")
    assert again.model.embed_tokens._parameters["weight"] is table
    assert same_bits(table, bits)
    assert error(logits(again), logits(model)) < EXACT


def test_a_peft_file_whose_base_embedding_differs_is_refused(tmp_path: Path) -> None:
    plain = llama()
    li.save_adapter(adapted(plain, "embed_tokens"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(file), key: torch.zeros(13, 8)}, file, {"format": "pt"})
    run = lambda: li.load_adapter(plain, tmp_path / "a")  # noqa: E731
    refused(plain, run, li.FormatError, "embed_tokens")


# ------------------------------------------------------------------------------------- targeting


def test_one_misspelt_target_of_two_is_refused() -> None:
    model = llama()
    run = lambda: li.inject(model, config("q_proj", "v_prj"))  # noqa: E731
    refused(model, run, li.MatchError, r"'v_prj'.*Nearest: .*v_proj")


def test_entries_of_a_list_are_regexes() -> None:
    sites = {s.name for s in li.plan(llama(), config("layers.*.q_proj", "v_proj")).sites}
    stem = "model.layers.{}.self_attn.{}"
    assert sites == {stem.format(i, p) for i in (0, 1) for p in ("q_proj", "v_proj")}


def test_layer_1_means_layer_1() -> None:
    model = llama(num_hidden_layers=12)
    exact = li.plan(model, config(r"layers\.1\..*q_proj"))
    assert [s.name for s in exact.sites] == ["model.layers.1.self_attn.q_proj"]
    # Where the regex itself says so, the plan shows it and a stated count refuses it.
    loose = config(r"layers.1.*q_proj", expect={"sites": 1})
    refused(model, lambda: li.inject(model, loose), li.MatchError, "sites.*3")
    loose.pop("expect")
    assert "{1,10..11}" in str(li.plan(model, loose))


def test_a_dead_branch_of_a_pattern_is_found_by_a_stated_count() -> None:
    model = llama()
    counted = config("(q|k|w)_proj", expect={"sites": 6})
    refused(model, lambda: li.inject(model, counted), li.MatchError, "sites.*4")
    listed = config("q_proj", "k_proj", "w_proj")
    refused(model, lambda: li.inject(model, listed), li.MatchError, "'w_proj'")


def test_a_layer_index_holds_beside_full_names() -> None:
    model = llama()
    named = li.plan(model, config(r"^model\.layers\.0\.self_attn\.q_proj"))
    assert [s.name for s in named.sites] == ["model.layers.0.self_attn.q_proj"]
    absent = config(r"layers\.0\..*q_proj", r"layers\.7\..*q_proj")
    refused(model, lambda: li.inject(model, absent), li.MatchError, r"layers\\\.7")


def test_a_narrower_rule_after_a_wide_one_is_refused() -> None:
    model = llama()
    wide, narrow = {"match": "q_proj", "rank": 4}, {"match": r"layers\.0\..*q_proj", "rank": 3}
    dead = config(wide, narrow)
    refused(model, lambda: li.inject(model, dead), li.MatchError, "taken by rule 1.*narrower")
    ranks = {s.name: s.rank for s in li.plan(model, config(narrow, wide)).sites}
    stem = "model.layers.{}.self_attn.q_proj"
    assert ranks == {stem.format(0): 3, stem.format(1): 4}


class Overhead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.overhead = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.overhead(x))
        return found


def test_a_trained_module_is_not_looked_for_inside_another_name() -> None:
    plain, x = Overhead().double(), random(2, 5)
    model = adapted(plain, "overhead", train=["head"])
    assert set(li.adapter_state(model).trained) == {"head.weight", "head.bias"}
    assert set(li.adapters(model)["default"].sites) == {"overhead"}
    wanted = dense(plain, model)
    for key, tensor in li.adapter_state(model).trained.items():
        wanted.get_parameter(key).data = tensor.clone()
    assert error(model(x), wanted(x)) < EXACT
    typo = config("overhead", train=["heda"])
    bare = copy.deepcopy(plain)
    refused(bare, lambda: li.inject(bare, typo), li.MatchError, r"train 1 \('heda'\)")


def test_an_exclusion_that_excludes_nothing_is_refused() -> None:
    model = llama()
    typo = config(".*_proj", exclude=["k_proj", "v_prj"])
    refused(model, lambda: li.inject(model, typo), li.MatchError, r"exclude 2 \('v_prj'\)")


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 13,
        "num_local_experts": 3,
    }
    return MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.3)).eval().double()


def test_every_projection_reaches_the_stacked_experts() -> None:
    model = mixtral()
    sites = {s.name.rpartition(".")[2] for s in li.plan(model, config(".*_proj")).sites}
    assert sites == {"gate_up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    old = config("w1", "w2")
    refused(model, lambda: li.inject(model, old), li.MatchError, r"'w1'")


def test_a_misspelt_parameter_is_refused() -> None:
    model = mixtral()
    rule = {"match": r"experts\.gate_up_proj", "layout": "out_in"}
    typo = config(rule, {"match": r"experts\.down_prj", "layout": "out_in"})
    words = r"rule 2.*down_prj.*Nearest: .*down_proj"
    refused(model, lambda: li.inject(model, typo), li.MatchError, words)


def test_the_output_head_is_adapted_only_where_it_is_named() -> None:
    sites = li.plan(Overhead(), config("overhead")).sites
    assert [s.name for s in sites] == ["overhead"]
    sites = li.plan(Overhead(), config(".+", exclude=["head"])).sites
    assert [s.name for s in sites] == ["overhead"]


def test_q_of_a_fused_projection_is_adapted_alone() -> None:
    plain = gpt2()
    rule = {"match": "c_attn", "slices": ["q", "k", "v"], "adapt": ["q"]}
    model = adapted(plain, rule)
    hidden = random(2, 6)
    layer = model.transformer.h[0].attn.c_attn
    moved = layer(hidden) - plain.transformer.h[0].attn.c_attn(hidden)
    (site,) = li.adapter_state(model).sites.values()
    assert error(moved[:, :6], hidden @ (SCALE * site.B @ site.A).t()) < 1e-10
    assert torch.count_nonzero(moved[:, 6:]) == 0
    bare = gpt2()
    refused(bare, lambda: li.inject(bare, config("q")), li.MatchError, r"'q'")


class Outer(nn.Linear):
    """A Linear that contains a Linear."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.proj = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.proj(x)


def test_a_linear_inside_a_linear_is_adapted_beside_its_parent() -> None:
    plain, x = nn.Sequential(Outer()).double(), random(3, 5)
    model = adapted(plain, "0", "proj")
    assert set(li.adapters(model)["default"].sites) == {"0", "0.proj"}
    hold(plain, model, lambda m: m(x))


@pytest.mark.parametrize("target", ["self_attn", "input_layernorm", "layers", r"layers\.\d"])
def test_a_container_or_norm_is_refused_in_a_short_message(target: str) -> None:
    model = llama()
    with pytest.raises(li.MatchError, match="cannot take an adapter") as raised:
        li.inject(model, config(target))
    assert "(" + "q_proj): Linear" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_config_object_remembers_no_model() -> None:
    wanted = li.Config.coerce(config("c_attn|q_proj"))
    text = str(wanted.to_dict())
    first, second = li.inject(gpt2(), wanted), li.inject(llama(), wanted)
    assert str(wanted.to_dict()) == text
    assert [*li.adapters(first)["default"].sites] == ["transformer.h.0.attn.c_attn"]
    assert len(li.adapters(second)["default"].sites) == 2
    assert not any(s.transposed for s in li.adapters(second)["default"].sites.values())


@pytest.mark.parametrize("alpha", [0, 0.0, -1, float("nan"), float("inf"), "8", None, True])
def test_an_alpha_of_zero_or_nan_is_refused(alpha: Any) -> None:
    model = llama()
    run = lambda: li.inject(model, config("q_proj", alpha=alpha))  # noqa: E731
    refused(model, run, li.ConfigError, "alpha")


# ------------------------------------------------------------------------- not atomic, side effects


def test_a_bad_second_target_leaves_the_model_as_it_was() -> None:
    model = llama()
    bad = config("q_proj", "input_layernorm")
    refused(model, lambda: li.inject(model, bad), li.MatchError, "input_layernorm")
    fill(li.inject(model, config("q_proj")))
    refused(model, lambda: li.inject(model, bad, "b"), li.MatchError, "input_layernorm")
    assert [*li.adapters(model)] == ["default"]


def test_nan_in_layer_1_leaves_layer_0_unmerged() -> None:
    model = adapted(llama(), "q_proj", "v_proj")
    key = "model.layers.1.self_attn.v_proj.lora_A"
    with torch.no_grad():
        li.adapter_parameters(model)[key][0, 0] = torch.inf
    refused(model, lambda: li.merge(model), li.StateError, "layers.1.self_attn.v_proj")


def test_a_grouped_convolution_merges_with_the_rest() -> None:
    plain = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(8, 3)).double()
    model, x = adapted(plain, "0", "2"), random(2, 4, 4)
    hold(plain, model, lambda m: m(x))


@pytest.mark.parametrize("merged", [False, True])
def test_what_required_a_gradient_before_does_so_after(merged: bool) -> None:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    fill(li.inject(model, config("q_proj")))
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    if merged:
        li.merge(model)
    li.eject(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_disabling_a_merged_model_is_refused() -> None:
    model = adapted(llama(), "q_proj")
    adapter = logits(model)
    li.merge(model)

    def inside() -> None:
        with li.disabled(model):
            logits(model)

    refused(model, inside, li.StateError, "unmerge")
    assert error(logits(model), adapter) < EXACT


def test_base_keys_stay_so_that_a_base_checkpoint_loads(tmp_path: Path) -> None:
    base, model = llama(), adapted(llama(), "q_proj")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(base.state_dict(), strict=True)
    q = model.model.layers[0].self_attn.q_proj
    assert same_bits(q._parameters["weight"], base.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path)  # the adapter, as with PEFT
    again = li.load_adapter(copy.deepcopy(base), tmp_path, base="any")
    assert error(logits(again), logits(model)) < EXACT


def test_missing_keys_are_told_whatever_the_adapters_name(tmp_path: Path) -> None:
    plain = llama()
    li.save_adapter(adapted(plain, "q_proj", "v_proj"), tmp_path / "a", name="default")
    file = tmp_path / "a" / "adapter_model.safetensors"
    drop_tensors(file, lambda key: "v_proj.lora_B" in key)
    with pytest.raises(li.FormatError) as raised:
        li.load_adapter(plain, tmp_path / "a", "b")
    assert "v_proj" in str(raised.value)
    assert "q_proj" not in str(raised.value)


def test_the_dropout_of_a_new_adapter_is_off_in_an_eval_model() -> None:
    model = adapted(llama(), "q_proj", dropout=0.9)
    assert same_bits(logits(model), logits(model))
    assert error(logits(model), logits(dense(llama(), model))) < EXACT
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_a_users_hook_sees_the_adapted_output() -> None:
    plain = llama()
    seen: list[Tensor] = []
    q = plain.model.layers[0].self_attn.q_proj
    q.register_forward_hook(lambda _m, _x, y: seen.append(y.detach().clone()))
    li.inject(plain, config("q_proj"))
    fill(plain)
    assert isinstance(q, nn.Linear)
    logits(plain)
    with li.disabled(plain):
        logits(plain)
    site = li.adapter_state(plain).sites["model.layers.0.self_attn.q_proj"]
    x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(IDS))
    assert error(seen[0] - seen[1], x @ (SCALE * site.B @ site.A).t()) < 1e-10


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Conv1d(2, 2, 1), nn.RNN(4, 4)])
def test_an_adapted_model_is_exported(layer: nn.Module) -> None:
    plain = nn.Sequential(nn.Linear(5, 4), layer).double()
    adapts = [r"\d"] if any(True for _ in layer.parameters()) else ["0"]
    model, x = adapted(plain, *adapts), random(2, 5)

    def run(m: Any) -> Tensor:
        found = m(x)
        return found[0] if isinstance(found, tuple) else found

    exported = torch.export.export(model.eval(), (x,)).module()
    assert error(run(exported), run(dense(plain, model))) < EXACT


ORDER = """
import sys, torch, lora_inject as li
from torch import nn
names = ["query", "key", "value", "dense", "output", "gate"]
torch.manual_seed(0)
net = nn.ModuleDict({n: nn.Linear(3, 3) for n in names})
li.inject(net, {"rank": 1, "targets": names})
li.save_adapter(net, sys.argv[1])
"""


@pytest.mark.slow
def test_the_same_adapter_is_written_to_the_same_bytes_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of texts have another order in each process."""
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", ORDER, str(tmp_path / "there")], check=True, env=env)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "here")])
    exec(ORDER, {})
    folders = (tmp_path / "there", tmp_path / "here")
    written = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders]
    assert written[0] == written[1]
    assert len(json.loads(written[0]["adapter_config.json"])["target_modules"]) > 0


def test_scale_and_alpha_come_back_from_every_format(tmp_path: Path) -> None:
    plain = llama()
    model = adapted(plain, {"match": "q_proj", "alpha": 64}, {"match": "v_proj", "rank": 3})
    wanted = logits(model)
    scales = {k: s.scale for k, s in li.adapter_state(model).sites.items()}
    assert set(scales.values()) == {32.0, 1.0}
    for layout in ("native", "peft"):
        path, _ = saved(model, tmp_path, layout)
        again = li.load_adapter(copy.deepcopy(plain), path)
        assert {k: s.scale for k, s in li.adapter_state(again).sites.items()} == scales
        assert error(logits(again), wanted) < EXACT


def test_pissa_over_a_base_without_values_is_refused() -> None:
    model = llama().to("meta")
    run = lambda: li.inject(model, config("q_proj", init="pissa"))  # noqa: E731
    before = [(n, id(m), type(m)) for n, m in model.named_modules()]
    with pytest.raises(li.LayerError, match="pissa"):
        run()
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before

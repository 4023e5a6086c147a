"""Tied weights: known by their memory, whatever a config says, through every verb."""

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import error, fill, same_bits, snapshot
from helpers.architectures import ARCHITECTURES, Architecture
from helpers.merging import (
    LLAMA,
    adapter_of,
    hold_merged,
    llama_tensors,
    load_checkpoint,
    merge,
    merged_model,
    save_checkpoint,
)
from helpers.models import IDS, Tied, tiny, tiny_llama
from helpers.reference import EXACT, config, dense, gpt2_of_two_layers, logits
from helpers.refusals import refused
from helpers.states import Site, state_of
from helpers.versions import TRANSFORMERS_5, needs_peft_reads_experts, needs_transformers_5
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_inject as li

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT's

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ------------------------------------------------------------------- the table: ties and verbs


def assigned() -> nn.Module:
    """Two Parameters over one memory: what a tied checkpoint gives, loaded with `assign=True`."""
    model = Tied().double()  # a cast would part them
    W = model.embed.weight.detach()
    model.load_state_dict({"embed.weight": W, "head.weight": W}, assign=True)
    return model


TIED = {
    **ARCHITECTURES,
    "one Parameter": Architecture(Tied, (IDS,)),
    "assigned": Architecture(assigned, (IDS,)),
}
OWN = ("embed", "head")
WORDS = "word_embeddings"
LM = ("embed_tokens", "lm_head")
# Which targets are the embedding and the head. Live, the first stand for the others.
ENDS = {
    "one Parameter": OWN, "assigned": OWN, "tied llama": LM, "gpt2": ("wte", "lm_head"),
    "gemma3": LM, "t5": LM, "t5 that says it is untied": LM, "bart": LM, "bert": (WORDS, "decoder"),
}  # fmt: skip
MORE_ENDS = {
    "mbart": LM, "pegasus": LM, "distilbert": (WORDS, "vocab_projector"),
    **dict.fromkeys(("roberta", "albert", "deberta"), (WORDS, "decoder")),
    "electra": (WORDS, "generator_lm_head"), "modernbert": ("tok_embeddings", "decoder"),
}  # fmt: skip
IN_FILES = [name for name, ends in ENDS.items() if ends != OWN]
WHICH = {"embedding": slice(1), "head": slice(1, 2), "both": slice(2)}


def flag(model: Any) -> Any:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None)


def holders(model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
    """Each layer under a target, by its name."""
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in targets}


# On transformers 4 a T5 reads the flag, layers of a Pegasus stand in several places, Gemma 3 has no
# config that unties it, and what else is tied is lost from a saved model.
OF_TRANSFORMERS_5 = {"gemma3", "t5", "t5 that says it is untied", "pegasus", "bart", "bert"}


def marked(*case: str) -> Any:
    return pytest.param(*case, marks=needs_transformers_5 if case[0] in OF_TRANSFORMERS_5 else ())


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", [marked(name) for name in ENDS])
def test_a_live_model_computes_as_if_nothing_were_tied_and_is_given_back_tied(
    name: str, which: str, tmp_path: Path
) -> None:
    row, targets = TIED[name], ENDS[name][WHICH[which]]
    model = row.build().double()
    plain, before, said = copy.deepcopy(model), snapshot(model), flag(model)
    layers = holders(model, ENDS[name])
    assert len({layer.weight.data_ptr() for layer in layers.values()}) == 1
    (tie,) = (note for note in li.plan(model, config(*targets)).notes if " is one tensor" in note)
    assert all(f"{layer}.weight" in tie for layer in layers)

    fill(li.inject(model, config(*targets)))
    due = row.outputs(dense(plain, model))
    assert error(row.outputs(plain), due) > 1e-3
    assert error(row.outputs(model), due) < EXACT
    path = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    loaded = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(row.outputs(loaded), row.outputs(model))

    inside = snapshot(model)
    li.merge(model)
    assert error(row.outputs(model), due) < EXACT
    for end, layer in holders(model, {*ENDS[name]} - {*targets}).items():
        assert same_bits(layer.weight, plain.get_submodule(end).weight), "the other end stays"
    assert not flag(model)
    li.unmerge(model)
    assert snapshot(model) == inside
    assert len({layer._parameters["weight"].data_ptr() for layer in layers.values()}) == 1

    if name in IN_FILES:
        li.merge(loaded, undo=False)
        li.eject(loaded).save_pretrained(tmp_path / "merged")
        again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float64)
        assert error(row.outputs(again), due) < 1e-6  # buffers of Gemma and others are float32
        assert all(p.requires_grad for p in loaded.parameters())
    li.eject(model)
    assert snapshot(model) == before
    assert flag(model) == said


REFUSED_IN_FILES = ("t5", "t5 that says it is untied")  # the flag also scales a T5's outputs
CASES_OF_FILES = [*product(("tied llama", "gpt2", "bart"), WHICH)]
CASES_OF_FILES += [(n, "both") for n in ("gemma3", *REFUSED_IN_FILES, "bert", *MORE_ENDS)]


@pytest.mark.parametrize(("name", "which"), [marked(*case) for case in CASES_OF_FILES])
def test_merged_files_are_to_plain_transformers_what_the_adapter_is(
    name: str, which: str, tmp_path: Path
) -> None:
    row, targets = TIED[name], (ENDS | MORE_ENDS)[name][WHICH[which]]
    plain = row.build()
    model = fill(li.inject(copy.deepcopy(plain), config(*targets)), std=0.3)
    due = row.outputs(model)
    li.save_adapter(model, tmp_path / "adapter")
    old = not TRANSFORMERS_5 and plain.config.is_encoder_decoder
    if old or name in REFUSED_IN_FILES:
        with refused(li.CheckpointError, type(plain).__name__):
            merged_model(plain, tmp_path / "adapter", tmp_path)
        assert not (tmp_path / "merged").exists()
        return
    merged = merged_model(plain, tmp_path / "adapter", tmp_path)
    assert error(row.outputs(merged), due) < 1e-4
    assert flag(merged) is False
    theirs = peft.PeftModel.from_pretrained(row.build(), tmp_path / "adapter")
    assert error(row.outputs(theirs), due) < 1e-4


# ------------------------------------------------------------------- copies of ties that train


def tied_llama() -> Any:
    sizes = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 1}
    return tiny_llama(**sizes, tie_word_embeddings=True).eval()


def rated(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(6)[None]).logits


def with_copies(copies: Mapping[str, Tensor]) -> Any:
    """The plain model with these tensors in place, tied to nothing."""
    model = tied_llama()
    for name, value in copies.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = nn.Parameter(value.clone())
    return model


def hold_files(path: Path, due: Tensor) -> None:
    """Hold PEFT and a live model to a PEFT folder's outputs."""
    for read in (li.load_adapter, peft.PeftModel.from_pretrained):
        assert error(rated(read(tied_llama(), path)), due) < 1e-5


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD), "unequal"], ids=str)
def test_copies_are_read_under_the_names_that_are_given(names: Any, tmp_path: Path) -> None:
    """Equal ones stay one tensor. The base is never written; what is not named stays its own."""
    one, other = torch.randn(2, 30, 12)
    copies = {EMBEDDING: one, HEAD: other} if names == "unequal" else dict.fromkeys(names, one)
    due = rated(with_copies(copies))
    model = li.install(tied_llama(), li.AdapterState({}, copies))
    assert same_bits(rated(model), due)
    assert li.adapter_state(model).trained.keys() == copies.keys()
    hold_files(li.save_adapter(model, tmp_path / "a"), due)
    merged = merged_model(tied_llama(), tmp_path / "a", tmp_path)
    assert error(rated(merged), due) < 1e-5
    assert flag(merged) is (names == (EMBEDDING, HEAD))
    li.merge(model)
    assert same_bits(rated(model), due)
    li.eject(li.unmerge(model))
    assert same_bits(rated(model), rated(tied_llama()))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("option", ["modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], [*LM]], ids="+".join)
def test_copies_and_rows_of_peft_mean_the_same(named: Any, option: str, tmp_path: Path) -> None:
    """PEFT knows them by their names one by one, but for rows, which follow the embedding's tie."""
    rows = option == "trainable_token_indices"
    options = {option: {name: [1, 4] for name in named} if rows else named}
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, **options)
    wrapped = peft.get_peft_model(tied_llama(), lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    if not rows:
        given = {EMBEDDING if name == LM[0] else HEAD for name in named}
        assert {*li.read_adapter(tmp_path / "peft").trained} == given
    model = li.load_adapter(tied_llama(), tmp_path / "peft")
    due = rated(wrapped)
    assert error(rated(model), due) < 1e-5
    hold_files(li.save_adapter(model, tmp_path / "ours"), due)
    if rows and EMBEDDING not in li.adapter_state(model).trained:
        with refused(li.CheckpointError, HEAD):
            merged_model(tied_llama(), tmp_path / "peft", tmp_path)
        return
    assert error(rated(merged_model(tied_llama(), tmp_path / "peft", tmp_path)), due) < 1e-5


@pytest.mark.parametrize("entry", ["embed", "head", r"head\.weight"])
def test_a_tied_tensor_that_trains_is_one_copy_read_under_both_names(entry: str) -> None:
    model = Tied()
    plain, before = copy.deepcopy(model), snapshot(model)
    said = "embed.weight = head.weight is one tensor, trained under all its names"
    assert said in li.plan(model, {"train": [entry]}).notes
    li.inject(model, {"train": [entry]})
    assert li.adapters(model)["default"].n_parameters == 35
    (group,) = li.parameter_groups(model, lr=0.1)
    assert len(group["params"]) == 1, "it is optimized once"
    for each, parameters in ((model, group["params"]), (plain, plain.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(IDS).square().sum().backward()
            optimizer.step()
    assert same_bits(model(IDS), plain(IDS))
    merged = copy.deepcopy(model)
    li.merge(merged)
    li.eject(merged)
    assert same_bits(merged(IDS), plain(IDS))
    assert merged.head.weight is merged.embed.weight, "one copy for both names: still tied"
    li.eject(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("left_out", ["embeddings", "decoder"])
def test_a_model_of_which_one_end_trains_is_merged(left_out: str) -> None:
    plain = TIED["bert"].build().double()
    rule = {"rank": 2, "targets": ["query"], "train": ["word_embeddings"]}
    state = li.adapter_state(fill(li.inject(copy.deepcopy(plain), rule)))
    del state.trained[next(name for name in state.trained if left_out in name)]
    model = li.install(plain, state)
    due = TIED["bert"].outputs(model)
    li.merge(model)
    assert error(TIED["bert"].outputs(model), due) < EXACT


# ------------------------------------------------------------------ odd cases of a live model


def overlapping(first: int) -> Any:
    """An embedding and a head in one memory, the head's beginning at this row."""
    model, whole = Tied(), torch.randn(14, 5)
    model.embed.weight = nn.Parameter(whole[:7])
    model.head.weight = nn.Parameter(whole[first : first + 7])
    return model


def with_a_view() -> Any:
    model = Tied()
    model.register_buffer("kept", model.head.weight.detach()[:2])
    return model


class Always(Tied):
    """A class that ties whatever its config says."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return {"head.weight": "embed.weight"}


def scaled() -> Any:
    """Its forward reads the flag: untied, merged would not equal unmerged."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    sparse = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_experts": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "num_decoder_layers": 1}
    made = {**sizes, **sparse, **tokens, "tie_word_embeddings": True}
    of_this = transformers.SwitchTransformersForConditionalGeneration
    return of_this(transformers.SwitchTransformersConfig(**made)).eval()


# What a merge into the head is refused for, and names in the refusal.
NOT_MERGED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "always tied": (Always, ["Always"]),
    "read by the forward": (scaled, ["tie_word_embeddings"]),
}


@pytest.mark.parametrize("case", NOT_MERGED)
def test_a_merge_that_cannot_part_a_tie_is_refused(case: str) -> None:
    make, names = NOT_MERGED[case]
    model = make()
    fill(li.inject(model, config("head|lm_head")))
    with refused(li.LayerError, *names, model=model):
        li.merge(model)


READ_IN_PART: dict[str, Callable[[], Any]] = {
    "embed.weight": lambda: overlapping(3),
    "kept": with_a_view,
}


@pytest.mark.parametrize("other", READ_IN_PART)
def test_merging_into_memory_that_another_reads_in_part_leaves_the_other(other: str) -> None:
    model = READ_IN_PART[other]()
    fill(li.inject(model, config("head")))
    wanted, before = model(IDS), snapshot(model)
    read = model.get_buffer(other) if other == "kept" else model.embed.weight
    kept = read.detach().clone()
    li.merge(model)
    assert same_bits(read, kept)
    torch.testing.assert_close(model(IDS), wanted)
    assert snapshot(li.unmerge(model)) == before


@pytest.mark.parametrize("targets", [["1"], ["0", "2"], [r"\d"]], ids=str)
def test_three_holders_of_one_tensor_are_untied_and_tied_again(targets: list[str]) -> None:
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    before, x = snapshot(model), torch.randn(2, 5)
    fill(li.inject(model, config(*targets)))
    wanted, inside = model(x), snapshot(model)
    li.merge(model)
    assert error(model(x), wanted) < 1e-5
    assert snapshot(li.unmerge(model)) == inside
    assert snapshot(li.eject(model)) == before


def test_a_tie_that_was_cut_is_in_the_report_and_stops_an_eject_in_the_same_call() -> None:
    assert "one tensor" not in str(li.plan(overlapping(7), config("head"))), "neighbors are not"
    model = fill(li.inject(Tied(), config("head")))
    with refused(li.LayerError, "head.weight", "embed.weight", model=model):
        li.merge(model, eject=True)
    report = li.merge(model)
    assert report.notes == ("untied: 'head.weight' no longer is the tensor of 'embed.weight'",)
    assert report.notes[0] in report.text(width=1000)
    assert report.tensors["head.weight"].action == "untied"
    with refused(li.LoraInjectError, "head.weight", "embed.weight", model=model):
        li.eject(model)  # its class would tie them again


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="a head that it resized states its old size"
)
@pytest.mark.parametrize("part", ["", "transformer"])
@pytest.mark.parametrize(
    "entries",
    [config("wte", "c_attn"), config("lm_head"), config("c_attn", train=["wte"])],
    ids=["embedding", "head", "trained copy"],
)
def test_resizing_what_is_adapted_says_to_eject_first(entries: dict[str, Any], part: str) -> None:
    model = fill(li.inject(gpt2_of_two_layers(), entries))
    with refused(li.LayerError, "ject first", model=model):
        model.get_submodule(part).resize_token_embeddings(20)
    li.eject(model).resize_token_embeddings(20)
    fill(li.inject(model, entries))
    assert logits(model).shape[-1] == 20


# ------------------------------------------------------------------------------ odd cases of files

TINY = {
    **LLAMA, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True
}  # fmt: skip
TENSORS = llama_tensors(head=False)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A Llama whose head is tied and left out of the file."""
    return save_checkpoint(tmp_path / "base", TENSORS, 1, TINY)


def on(end: str) -> li.AdapterState:
    if end == "head":
        return adapter_of({HEAD: TENSORS[EMBEDDING]}, "lm_head")
    return state_of(Site("model.embed_tokens", lambda: nn.Embedding(32, 16), 16), size=0.3)


def hold_parted(out: Path, *ends: str) -> None:
    """Hold a folder to the update of each end, and to a config that says that it is untied."""
    both = {**TENSORS, HEAD: TENSORS[EMBEDDING].clone()}
    hold_merged(out, both, *map(on, ends))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("end", ["embedding", "head"])
def test_an_end_of_a_tie_asks_for_the_class_or_for_the_user(tied, tmp_path, monkeypatch, end):
    state = on(end)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for options, name in (
        ({}, "transformers"),
        ({"tie": {EMBEDDING: EMBEDDING}}, "embed_tokens"),
        ({"tie": {HEAD: "embed_tokens.weight"}}, "embed_tokens.weight"),
    ):
        with refused(li.CheckpointError, name):
            merge(tied, [state], tmp_path / "out", **options)
    merge(tied, [state], tmp_path / "out", tie={HEAD: EMBEDDING})
    if end == "embedding":
        merge(tied, [state], tmp_path / "told", tie={})  # that it is not tied
    monkeypatch.undo()
    hold_parted(tmp_path / "out", end)
    if end == "embedding":
        hold_merged(tmp_path / "told", TENSORS, state)


def test_one_file_of_a_folder_with_a_config_has_its_class_and_its_ties(tied, tmp_path) -> None:
    """The update of the embedding was silently left on the head as well, which has no config."""
    merge(tied / "model.safetensors", [on("embedding")], tmp_path / "out")
    hold_parted(tmp_path / "out", "embedding")


@pytest.mark.parametrize("ends", [["embedding"], ["head"], ["embedding", "head"]], ids="+".join)
def test_what_a_merge_parted_is_extracted_for_each_name(tied, tmp_path, ends) -> None:
    merge(tied, [on(end) for end in ends], tmp_path / "out", dtype="float32")
    li.extract_adapter(tied, tmp_path / "out", tmp_path / "a", rank=4)
    names = {name for end in ends for name in on(end).sites}
    assert set(li.read_adapter(tmp_path / "a").sites) == names
    merge(tied, [tmp_path / "a"], tmp_path / "again", dtype="float32")
    again = load_checkpoint(tmp_path / "again")
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD, EMBEDDING)])
def test_rows_of_a_tied_table_are_placed_in_whatever_order_its_names_are(tied, tmp_path, names):
    rows = torch.randn(2, 16)
    state = li.AdapterState({}, dict.fromkeys(names, rows), rows=dict.fromkeys(names, (5, 3)))
    merge(tied, [state], tmp_path / "out")
    table = TENSORS[EMBEDDING]
    due = table.index_copy(0, torch.tensor([5, 3]), rows.to(table.dtype))
    assert torch.equal(load_checkpoint(tmp_path / "out")[EMBEDDING], due)
    assert HEAD not in load_checkpoint(tmp_path / "out")


def kept_under_another_name(model: Any, folder: Path, name: str, other: str) -> dict[str, Tensor]:
    """Save a model, but a tied tensor under another of its names."""
    model.save_pretrained(folder)
    tensors = load_checkpoint(folder)
    assert name not in tensors
    tensors[name] = tensors.pop(other)
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file, {"format": "pt"})
    return tensors


def layers_of(name: str) -> li.AdapterState:
    return state_of(Site(name, lambda: nn.Linear(8, 8), 8), size=0.5)


def hold_one_layer_moves(model: Any, name: str, folder: Path) -> None:
    """Hold that an adapter on one layer, merged into `base`, moves its weight and no other."""
    merge(folder / "base", [layers_of(name)], folder / "out")
    before, after = (
        dict(each.named_parameters(remove_duplicate=False))
        for each in (model, type(model).from_pretrained(folder / "out"))
    )
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{name}.weight"}


@needs_transformers_5
def test_a_tie_behind_a_number_is_cut_as_any_other(tmp_path: Path) -> None:
    """Bark's heads are its embeddings, and either name may be in a file that loads."""
    sizes = {"input_vocab_size": 8, "output_vocab_size": 8, "hidden_size": 8, "num_heads": 2}
    sizes |= {"num_layers": 1, "n_codes_total": 4, "block_size": 16}
    model = transformers.BarkFineModel(transformers.BarkFineConfig(**sizes))
    ends = ("lm_heads.0.weight", "input_embeds_layers.1.weight")
    kept_under_another_name(model, tmp_path / "base", *ends)
    hold_one_layer_moves(model, "lm_heads.0", tmp_path)


@needs_transformers_5
def test_a_layer_that_stands_for_several_is_not_merged_as_one(tmp_path: Path) -> None:
    """Zamba's files have a block once, under the name of the first layer that shares it."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 14}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_mamba_heads": 1}
    sizes |= {"mamba_d_state": 4, "mamba_dt_rank": 2, "attention_hidden_size": 16}
    model = transformers.ZambaForCausalLM(
        transformers.ZambaConfig(**sizes, use_mamba_kernels=False)
    )
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.2.shared_transf.feed_forward.gate_proj"
    assert f"{name}.weight" in load_checkpoint(tmp_path / "base")
    hold_one_layer_moves(model, name, tmp_path)


def test_a_matrix_with_as_many_rows_as_the_vocabulary_is_not_an_embedding(tmp_path: Path) -> None:
    """GPT-2 with 256 tokens: its mlp.c_proj has 256 rows too, and is not tied to the head."""
    sizes = {"vocab_size": 256, "n_embd": 64, "n_inner": 256}
    plain = tiny(transformers.GPT2LMHeadModel, **sizes).eval()
    model = fill(li.inject(copy.deepcopy(plain), config("c_attn", "c_proj")), std=0.2)
    li.save_adapter(model, tmp_path / "adapter")
    merged = merged_model(plain, tmp_path / "adapter", tmp_path)
    assert not any(HEAD in name for name in load_checkpoint(tmp_path / "merged"))
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 refuses to load such files")
def test_the_class_renames_what_the_file_calls_otherwise(tmp_path: Path) -> None:
    """The file of a GPT-2 without its head's prefix, as the hub has it."""
    plain, base = tiny(transformers.GPT2LMHeadModel).eval(), tmp_path / "base"
    plain.transformer.save_pretrained(base)
    text = json.loads((base / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(text))
    model = fill(li.inject(copy.deepcopy(plain), config("c_fc", "lm_head")))
    merge(base, [li.save_adapter(model, tmp_path / "adapter")], tmp_path / "out")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert same_bits(merged.transformer.wte.weight, plain.transformer.wte.weight)


@needs_peft_reads_experts
@torch.no_grad()
def test_the_difference_of_square_transposed_experts_is_merged_loaded_and_read_by_peft(tmp_path):
    """Which way round they lie is known from the class: the update came out transposed."""
    plain, ids = tiny(transformers.GptOssForCausalLM).eval(), torch.arange(20)[None]
    model = copy.deepcopy(plain)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj += torch.randn(2, 16, 1) @ torch.randn(2, 1, 16)
    experts.gate_up_proj += torch.randn(2, 16, 1) @ torch.randn(2, 1, 32)
    plain.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=1)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = load_checkpoint(tmp_path / "out")
    for name, tensor in load_checkpoint(tmp_path / "tuned").items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name
    for read in (li.load_adapter, peft.PeftModel.from_pretrained):
        reader = read(copy.deepcopy(plain), tmp_path / "adapter").eval()
        assert torch.allclose(reader(input_ids=ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("n_new", [0, 4])
@torch.no_grad()
def test_the_difference_of_a_tied_embedding_is_the_heads_to_every_reader(tmp_path, n_new):
    """As an update of each; in full where it has grown."""
    plain = tiny_llama(vocab_size=32, tie_word_embeddings=True).eval()
    plain.save_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(32 + n_new)
    model = copy.deepcopy(plain)
    table = model.model.embed_tokens.weight
    table += 0.3 * torch.outer(torch.randn(32 + n_new), torch.randn(16))
    model.model.norm.weight.normal_()
    model.model.layers[0].self_attn.q_proj.weight += 0.1 * torch.outer(*torch.randn(2, 16))
    model.save_pretrained(tmp_path / "tuned")
    folders = (tmp_path / name for name in ("base", "tuned", "adapter"))
    assert li.extract_adapter(*folders, rank=1, full=True).left == ()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    ids = torch.arange(32 + n_new)[None]
    for reader in (
        type(model).from_pretrained(tmp_path / "out"),
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter"),
        li.load_adapter(plain, tmp_path / "adapter"),
    ):
        assert torch.allclose(reader(ids).logits, model(ids).logits, atol=1e-4)

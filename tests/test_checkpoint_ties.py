"""What a tensor is, tied or transposed, is known from its class or from the user, never guessed."""

import copy
import json
import os
import sys

import peft
import pytest
import torch
import transformers
from conftest import fill
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_merged,
    assert_verified,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    merge,
    merged_on_disk,
    save_checkpoint,
    site,
)
from helpers.models import tiny_gpt_oss, tiny_llama
from helpers.versions import TRANSFORMERS_5, needs_peft_reads_experts

import lora_inject as li
from lora_inject.checkpoint import (
    Checkpoint,
    MergeOptions,
    WeightedAdapter,
    extract_adapter,
    plan_merge,
    read_weighted,
)
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import CheckpointError
from lora_inject.formats import read_adapter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TINY = {
    **LLAMA, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True
}  # fmt: skip


@pytest.fixture
def tied(tmp_path):
    """A Llama whose head is tied and left out of the file."""
    tensors = llama_tensors(head=False)
    return save_checkpoint(tmp_path / "base", tensors, 1, TINY), tensors, tmp_path / "out"


@pytest.fixture
def no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


def on_embedding():
    return adapter(site("model.embed_tokens", (32, 16), kind="embedding", transposed=True))


def test_a_matrix_with_as_many_rows_as_the_vocabulary_is_not_an_embedding(tmp_path):
    """GPT-2 with 256 tokens: its mlp.c_proj has 256 rows too, and is not tied to the head."""
    config = transformers.GPT2Config(vocab_size=256, n_embd=64, n_inner=256, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    fill(li.inject(model, {"rank": 4, "alpha": 8, "targets": ["c_attn", "c_proj"]}), std=0.2)
    li.save_adapter(model, tmp_path / "adapter")
    base = Checkpoint.open(tmp_path / "base")
    part = read_weighted(tmp_path / "adapter", base)
    merge(base, [part], tmp_path / "out")
    assert not any(HEAD in name for name in load_checkpoint(tmp_path / "out"))
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


def test_ordinary_layers_need_no_class(tied, no_transformers):
    base, tensors, out = tied
    state = llama_adapter(tensors)
    merge(base, [state], out)
    assert_merged(out, tensors, state)


@pytest.mark.parametrize("end", ["embedding", "head"])
def test_an_end_of_a_tie_asks_for_the_class_or_for_the_user(tied, no_transformers, end):
    base, tensors, out = tied
    state = on_embedding() if end == "embedding" else adapter(site("lm_head", (32, 16)))
    with pytest.raises(CheckpointError, match=r"transformers is not installed.*--(tie|rename)"):
        plan_merge(base, [state])
    merge(base, [state], out, tie={HEAD: EMBEDDING})
    both = {**tensors, HEAD: tensors[EMBEDDING].clone()}
    assert_merged(out, both, state)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_verified(base, [state], out, tie={HEAD: EMBEDDING})


def test_the_class_that_cannot_be_built_is_named(tied):
    base, _, _ = tied
    (base / "config.json").write_text(json.dumps({**TINY, "model_type": "llama99"}))
    with pytest.raises(CheckpointError, match=r"does not know the model type 'llama99'.*--tie"):
        plan_merge(base, [on_embedding()])


def test_nothing_is_untied_where_the_user_says_so(tied):
    base, tensors, out = tied
    state = on_embedding()
    merge(base, [state], out, tie={})
    assert_merged(out, tensors, state)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD), "unequal"])
def test_trained_copies_of_tied_tensors_are_what_each_name_says(tied, names):
    """Both names with the same values stay one tensor; otherwise each gets its own."""
    base, tensors, out = tied
    new = torch.randn(32, 16).bfloat16()
    trained = dict.fromkeys((EMBEDDING, HEAD) if names == "unequal" else names, new)
    if names == "unequal":
        trained[HEAD] = -new
    merge(base, [AdapterState({}, trained)], out)
    found, old = load_checkpoint(out), tensors[EMBEDDING]
    assert torch.equal(found[EMBEDDING], trained.get(EMBEDDING, old))
    assert (HEAD in found) == (names != (EMBEDDING, HEAD))
    assert torch.equal(found.get(HEAD, found[EMBEDDING]), trained.get(HEAD, old))
    flag = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert flag is (names == (EMBEDDING, HEAD))


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 refuses to load such files")
def test_the_class_renames_what_the_file_calls_otherwise(tmp_path):
    """The file of a GPT-2 without its head's prefix, as the hub has it."""
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    base = tmp_path / "base"
    transformers.GPT2Model.save_pretrained(model.transformer, base)
    text = json.loads((base / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(text))
    tensors = load_checkpoint(base)
    inner = site("transformer.h.0.mlp.c_fc", (8, 32), transposed=True, kind="conv1d")
    head = site("lm_head", (40, 8))
    merge(base, [adapter(inner, head)], tmp_path / "out")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    delta = [s.scale * s.B @ s.A for s in (inner, head)]
    wanted = tensors["h.0.mlp.c_fc.weight"] + delta[0].T
    assert torch.allclose(found["transformer.h.0.mlp.c_fc.weight"], wanted, atol=1e-6)
    assert torch.allclose(found[HEAD], tensors["wte.weight"] + delta[1], atol=1e-6)
    assert torch.equal(found["transformer.wte.weight"], tensors["wte.weight"])


def test_square_transposed_experts_take_their_orientation_from_the_class(tmp_path):
    tiny_gpt_oss().save_pretrained(tmp_path / "base")
    tensors = load_checkpoint(tmp_path / "base")
    name = "model.layers.0.mlp.experts.down_proj"
    s = site(name, (2, 16, 16), experts=2)  # as PEFT's file leaves it
    if not TRANSFORMERS_5:
        with pytest.raises(CheckpointError, match="does not say which side is the input"):
            merge(tmp_path / "base", [adapter(s)], tmp_path / "out")
        return
    merge(tmp_path / "base", [adapter(s)], tmp_path / "out")
    delta = s.scale * torch.einsum("eor,eri->eio", s.B, s.A)
    assert torch.allclose(load_checkpoint(tmp_path / "out")[name], tensors[name] + delta, atol=1e-6)


@needs_peft_reads_experts
@pytest.mark.filterwarnings("ignore")  # of PEFT's
@torch.no_grad()
def test_the_difference_of_square_transposed_experts_is_merged_loaded_and_read_by_peft(tmp_path):
    """The update came out transposed."""
    model = tiny_gpt_oss()
    model.save_pretrained(tmp_path / "base")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj += torch.randn(2, 16, 1) @ torch.randn(2, 1, 16)
    experts.gate_up_proj += torch.randn(2, 16, 1) @ torch.randn(2, 1, 32)
    model.save_pretrained(tmp_path / "tuned")
    ids = torch.arange(20)[None]
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=1)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    found = load_checkpoint(tmp_path / "out")
    for name, tensor in load_checkpoint(tmp_path / "tuned").items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    loaded = type(model).from_pretrained(tmp_path / "base").eval()
    li.load_adapter(loaded, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    for reader in (loaded, theirs.eval()):
        assert torch.allclose(reader(input_ids=ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("ends", ["embedding", "head", "both"])
def test_what_a_merge_parted_is_extracted_for_each_name(tied, tmp_path, ends):
    base, _, out = tied
    head = site("lm_head", (32, 16))
    states = {"embedding": [on_embedding()], "head": [adapter(head)]}
    merge(base, states.get(ends, [on_embedding(), adapter(head)]), out, dtype="float32")
    extract_adapter(base, out, tmp_path / "a", rank=4)
    found = read_adapter(tmp_path / "a")
    assert set(found.sites) == {
        "embedding": {"model.embed_tokens"}, "head": {"lm_head"}
    }.get(ends, {"model.embed_tokens", "lm_head"})  # fmt: skip
    merge(base, [tmp_path / "a"], tmp_path / "again", dtype="float32")
    again = load_checkpoint(tmp_path / "again")
    for name, tensor in load_checkpoint(out).items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD, EMBEDDING)])
def test_rows_of_a_tied_table_are_placed_in_whatever_order_its_names_are(tied, names):
    base, tensors, out = tied
    rows = torch.randn(2, 16)
    state = AdapterState({}, dict.fromkeys(names, rows), rows=dict.fromkeys(names, (5, 3)))
    merge(base, [state], out)
    due = tensors[EMBEDDING].index_copy(0, torch.tensor([5, 3]), rows.to(tensors[EMBEDDING].dtype))
    assert torch.equal(load_checkpoint(out)[EMBEDDING], due)
    assert HEAD not in load_checkpoint(out)
    only = AdapterState({}, {HEAD: rows}, rows={HEAD: (5, 3)})
    with pytest.raises(CheckpointError, match="which gets other rows"):
        plan_merge(base, [only])


def test_one_file_of_a_folder_with_a_config_has_its_class_and_its_ties(tied):
    """The update of the embedding was silently left on the head as well, which has no config."""
    base, tensors, out = tied
    state = on_embedding()
    merge(base / "model.safetensors", [state], out)
    assert_merged(out, {**tensors, HEAD: tensors[EMBEDDING]}, state)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({EMBEDDING: EMBEDDING}, f"the files hold '{EMBEDDING}'"),
        ({HEAD: "embed_tokens.weight"}, "the files lack 'embed_tokens.weight'"),
    ],
)
def test_a_tie_that_contradicts_the_files_is_refused(tied, told, found):
    with pytest.raises(CheckpointError, match=found):
        plan_merge(tied[0], [on_embedding()], MergeOptions(tie=told))


def test_asking_the_class_leaves_the_messages_of_transformers_as_they_are(tied):
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        plan_merge(tied[0], [on_embedding()])
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("kind", ["dangling link", "folder", "FIFO"])
def test_a_config_that_is_not_a_file_is_refused(tied, kind):
    base, tensors, _ = tied
    (base / "config.json").unlink()
    if kind == "dangling link":
        (base / "config.json").symlink_to("nowhere.json")
    elif kind == "folder":
        (base / "config.json").mkdir()
    else:
        os.mkfifo(base / "config.json")
    with pytest.raises(CheckpointError, match=r"read 'config\.json'"):
        plan_merge(base, [llama_adapter(tensors)])


def test_the_same_adapter_twice_is_refused(tied):
    base, tensors, _ = tied
    parts = [
        WeightedAdapter(llama_adapter(tensors), w, label) for w, label in ((1.0, "a"), (0.5, "b"))
    ]
    with pytest.raises(CheckpointError, match="merge a and b: they are the same adapter"):
        plan_merge(base, parts)


@torch.no_grad()
def test_the_difference_of_tied_models_is_on_every_layer_that_shares_the_tensor(tmp_path):
    model = tiny_llama(vocab_size=32, tie_word_embeddings=True).eval()
    base = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "base")
    table = model.get_input_embeddings().weight
    table += 0.3 * torch.randn(len(table), 1) @ torch.randn(1, table.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    wanted = model(torch.arange(20)[None]).logits
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=1)
    assert (len(found.tensors), found.n_sites) == (1, 2)
    merged = merged_on_disk(base, tmp_path / "adapter", tmp_path)
    for found in (merged, li.load_adapter(base, tmp_path / "adapter")):
        assert torch.allclose(found(torch.arange(20)[None]).logits, wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_grown_tied_embedding_extracted_in_full_is_the_head_to_every_reader(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    cls, ids = transformers.LlamaForCausalLM, torch.arange(36)[None]
    model = cls(transformers.LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(36)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.norm.weight.normal_()
        q = model.model.layers[0].self_attn.q_proj.weight
        q += 0.1 * torch.outer(*torch.randn(2, 16))
    model.save_pretrained(tmp_path / "tuned")
    folders = (tmp_path / name for name in ("base", "tuned", "adapter"))
    assert extract_adapter(*folders, rank=1, full=True).left == ()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").keys() == load_checkpoint(tmp_path / "tuned").keys()
    grown = [cls.from_pretrained(tmp_path / "base") for _ in range(2)]
    for each in grown:
        each.resize_token_embeddings(36)
    read = peft.PeftModel.from_pretrained(grown[0], tmp_path / "adapter")
    loaded = li.load_adapter(grown[1], tmp_path / "adapter")
    for found in (cls.from_pretrained(tmp_path / "out"), read, loaded):
        with torch.no_grad():
            assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-4)

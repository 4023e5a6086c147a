"""Merging on disk against the dense float64 reference: numbers, bytes, dtypes, ties, reports."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_equal_to_dense,
    assert_merged,
    assert_verified,
    dense,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    merge,
    merged,
    save_checkpoint,
    site,
    ulps,
)
from safetensors import safe_open

from lora_inject.checkpoint import WeightedAdapter
from lora_inject.checkpoint import merge_files as merging
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files import row_reader as reading
from lora_inject.errors import CheckpointError


def names_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_merge_equals_the_dense_reference(tmp_path, shards, dtype):
    tensors = llama_tensors(dtype=dtype)
    state = llama_adapter(tensors)
    merged(tmp_path, tensors, state, shards=shards, config=LLAMA)
    assert_merged(tmp_path / "out", tensors, state)


@pytest.mark.parametrize("shards", [1, 3])
def test_layout_is_that_of_the_base_byte_for_byte(tmp_path, shards):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    report = merge(base, [llama_adapter(tensors)], tmp_path / "out")
    assert names_of(tmp_path / "out") == [n for n in names_of(base) if not n.endswith(".py")]
    assert "modeling_evil.py" in " ".join(report.notes)
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            a, b = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
            length = 8 + int.from_bytes(a[:8], "little")
            assert len(a) == len(b)
            assert a[:length] == b[:length]
        elif path.suffix == ".json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_code_comes_along_only_on_request(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    (base / "modeling_x.py").write_text("x = 1")
    merge(base, [llama_adapter(tensors)], tmp_path / "out", copy_code=True)
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "x = 1"


def test_several_adapters_with_weights_are_rounded_once(tmp_path):
    tensors = llama_tensors(hidden=64, inner=64)
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    first, second = llama_adapter(tensors, seed=1), llama_adapter(tensors, seed=2, rank=3)
    parts = [WeightedAdapter(first, 0.7), WeightedAdapter(second, -0.3)]
    merge(base, parts, tmp_path / "out")
    assert_merged(tmp_path / "out", tensors, (first, 0.7), (second, -0.3))
    # Rounding after each adapter would be off in many places: the test can tell.
    merge(base, parts[:1], tmp_path / "one")
    merge(tmp_path / "one", parts[1:], tmp_path / "two")
    twice = load_checkpoint(tmp_path / "two")
    wanted = dense(tensors, (first, 0.7), (second, -0.3))
    touched = [f"{name}.weight" for name in first.sites]
    off = sum(int((ulps(twice[n], wanted[n]) > 0).sum()) for n in touched)
    assert off > 0.02 * sum(wanted[n].numel() for n in touched)


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_and_threads_do_not_change_a_bit(tmp_path, monkeypatch, workers):
    tensors = llama_tensors(hidden=48, inner=40, vocab=96)
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    state = llama_adapter(tensors, leaves=("proj", "embed_tokens"))
    sites = dict(state.sites)
    emb = site("model.embed_tokens", (96, 48), kind="embedding", transposed=True)
    sites[emb.spec.name] = emb
    state = AdapterState(sites)
    merge(base, [state], tmp_path / "whole", workers=1)
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("lora_inject.checkpoint.write.SPAN_ELEMENTS", 500)
    monkeypatch.setattr("lora_inject.checkpoint.write.COPY_BYTES", 64)
    merge(base, [state], tmp_path / "out", workers=workers)
    whole, blocks = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "out")
    for name in whole:
        assert int(ulps(whole[name], blocks[name]).max()) <= 1
    assert_equal_to_dense(blocks, dense(tensors, (state, 1.0)), {n + ".weight" for n in sites})


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_rewritten_everywhere(tmp_path, shards, dtype):
    tensors = llama_tensors() | {"rotary.count": torch.arange(5)}
    config = {**LLAMA, "text_config": {"dtype": "bfloat16"}}
    base = save_checkpoint(tmp_path / "base", tensors, shards, config)
    state = llama_adapter(tensors)
    merge(base, [state], tmp_path / "out", dtype=dtype)
    found = load_checkpoint(tmp_path / "out")
    # Float32 first: the delta must not pass through the base's own bfloat16.
    wanted = dense({n: t.double() for n, t in tensors.items()}, (state, 1.0))
    wanted = {n: t.to(DTYPES[dtype]) for n, t in wanted.items()}
    wanted["rotary.count"] = tensors["rotary.count"]
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert found[name].dtype == t.dtype
        if t.dtype.is_floating_point:
            rtol = 2e-6 if dtype == "float32" else 0
            near = torch.allclose(found[name].double(), t.double(), rtol=rtol, atol=2e-6)
            assert near or int(ulps(found[name], t).max()) <= 1
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == dtype
    assert written["text_config"]["dtype"] == dtype
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        size = sum(t.numel() * t.element_size() for t in found.values())
        assert index["metadata"]["total_size"] == size
        for name, shard in index["weight_map"].items():
            with safe_open(tmp_path / "out" / shard, "pt") as file:
                assert name in file.keys()  # noqa: SIM118
    assert_verified(base, [state], tmp_path / "out", dtype=dtype)


INFINITE = {
    "touched": ({"q.weight": torch.full((4, 4), 6e4)}, r"'q\.weight'.*too large for F16"),
    "float16": ({"q.weight": torch.full((4, 4), 6e4).half()}, r"'q\.weight'.*too large for F16"),
    "untouched": (
        {"q.weight": torch.zeros(4, 4), "norm": torch.tensor([1e9])},
        r"'norm'.*too large for F16",
    ),
    "damaged base": ({"q.weight": torch.full((4, 4), torch.nan)}, "base holds NaN"),
}


@pytest.mark.parametrize("case", INFINITE)
def test_what_would_become_infinite_is_refused_and_nothing_appears(tmp_path, case):
    tensors, found = INFINITE[case]
    base = save_checkpoint(tmp_path / "base", tensors)
    with pytest.raises(CheckpointError, match=found):
        merge(base, [adapter(site("q", (4, 4), size=100.0))], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_values_whose_squares_overflow_are_merged_all_the_same(tmp_path):
    """The sums of the report become Inf there: that makes it look twice, and changes nothing."""
    tensors = {"q.weight": (torch.randn(8, 8) * 1e30).to(torch.bfloat16)}
    state = adapter(site("q", (8, 8), size=1e14))
    found = merged(tmp_path, tensors, state)
    assert not torch.equal(found["q.weight"], tensors["q.weight"])
    assert_equal_to_dense(found, dense(tensors, (state, 1.0)), {"q.weight"})


def test_infinite_mask_is_cast_as_it_is(tmp_path):
    tensors = {"q.weight": torch.zeros(4, 4), "mask": torch.tensor([0.0, float("-inf")])}
    found = merged(tmp_path, tensors, adapter(site("q", (4, 4))), dtype="float16")
    assert found["mask"].tolist() == [0.0, float("-inf")]


# What rounding leaves ---------------------------------------------------------------------------


def tiny_delta(scale):
    tensors = {"q.weight": 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    tensors = {n: t.bfloat16() for n, t in tensors.items()}
    s = site("q", (64, 64), rank=8, alpha=8.0, size=1.0)
    size = (scale * tensors["q.weight"].float().norm() / (s.B @ s.A).norm()).sqrt()
    return tensors, adapter(replace(s, A=s.A * size, B=s.B * size))


@pytest.mark.parametrize(("scale", "low", "high"), [(0.1, 0.99, 1.01), (0.001, 0.4, 0.65)])
def test_report_says_how_much_of_the_delta_survived(tmp_path, scale, low, high):
    tensors, state = tiny_delta(scale)
    base = save_checkpoint(tmp_path / "base", tensors)
    report = merge(base, [state], tmp_path / "out")
    (found,) = report.tensors.values()
    w, merged = tensors["q.weight"].double(), load_checkpoint(tmp_path / "out")["q.weight"].double()
    s = state.sites["q"]
    d = s.scale * s.B.double() @ s.A.double()
    kept = float(((merged - w) * d).sum() / (d * d).sum())
    assert found.kept == pytest.approx(kept, abs=1e-3)
    assert found.relative == pytest.approx(float(d.norm() / w.norm()), rel=1e-3)
    assert found.error == pytest.approx(float((merged - w - d).norm() / d.norm()), rel=1e-3)
    assert low < found.kept < high


@pytest.mark.parametrize("lossy", [0, 1])
def test_min_kept_fails_at_the_shard_and_leaves_no_other_behind(tmp_path, monkeypatch, lossy):
    tensors, state = tiny_delta(0.001)
    sites = dict(state.sites)
    fine = site("p", (64, 64), rank=8, alpha=8.0, size=1.0)
    names = ["q.weight", "p.weight"] if lossy == 0 else ["p.weight", "q.weight"]
    both = tensors | {"p.weight": tensors["q.weight"].clone()}
    base = save_checkpoint(tmp_path / "base", {n: both[n] for n in names}, 2)
    written, real = [], merging.write_shard
    monkeypatch.setattr(merging, "write_shard", lambda *a: written.append(a) or real(*a))
    with pytest.raises(CheckpointError, match=r"at least 0.98.*in 1 tensors: 'q\.weight' 0\.[45]"):
        merge(base, [AdapterState(sites | {"p": fine})], tmp_path / "out", min_kept=0.98)
    assert len(written) == lossy + 1
    assert not (tmp_path / "out").exists()


def test_float32_output_keeps_a_delta_that_bfloat16_loses(tmp_path):
    tensors, state = tiny_delta(0.001)
    base = save_checkpoint(tmp_path / "base", tensors)
    report = merge(base, [state], tmp_path / "out", min_kept=0.98, dtype="float32")
    assert report.min_kept == pytest.approx(1.0, abs=1e-4)


def test_the_same_adapter_twice_is_refused(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors)
    parts = [
        WeightedAdapter(llama_adapter(tensors), w, label) for w, label in ((1.0, "a"), (0.5, "b"))
    ]
    with pytest.raises(CheckpointError, match="merge a and b: they are the same adapter"):
        merge(base, parts, tmp_path / "out")


# Ties -------------------------------------------------------------------------------------------

TIED = {**LLAMA, "tie_word_embeddings": True}


def test_a_head_that_is_parted_from_its_embedding_has_a_shard_of_its_own(tmp_path):
    tensors = llama_tensors(head=False)
    base = save_checkpoint(tmp_path / "base", tensors, 3, TIED)
    state = adapter(site("lm_head", (32, 16)), site("model.layers.0.self_attn.q_proj", (16, 16)))
    report = merge(base, [state], tmp_path / "out")
    assert_merged(
        tmp_path / "out", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, state
    )
    assert "tied" in " ".join(report.notes)
    before, index = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (base, tmp_path / "out")
    )
    assert index["weight_map"]["lm_head.weight"] == "model-added.safetensors"
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 2 * 32 * 16
    # Every other shard keeps its name and its bytes but for the merged tensors.
    assert {*before["weight_map"].values()} < {*index["weight_map"].values()}
    assert_verified(base, [state], tmp_path / "out")


UNTIED = [
    {"architectures": ["BertModel"]},
    {"architectures": ["LlamaForSequenceClassification"]},
    {**LLAMA, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("config", UNTIED)
def test_embedding_without_a_tied_head_is_not_untied(tmp_path, config):
    state = adapter(site("model.embed_tokens", (32, 16), kind="embedding", transposed=True))
    found = merged(tmp_path, llama_tensors(head=False), state, config=config)
    assert "lm_head.weight" not in found


def test_head_stored_beside_its_embedding_only_loses_the_flag(tmp_path):
    tensors, state = llama_tensors(), adapter(site("lm_head", (32, 16)))
    merged(tmp_path, tensors, state, config=TIED)
    assert_merged(tmp_path / "out", tensors, state)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_untouched_tie_stays(tmp_path):
    tensors = llama_tensors(head=False)
    merged(tmp_path, tensors, llama_adapter(tensors), config=TIED)
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("base", "out"))
    assert after == before


# Trained tensors --------------------------------------------------------------------------------


def test_trained_tensors_replace_the_base(tmp_path):
    tensors = llama_tensors()
    trained = {"model.norm.weight": torch.randn(16), "lm_head.weight": torch.randn(32, 16)}
    found = merged(tmp_path, tensors, AdapterState({}, trained), shards=2, config=LLAMA)
    wanted = tensors | {name: t.bfloat16() for name, t in trained.items()}
    assert_equal_to_dense(found, wanted, set())


def test_trained_tensors_of_several_adapters_mix(tmp_path):
    w, *trained = torch.randn(3, 16).unbind()
    states = [AdapterState({}, {"norm": t}) for t in trained]
    parts = map(WeightedAdapter, states, (0.7, 0.5))
    wanted = w + 0.7 * (trained[0] - w) + 0.5 * (trained[1] - w)
    assert torch.allclose(merged(tmp_path, {"norm": w}, *parts)["norm"], wanted, atol=1e-6)


def rows_of(name, indices, values):
    return AdapterState({}, {name: values}, rows={name: indices})


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_first", [True, False])
def test_a_delta_comes_on_top_of_replaced_rows(tmp_path, rows_first, base_dtype):
    tensors = {"e.weight": torch.randn(6, 4, dtype=base_dtype)}
    low = adapter(site("e", (6, 4), kind="embedding", transposed=True))
    values = torch.randn(2, 4)
    parts = [rows_of("e.weight", (1, 4), values), low][:: 1 if rows_first else -1]
    found = merged(tmp_path, tensors, *parts, dtype="float32")["e.weight"]
    replaced = tensors["e.weight"].float()
    replaced[[1, 4]] = values
    wanted = dense({"e.weight": replaced}, (low, 1.0))["e.weight"]
    assert torch.allclose(found, wanted.float(), atol=1e-6)


def test_replaced_rows_under_dora_are_refused(tmp_path):
    dora = site("e", (6, 4), kind="embedding", transposed=True, variant="dora")
    parts = [rows_of("e.weight", (1,), torch.randn(1, 4)), adapter(dora)]
    with pytest.raises(CheckpointError, match="DoRA's update cannot be mixed"):
        merged(tmp_path, {"e.weight": torch.randn(6, 4)}, *parts)


def test_replaced_rows_of_a_table_that_is_parted_from_its_head_are_refused(tmp_path):
    """The head has had the rows too, by the tie; whether it should then is not said."""
    emb = site("model.embed_tokens", (32, 16), kind="embedding", transposed=True)
    rows = rows_of("model.embed_tokens.weight", (3,), torch.randn(1, 16))
    with pytest.raises(CheckpointError, match=r"parted from 'lm_head\.weight', its tied head"):
        merged(tmp_path, llama_tensors(head=False), rows, adapter(emb), config=TIED)


def test_a_bias_of_b_is_added_to_another_adapters_trained_bias(tmp_path):
    tensors = {"q.weight": torch.randn(6, 4), "q.bias": torch.randn(6)}
    low, bias = site("q", (6, 4)), tensors["q.bias"]
    low = SiteState.of(replace(low.spec, lora_bias=True), {**low.tensors, "b": torch.randn(6)})
    trained = AdapterState({}, {"q.bias": torch.randn(6)})
    parts = [WeightedAdapter(adapter(low), 0.5), WeightedAdapter(trained, 0.7)]
    wanted = bias + 0.7 * (trained.trained["q.bias"] - bias) + 0.5 * low.scale * low.further["b"]
    assert torch.allclose(merged(tmp_path, tensors, *parts)["q.bias"], wanted, atol=1e-6)


def test_an_update_is_added_to_another_adapters_trained_copy(tmp_path):
    tensors = {"q.weight": torch.randn(6, 4)}
    base = save_checkpoint(tmp_path / "base", tensors)
    low, trained = adapter(site("q", (6, 4))), AdapterState({}, {"q.weight": torch.randn(6, 4)})
    merge(base, [WeightedAdapter(low, 0.5), WeightedAdapter(trained, 0.7)], tmp_path / "out")
    w, found = tensors["q.weight"], load_checkpoint(tmp_path / "out")["q.weight"]
    wanted = dense({"q.weight": w + 0.7 * (trained.trained["q.weight"] - w)}, (low, 0.5))
    assert torch.allclose(found, wanted["q.weight"], atol=1e-6)
    dora = adapter(site("q", (6, 4), variant="dora"))
    with pytest.raises(CheckpointError, match="DoRA's update cannot be mixed"):
        merge(base, [dora, trained], tmp_path / "no")
    grown = AdapterState({}, {"q.weight": torch.randn(8, 4)})
    with pytest.raises(CheckpointError, match="makes it grow and another updates it"):
        merge(base, [low, grown], tmp_path / "no")


@pytest.mark.parametrize("rows", [{}, {"q.weight": (0, 1, 2)}], ids=["whole", "rows"])
def test_one_adapter_that_updates_a_tensor_and_replaces_it_is_refused(tmp_path, rows):
    """No model takes such an adapter either."""
    values = torch.randn(3 if rows else 6, 4)
    both = replace(adapter(site("q", (6, 4))), trained={"q.weight": values}, rows=rows)
    with pytest.raises(CheckpointError, match="holds values of it and an update as well"):
        merged(tmp_path, {"q.weight": torch.randn(6, 4)}, both)


@pytest.mark.parametrize("shards", [1, 2])
def test_new_classifier_is_added_only_on_request(tmp_path, shards):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    value = torch.randn(3, 16)
    part = WeightedAdapter(AdapterState({}, {"score.weight": value}))
    with pytest.raises(CheckpointError, match=r"'score\.weight' is not in.*--allow-new"):
        merge(base, [part], tmp_path / "out")
    merge(base, [part], tmp_path / "out", allow_new=True)
    wanted = tensors | {"score.weight": value.bfloat16()}
    assert_equal_to_dense(load_checkpoint(tmp_path / "out"), wanted, set())
    assert_verified(base, [part], tmp_path / "out", allow_new=True)


@pytest.mark.parametrize("shards", [1, 2])
def test_grown_vocabulary(tmp_path, shards):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, shards, {**LLAMA, "vocab_size": 32})
    embed, head = torch.randn(35, 16), torch.randn(35, 16)
    trained = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    part = WeightedAdapter(AdapterState({}, trained))
    merge(base, [part], tmp_path / "out")
    wanted = tensors | {n: t.bfloat16() for n, t in trained.items()}
    assert_equal_to_dense(load_checkpoint(tmp_path / "out"), wanted, set())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 35
    assert_verified(base, [part], tmp_path / "out")


def test_grown_embedding_without_its_head_is_refused(tmp_path):
    grown = AdapterState({}, {"model.embed_tokens.weight": torch.randn(35, 16)})
    with pytest.raises(CheckpointError, match=r"grows to 35 rows and 'lm_head.weight' stays at 32"):
        merged(tmp_path, llama_tensors(), grown, config=LLAMA)


def test_copy_of_the_base_must_equal_it(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    emb = site("model.embed_tokens", (32, 16), kind="embedding", transposed=True)
    copy = tensors["model.embed_tokens.weight"].float()
    state = replace(adapter(emb), base_copies={"model.embed_tokens.weight": copy})
    merge(base, [state], tmp_path / "out")
    assert_merged(tmp_path / "out", tensors, state)
    copy[3, 3] += 1
    with pytest.raises(CheckpointError, match="differs from the base"):
        merge(base, [state], tmp_path / "other")


def test_copy_that_grew_is_the_base_of_the_update(tmp_path):
    tensors = llama_tensors(head=False)
    emb = site("model.embed_tokens", (35, 16), kind="embedding", transposed=True)
    copy = torch.cat([tensors["model.embed_tokens.weight"], torch.randn(3, 16).bfloat16()])
    state = replace(adapter(emb), base_copies={"model.embed_tokens.weight": copy})
    merged(tmp_path, tensors, state, shards=2, config={**TIED, "vocab_size": 32})
    grown = tensors | {"model.embed_tokens.weight": copy, "lm_head.weight": copy.clone()}
    assert_merged(tmp_path / "out", grown, state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (35, False)


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    before = os.umask(umask)
    try:
        merge(base, [llama_adapter(tensors)], tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_progress_reaches_the_total_and_never_falls(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 3, LLAMA)
    seen = []
    merge(base, [llama_adapter(tensors)], tmp_path / "out", lambda *row: seen.append(row))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_report_is_plain_data(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    report = merge(base, [llama_adapter(tensors)], tmp_path / "out")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["n_tensors"] == len(tensors)
    assert len(data["tensors"]) == 6
    assert data["peak_memory_bytes"] > 1 << 20


def test_checkpoint_of_any_module_without_config(tmp_path):
    tensors = {"0.weight": torch.randn(8, 4), "2.weight": torch.randn(3, 8)}
    base = save_checkpoint(tmp_path / "base", tensors)
    state = adapter(site("0", (8, 4)), site("2", (3, 8)))
    merge(base / "model.safetensors", [state], tmp_path / "out")
    assert_merged(tmp_path / "out", tensors, state)

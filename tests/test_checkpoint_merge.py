"""Merging on disk against the dense float64 reference: numbers, bytes, dtypes, ties, reports."""

import json
import os
import stat
import sys
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
)
from safetensors.torch import load_file

from lora_inject.checkpoint import WeightedAdapter, merge_checkpoint
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files import row_reader as reading
from lora_inject.errors import CheckpointError
from lora_inject.formats import write_adapter


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_merge_equals_the_dense_reference_in_the_layout_of_the_base(tmp_path, shards, dtype):
    tensors, out = llama_tensors(dtype=dtype), tmp_path / "out"
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    report = merge(base, [llama_adapter(tensors)], out)
    assert_merged(out, tensors, llama_adapter(tensors))
    # Code comes along on request only.
    assert {p.name for p in base.iterdir()} - {p.name for p in out.iterdir()} == {
        "modeling_evil.py"
    }
    assert "modeling_evil.py" in " ".join(report.notes)
    for path in out.iterdir():
        before, after = ((folder / path.name).read_bytes() for folder in (base, out))
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(before[:8], "little")
            assert (len(before), before[:length]) == (len(after), after[:length])
        else:
            assert before == after
    merge(base, [llama_adapter(tensors)], tmp_path / "with code", copy_code=True)
    assert (tmp_path / "with code" / "modeling_evil.py").exists()


def test_several_adapters_with_weights_are_rounded_once(tmp_path):
    tensors = llama_tensors(hidden=64, inner=64)
    first, second = llama_adapter(tensors, seed=1), llama_adapter(tensors, seed=2, rank=3)
    parts = [WeightedAdapter(first, 0.7), WeightedAdapter(second, -0.3)]
    merged(tmp_path, tensors, *parts, shards=2, config=LLAMA)
    assert_merged(tmp_path / "out", tensors, (first, 0.7), (second, -0.3))


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_and_threads_do_not_change_the_result(tmp_path, monkeypatch, workers):
    tensors = llama_tensors(hidden=48, inner=40, vocab=96)
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    emb = site("model.embed_tokens", (96, 48), kind="embedding", transposed=True)
    sites = {**llama_adapter(tensors, leaves=("proj",)).sites, emb.spec.name: emb}
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("lora_inject.checkpoint.write.SPAN_ELEMENTS", 500)
    monkeypatch.setattr("lora_inject.checkpoint.write.COPY_BYTES", 64)
    merge(base, [AdapterState(sites)], tmp_path / "out", workers=workers)
    assert_merged(tmp_path / "out", tensors, AdapterState(sites))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_rewritten_everywhere(tmp_path, shards, dtype):
    tensors = llama_tensors() | {"rotary.count": torch.arange(5)}
    config = {**LLAMA, "text_config": {"dtype": "bfloat16"}}
    state, out = llama_adapter(tensors), tmp_path / "out"
    rewritten = merged(tmp_path, tensors, state, shards=shards, config=config, dtype=dtype)
    # Float32 first: the delta must not pass through the base's own bfloat16.
    floats = {n: t.double() for n, t in tensors.items() if t.is_floating_point()}
    wanted = {n: t.to(DTYPES[dtype]) for n, t in dense(floats, (state, 1.0)).items()}
    wanted["rotary.count"] = tensors["rotary.count"]
    assert_equal_to_dense(rewritten, wanted, {f"{name}.weight" for name in state.sites})
    written = json.loads((out / "config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]["dtype"]) == (dtype, dtype)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in rewritten.values())
        for name, shard in index["weight_map"].items():
            assert name in load_file(out / shard)
    assert_verified(tmp_path / "base", [state], out, dtype=dtype)


INFINITE = {
    "touched": ({"q.weight": torch.full((4, 4), 6e4)}, r"'q\.weight'.*too large for F16"),
    "untouched": ({"norm": torch.tensor([1e9])}, r"'norm'.*too large for F16"),
    "damaged base": ({"q.weight": torch.full((4, 4), torch.nan)}, "base holds NaN"),
}


@pytest.mark.parametrize("case", INFINITE)
def test_what_would_become_infinite_is_refused_and_nothing_appears(tmp_path, case):
    tensors, words = INFINITE[case]
    tensors = {"q.weight": torch.zeros(4, 4), **tensors}
    with pytest.raises(CheckpointError, match=words):
        merged(tmp_path, tensors, adapter(site("q", (4, 4), size=100.0)), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_infinite_mask_is_cast_as_it_is(tmp_path):
    tensors = {"q.weight": torch.zeros(4, 4), "mask": torch.tensor([0.0, float("-inf")])}
    written = merged(tmp_path, tensors, adapter(site("q", (4, 4))), dtype="float16")
    assert written["mask"].tolist() == [0.0, float("-inf")]


# What rounding leaves ---------------------------------------------------------------------------


def tiny_delta(scale):
    w = 0.02 * torch.randn(64, 64).bfloat16()
    s = site("q", (64, 64), rank=8, alpha=8.0, size=1.0)
    size = (scale * w.float().norm() / (s.B @ s.A).norm()).sqrt()
    return {"q.weight": w}, adapter(replace(s, A=s.A * size, B=s.B * size))


@pytest.mark.parametrize(("scale", "low", "high"), [(0.1, 0.99, 1.01), (0.001, 0.4, 0.65)])
def test_report_says_how_much_of_the_delta_survived(tmp_path, scale, low, high):
    tensors, state = tiny_delta(scale)
    base = save_checkpoint(tmp_path / "base", tensors)
    report = merge(base, [state], tmp_path / "out")
    (row,) = report.tensors.values()
    w, after = (t["q.weight"].double() for t in (tensors, load_checkpoint(tmp_path / "out")))
    s = state.sites["q"]
    d = s.scale * s.B.double() @ s.A.double()
    kept = float(((after - w) * d).sum() / (d * d).sum())
    assert row.kept == pytest.approx(kept, abs=1e-3)
    assert row.relative == pytest.approx(float(d.norm() / w.norm()), rel=1e-3)
    assert row.error == pytest.approx(float((after - w - d).norm() / d.norm()), rel=1e-3)
    assert low < row.kept < high
    wide = merge(base, [state], tmp_path / "wide", min_kept=0.98, dtype="float32")
    assert wide.min_kept == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_min_kept_fails_whichever_shard_loses_the_delta(tmp_path, order):
    tensors, state = tiny_delta(0.001)
    tensors |= {"p.weight": torch.ones(64, 64)}
    both = adapter(site("p", (64, 64)), *state.sites.values())
    with pytest.raises(CheckpointError, match=r"at least 0.98.*in 1 tensors: 'q\.weight' 0\.[45]"):
        merged(tmp_path, dict([*tensors.items()][::order]), both, shards=2, min_kept=0.98)
    assert not (tmp_path / "out").exists()


def test_the_same_adapter_twice_is_refused(tmp_path):
    state = llama_adapter(llama_tensors())
    parts = [WeightedAdapter(state, 1.0, "a"), WeightedAdapter(state, 0.5, "b")]
    with pytest.raises(CheckpointError, match="merge a and b: they are the same adapter"):
        merged(tmp_path, llama_tensors(), *parts)


# Ties -------------------------------------------------------------------------------------------

TIED = {**LLAMA, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "config", [{"architectures": ["BertModel"]}, {**TIED, "tie_word_embeddings": False}]
)
def test_embedding_without_a_tied_head_is_not_untied(tmp_path, config):
    state = adapter(site("model.embed_tokens", (32, 16), kind="embedding", transposed=True))
    assert "lm_head.weight" not in merged(tmp_path, llama_tensors(head=False), state, config=config)


@pytest.mark.parametrize("untied", [True, False])
def test_the_flag_goes_with_the_tie(tmp_path, untied):
    """Also where the head is stored beside its embedding; an untouched tie stays."""
    tensors = llama_tensors(head=untied)
    state = adapter(site("lm_head", (32, 16))) if untied else llama_adapter(tensors)
    merged(tmp_path, tensors, state, config=TIED)
    assert_merged(tmp_path / "out", tensors, state)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**TIED, "tie_word_embeddings": not untied}


# Trained tensors --------------------------------------------------------------------------------


def rows_of(name, indices, values):
    return AdapterState({}, {name: values}, rows={name: indices})


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_a_delta_comes_on_top_of_replaced_rows(tmp_path, order, base_dtype):
    tensors = {"e.weight": torch.randn(6, 4, dtype=base_dtype)}
    low, values = adapter(site("e", (6, 4), kind="embedding", transposed=True)), torch.randn(2, 4)
    parts = [rows_of("e.weight", (1, 4), values), low][::order]
    written = merged(tmp_path, tensors, *parts, dtype="float32")["e.weight"]
    replaced = tensors["e.weight"].float()
    replaced[[1, 4]] = values
    wanted = dense({"e.weight": replaced}, (low, 1.0))["e.weight"]
    assert torch.allclose(written, wanted.float(), atol=1e-6)


def test_updates_and_trained_copies_of_several_adapters_add_up(tmp_path):
    """`W + 0.5 scale B A + 0.7 (copy - W)`; likewise a bias of B, and two copies of one tensor."""
    base = {"q.weight": torch.randn(6, 4), "q.bias": torch.randn(6), "norm": torch.randn(4)}
    copies = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    low, norm = site("q", (6, 4)), torch.randn(4)
    low = SiteState.of(replace(low.spec, lora_bias=True), {**low.tensors, "b": torch.randn(6)})
    updates = {"q.weight": low.scale * low.B @ low.A, "q.bias": low.scale * low.further["b"]}
    updates["norm"] = norm - base["norm"]
    one, two = adapter(low, trained={"norm": norm}), AdapterState({}, copies)
    written = merged(tmp_path, base, WeightedAdapter(one, 0.5), WeightedAdapter(two, 0.7))
    for name, W in base.items():
        wanted = W + 0.5 * updates[name] + 0.7 * (copies[name] - W)
        assert torch.allclose(written[name], wanted, atol=1e-6), name


LOW, DORA = (adapter(site("q", (6, 4), variant=variant)) for variant in ("lora", "dora"))
COPY = AdapterState({}, {"q.weight": torch.ones(6, 4)})
ROWS = rows_of("q.weight", (1,), torch.ones(1, 4))
GROWN = AdapterState({}, {"q.weight": torch.ones(8, 4)})
NOT_MIXED = {
    "DoRA and a copy": ([DORA, COPY], "DoRA's update cannot be mixed"),
    "DoRA and rows": ([ROWS, DORA], "DoRA's update cannot be mixed"),
    "an update of what grows": ([LOW, GROWN], "makes it grow and another updates it"),
    "an update and a copy in one": ([replace(LOW, trained=COPY.trained)], "an update as well"),
}


@pytest.mark.parametrize("case", NOT_MIXED)
def test_what_cannot_be_mixed_is_refused(tmp_path, case):
    parts, words = NOT_MIXED[case]
    with pytest.raises(CheckpointError, match=words):
        merged(tmp_path, {"q.weight": torch.randn(6, 4)}, *parts)


def test_replaced_rows_of_a_table_that_is_parted_from_its_head_are_refused(tmp_path):
    """The head has had the rows too, by the tie; whether it should then is not said."""
    emb = site("model.embed_tokens", (32, 16), kind="embedding", transposed=True)
    rows = rows_of("model.embed_tokens.weight", (3,), torch.randn(1, 16))
    with pytest.raises(CheckpointError, match=r"parted from 'lm_head\.weight', its tied head"):
        merged(tmp_path, llama_tensors(head=False), rows, adapter(emb), config=TIED)


@pytest.mark.parametrize("shards", [1, 2])
def test_new_classifier_is_added_only_on_request(tmp_path, shards):
    tensors, out = llama_tensors(), tmp_path / "out"
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    part = AdapterState({}, {"score.weight": torch.randn(3, 16)})
    with pytest.raises(CheckpointError, match=r"'score\.weight' is not in.*--allow-new"):
        merge(base, [part], out)
    merge(base, [part], out, allow_new=True)
    wanted = tensors | {"score.weight": part.trained["score.weight"].bfloat16()}
    assert_equal_to_dense(load_checkpoint(out), wanted, set())
    assert_verified(base, [part], out, allow_new=True)


@pytest.mark.parametrize("shards", [1, 2])
def test_grown_vocabulary(tmp_path, shards):
    tensors = llama_tensors()
    trained = {
        name: torch.randn(35, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    part, config = AdapterState({}, trained), {**LLAMA, "vocab_size": 32}
    written = merged(tmp_path, tensors, part, shards=shards, config=config)
    wanted = tensors | {n: t.bfloat16() for n, t in trained.items()}
    assert_equal_to_dense(written, wanted, set())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 35
    assert_verified(tmp_path / "base", [part], tmp_path / "out")
    del trained["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"grows to 35 rows and 'lm_head.weight' stays at 32"):
        merge(tmp_path / "base", [AdapterState({}, trained)], tmp_path / "no")


@pytest.mark.parametrize("n_new", [0, 3])
def test_copy_of_the_base_must_equal_it_and_may_have_grown(tmp_path, n_new):
    tensors, name = llama_tensors(head=False), "model.embed_tokens.weight"
    emb = site("model.embed_tokens", (32 + n_new, 16), kind="embedding", transposed=True)
    copy = torch.cat([tensors[name], torch.randn(n_new, 16).bfloat16()])
    state = adapter(emb, base_copies={name: copy})
    merged(tmp_path, tensors, state, shards=2, config={**TIED, "vocab_size": 32})
    grown = tensors | {name: copy.clone(), "lm_head.weight": copy.clone()}
    assert_merged(tmp_path / "out", grown, state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (32 + n_new, False)
    if not n_new:
        copy[3, 3] += 1
        with pytest.raises(CheckpointError, match="differs from the base"):
            merge(tmp_path / "base", [state], tmp_path / "other")


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        merged(tmp_path, llama_tensors(), llama_adapter(llama_tensors()), shards=2, config=LLAMA)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def peak_of_merging(folder):
    report = merge_checkpoint(folder / "base", [folder / "adapter"], folder / "out")
    return report.peak_memory_bytes / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_memory_grows_neither_with_the_base_nor_with_the_adapter(tmp_path, forks):
    """Six times the weights, and an adapter of 75 MB: the same peak within 16 MiB."""
    for n_layers in (2, 12):
        folder = tmp_path / str(n_layers)
        names = [f"layers.{i}.up_proj" for i in range(n_layers)]
        base = {f"{name}.weight": torch.ones(2048, 1024).bfloat16() for name in names}
        save_checkpoint(folder / "base", base)
        sites = (site(name, (2048, 1024), rank=512, size=1e-3) for name in names)
        write_adapter(adapter(*sites), folder / "adapter")
    few, many = (forks.start(peak_of_merging, tmp_path / n).result() for n in ("2", "12"))
    assert abs(many - few) < 16, (few, many)

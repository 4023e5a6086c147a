"""Merging on disk, against the textbook formula: numbers, bytes, ties, reports, refusals."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import fill, same_bits
from helpers.merging import (
    LLAMA,
    adapter_of,
    dense,
    hold_merged,
    llama_tensors,
    load_checkpoint,
    merge,
    merged,
    same_tensors,
    save_checkpoint,
)
from helpers.models import tiny
from helpers.modules import tree
from helpers.refusals import refused
from helpers.states import (
    SITES,
    Site,
    give_biases_of_b,
    linear,
    parameter,
    state_of,
    with_biases_of_b,
)
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import conv1d

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = Site("model.embed_tokens", lambda: nn.Embedding(32, 16), 16)


# Numbers and bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
def test_a_merge_is_the_formula_in_the_layout_of_the_base(tmp_path, shards, dtype) -> None:
    tensors, out = llama_tensors(dtype=dtype), tmp_path / "out"
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    if shards == 1:
        out.mkdir()  # an empty folder may be there
    report = merge(base, [adapter_of(tensors)], out)
    hold_merged(out, tensors, adapter_of(tensors))
    # Code comes along on request only.
    left = {p.name for p in base.iterdir()} - {p.name for p in out.iterdir()}
    assert left == {"modeling_evil.py"}
    assert "modeling_evil.py" in " ".join(report.notes)
    for path in out.iterdir():
        before, after = ((folder / path.name).read_bytes() for folder in (base, out))
        length = 8 + int.from_bytes(before[:8], "little")
        is_tensors = path.suffix == ".safetensors"
        assert len(before) == len(after)
        assert before[:length] == after[:length] if is_tensors else before == after
    merge(base, [adapter_of(tensors)], tmp_path / "with code", copy_code=True)
    assert (tmp_path / "with code" / "modeling_evil.py").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_several_adapters_of_weights_are_rounded_once_by_any_number_of_threads(
    tmp_path: Path, workers: int
) -> None:
    tensors = llama_tensors(hidden=192, inner=160, vocab=256)  # a matrix of several blocks
    first, second = adapter_of(tensors), adapter_of(tensors, "proj", seed=2, rank=3)
    table = state_of(replace(EMBEDDING, layer=lambda: nn.Embedding(256, 192), n_out=192), size=0.3)
    parts = [li.combine([first], [0.7]), li.combine([second], [-0.3]), table]
    merged(tmp_path, tensors, *parts, shards=2, config=LLAMA, workers=workers)
    hold_merged(tmp_path / "out", tensors, (first, 0.7), (second, -0.3), table)


@pytest.mark.parametrize(("dtype", "shards"), [*zip(DTYPES, (1, 3, 3), strict=True)])
def test_a_dtype_is_rewritten_everywhere(tmp_path: Path, shards: int, dtype: str) -> None:
    tensors = llama_tensors() | {"rotary.count": torch.arange(5)}
    config = {**LLAMA, "text_config": {"dtype": "bfloat16"}}
    state, out = adapter_of(tensors), tmp_path / "out"
    found = merged(tmp_path, tensors, state, shards=shards, config=config, dtype=dtype)
    # Float32 first: the update must not pass through the base's own bfloat16.
    floats = {n: t.double() for n, t in tensors.items() if t.is_floating_point()}
    wanted = {n: t.to(DTYPES[dtype]) for n, t in dense(floats, (state, 1.0)).items()}
    wanted["rotary.count"] = tensors["rotary.count"]
    same_tensors(found, wanted, {f"{name}.weight" for name in state.sites})
    written = json.loads((out / "config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]["dtype"]) == (dtype, dtype)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
        assert all(name in load_file(out / file) for name, file in index["weight_map"].items())


INFINITE: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "touched": ({"q.weight": torch.full((4, 4), 6e4)}, ["'q.weight'", "F16"]),
    "untouched": ({"norm": torch.tensor([1e9])}, ["'norm'", "F16"]),
    "damaged base": ({"q.weight": torch.full((4, 4), torch.nan)}, ["'q.weight'", "NaN"]),
}


@pytest.mark.parametrize("case", INFINITE)
def test_what_would_become_infinite_is_refused_and_nothing_appears(case, tmp_path) -> None:
    tensors, named = INFINITE[case]
    tensors = {"q.weight": torch.zeros(4, 4), **tensors}
    with refused(li.CheckpointError, *named):
        merged(tmp_path, tensors, state_of(linear("q", 4, 4), size=100.0), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_infinite_mask_is_cast_as_it_is(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, -torch.inf, torch.nan])
    tensors = {"q.weight": torch.zeros(4, 4), "mask": mask}
    written = merged(tmp_path, tensors, state_of(linear("q", 4, 4)), dtype="float16")
    assert str(written["mask"].tolist()) == "[0.0, -inf, nan]"


def small_update(share: float) -> tuple[dict[str, Tensor], li.AdapterState, Tensor]:
    """A base in bfloat16, an adapter of such a share of it, and its update."""
    w = 0.02 * torch.randn(64, 64).bfloat16()
    (site,) = state_of(linear("q", 64, 64, rank=8, alpha=8.0)).sites.values()
    size = (share * w.float().norm() / (site.B @ site.A).norm()).sqrt()
    site = replace(site, A=site.A * size, B=site.B * size)
    update = site.scale * site.B.double() @ site.A.double()
    return {"q.weight": w}, li.AdapterState({"q": site}), update


@pytest.mark.parametrize(("share", "low", "high"), [(0.1, 0.99, 1.01), (0.001, 0.4, 0.65)])
def test_the_report_says_how_much_of_the_update_survived(tmp_path, share, low, high) -> None:
    tensors, state, update = small_update(share)
    base = save_checkpoint(tmp_path / "base", tensors)
    (row,) = merge(base, [state], tmp_path / "out").tensors.values()
    w, after = (t["q.weight"].double() for t in (tensors, load_checkpoint(tmp_path / "out")))
    kept = float(((after - w) * update).sum() / update.square().sum())
    assert row.kept == pytest.approx(kept, abs=1e-3)
    assert row.relative == pytest.approx(float(update.norm() / w.norm()), rel=1e-3)
    lost = float((after - w - update).norm() / update.norm())
    assert row.error == pytest.approx(lost, rel=1e-3)
    assert low < row.kept < high
    wide = merge(base, [state], tmp_path / "wide", min_kept=0.98, dtype="float32")
    assert wide.min_kept == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_min_kept_fails_whichever_file_loses_the_update(tmp_path: Path, order: int) -> None:
    tensors, state, _ = small_update(0.001)
    tensors |= {"p.weight": torch.ones(64, 64)}
    both = li.AdapterState({**state_of(linear("p", 64, 64)).sites, **state.sites})
    with refused(li.CheckpointError, "0.98", "'q.weight' 0.", "--min-kept"):
        merged(tmp_path, dict([*tensors.items()][::order]), both, shards=2, min_kept=0.98)
    assert not (tmp_path / "out").exists()


def test_bytes_are_copied_exactly_where_the_kernel_cannot(tmp_path, monkeypatch) -> None:
    def across_devices(*_: Any) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", across_devices, raising=False)
    tensors = llama_tensors()
    merged(tmp_path, tensors, adapter_of(tensors), shards=2, workers=3)
    hold_merged(tmp_path / "out", tensors, adapter_of(tensors))


def peak_of_merging(folder: Path) -> float:
    li.merge_checkpoint(folder / "base", [folder / "adapter"], folder / "out")
    # Not getrusage: it starts from the memory of the parent process.
    (peak,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(peak) / 2**10


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the system's own account")
def test_memory_does_not_grow_with_the_base(tmp_path: Path, forks) -> None:
    """Six times the weights: the same peak within 16 MiB."""
    for n_layers in (4, 24):
        folder = tmp_path / str(n_layers)
        names = [f"layers.{i}.up_proj" for i in range(n_layers)]
        save_checkpoint(
            folder / "base", {f"{name}.weight": torch.ones(2048, 1024).bfloat16() for name in names}
        )
        rows = (linear(name, 1024, 2048) for name in names)
        li.write_adapter(state_of(*rows, size=1e-3), folder / "adapter")
    few, many = (forks.start(peak_of_merging, tmp_path / n).result() for n in ("4", "24"))
    assert abs(many - few) < 16, (few, many)


# Kinds of sites -----------------------------------------------------------------------------------

KINDS = SITES | {"grouped conv": Site("stem", lambda: nn.Conv2d(4, 8, 3, groups=2), 8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_every_kind_of_site_merges_by_the_formula(kind: str, init: str, tmp_path: Path) -> None:
    row = KINDS[kind].by(init=init)
    layer = row.layer()
    W = (layer if isinstance(layer, nn.Parameter) else layer.weight).detach().bfloat16()
    outputs = W.T if kind == "slices of conv1d" else W  # a view, one row for each output
    left = [n for n in range(row.n_out) if not any(a <= n < b for a, b in row.spans)]
    if row.spans:
        outputs[left] = -0.0  # 0.0 added to it would change its sign
    key = row.name if isinstance(layer, nn.Parameter) else f"{row.name}.weight"
    tensors, state = {key: W}, state_of(row, size=0.3)
    written = merged(tmp_path, tensors, state)[key]
    hold_merged(tmp_path / "out", tensors, state, rows=(row,))
    if row.spans:
        after = written.T if kind == "slices of conv1d" else written
        assert same_bits(after[left], outputs[left])


def test_the_orientation_follows_the_shape_and_of_squares_the_adapter(tmp_path: Path) -> None:
    """A reader of a foreign file assumes that everything is (out, in)."""
    tensors = {"c_attn.weight": torch.randn(8, 24), "fc.weight": torch.randn(6, 8)}
    state = state_of(linear("c_attn", 8, 24), linear("fc", 8, 6))
    merged(tmp_path / "shapes", tensors, state)
    hold_merged(tmp_path / "shapes" / "out", tensors, state)
    square = {"fc.weight": torch.ones(8, 8)}
    for kind, row in (
        ("linear", linear("fc", 8, 8)),
        ("conv1d", Site("fc", lambda: conv1d(8, 8), 8)),
    ):
        state, turned = state_of(row), ("fc",) if kind == "conv1d" else ()
        merged(tmp_path / kind, square, state)
        hold_merged(tmp_path / kind / "out", square, state, turned=turned)


@pytest.mark.parametrize("order", [1, -1])
def test_a_square_of_an_adapter_that_is_wrong_elsewhere_is_refused(tmp_path, order) -> None:
    tensors = {"a.weight": torch.ones(8, 24), "b.weight": torch.ones(8, 8)}
    rows = [linear("a", 8, 24), linear("b", 8, 8)][::order]
    with refused(li.CheckpointError, "'b", "square", "'a'"):
        merged(tmp_path, tensors, state_of(*rows))


E, I, H = 3, 6, 8  # noqa: E741
FUSED = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}
SIZES = {
    "vocab_size": 16, "hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_local_experts": E, "num_experts": E
}  # fmt: skip
FILES = {
    "qwen2_moe": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
}
CONFIGS = {
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **SIZES},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SIZES},
}
STACKS = "model.layers.0.mlp.experts"


def separate(family: str, fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, one for each expert, of the stacks that the class runs."""
    where, (gate, up, down) = FILES[family]
    out = {}
    for e in range(E):
        out[f"{where}.{e}.{gate}.weight"] = fused["gate_up_proj"][e, :I].clone()
        out[f"{where}.{e}.{up}.weight"] = fused["gate_up_proj"][e, I:].clone()
        out[f"{where}.{e}.{down}.weight"] = fused["down_proj"][e].clone()
    return out


@needs_transformers_5
@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_stacked_experts_are_cut_into_the_tensors_of_the_file(
    family: str, layout: str, tmp_path: Path
) -> None:
    fused = {name: torch.randn(shape).bfloat16() for name, shape in FUSED.items()}
    router = f"{FILES[family][0].removesuffix('.experts')}.gate.weight"
    tensors = separate(family, fused) | {router: torch.randn(E, H).bfloat16()}
    stacks = [
        parameter(
            f"{STACKS}.{n}", *(s if layout == "out_in" else (s[0], s[2], s[1])), layout=layout
        )
        for n, s in FUSED.items()
    ]
    state = state_of(*stacks, linear("model.layers.0.mlp.gate", H, E), size=0.3)
    written = merged(tmp_path, tensors, state, shards=4, config=CONFIGS[family])
    exact = {f"{STACKS}.{n}": t.double() for n, t in fused.items()}
    exact["model.layers.0.mlp.gate.weight"] = tensors[router].double()
    exact = dense(exact, (state, 1.0))
    wanted = separate(family, {n: exact[f"{STACKS}.{n}"] for n in FUSED})
    wanted[router] = exact["model.layers.0.mlp.gate.weight"]
    same_tensors(written, {name: t.bfloat16() for name, t in wanted.items()}, {*wanted})
    del tensors[f"{FILES[family][0]}.2.{FILES[family][1][1]}.weight"]
    base = save_checkpoint(tmp_path / "poor", tensors, 1, CONFIGS[family])
    with refused(li.CheckpointError, "expert 2"):
        merge(base, [state], tmp_path / "no")


# Ties ---------------------------------------------------------------------------------------------

TIED = {**LLAMA, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "config", [{"architectures": ["BertModel"]}, {**TIED, "tie_word_embeddings": False}]
)
def test_an_embedding_without_a_tied_head_is_not_untied(tmp_path: Path, config: Any) -> None:
    written = merged(tmp_path, llama_tensors(head=False), state_of(EMBEDDING), config=config)
    assert "lm_head.weight" not in written


@pytest.mark.parametrize("untied", [True, False])
def test_the_flag_goes_with_the_tie(tmp_path: Path, untied: bool) -> None:
    """Also where the head is stored beside its embedding; an untouched tie stays."""
    tensors = llama_tensors(head=untied)
    state = adapter_of(tensors, "lm_head") if untied else adapter_of(tensors)
    merged(tmp_path, tensors, state, config=TIED)
    hold_merged(tmp_path / "out", tensors, state)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**TIED, "tie_word_embeddings": not untied}


def rows_of(name: str, indices: tuple[int, ...], values: Tensor) -> li.AdapterState:
    return li.AdapterState({}, {name: values}, rows={name: indices})


def test_replaced_rows_of_a_table_that_is_parted_from_its_head_are_refused(tmp_path) -> None:
    """The head has had the rows too, by the tie; whether it should then is not said."""
    rows = rows_of("model.embed_tokens.weight", (3,), torch.randn(1, 16))
    with refused(li.CheckpointError, "'model.embed_tokens.weight'", "'lm_head.weight'"):
        merged(tmp_path, llama_tensors(head=False), rows, state_of(EMBEDDING), config=TIED)


# Trained tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_an_update_comes_on_top_of_replaced_rows(tmp_path, order, base_dtype) -> None:
    tensors = {"e.weight": torch.randn(6, 4, dtype=base_dtype)}
    low, values = state_of(Site("e", lambda: nn.Embedding(6, 4), 4)), torch.randn(2, 4)
    parts = [rows_of("e.weight", (1, 4), values), low][::order]
    written = merged(tmp_path, tensors, *parts, dtype="float32")["e.weight"]
    replaced = tensors["e.weight"].float()
    replaced[[1, 4]] = values
    wanted = dense({"e.weight": replaced}, (low, 1.0))["e.weight"]
    assert torch.allclose(written, wanted, atol=1e-6)


def by_command(
    run: Any, folder: Path, base: dict[str, Tensor],
    parts: list[tuple[li.AdapterState, float]], *options: str, config: Any = None,
) -> Any:  # fmt: skip
    """Merge adapters with weights, which only the command takes; what it left."""
    save_checkpoint(folder / "base", base, 1, config)
    files = [
        li.write_adapter(state, folder / f"{n}.safetensors", "native")
        for n, (state, _) in enumerate(parts)
    ]
    weights = [word for _, weight in parts for word in ("-w", weight)]
    return run("merge", folder / "base", *files, *weights, *options, "-o", folder / "out")


def test_updates_and_trained_copies_of_several_adapters_add_up(run: Any, tmp_path: Path) -> None:
    """`W + 0.5 scale B A + 0.7 (copy - W)`; likewise a bias of B, and two copies of one tensor."""
    base = {"q.weight": torch.randn(6, 4), "q.bias": torch.randn(6), "norm": torch.randn(4)}
    copies = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    with_bias = Site("q", lambda: nn.Linear(4, 6), 6)
    norm = torch.randn(4)
    one = with_biases_of_b(state_of(with_bias, trained={"norm": norm}))
    two = li.AdapterState({}, copies)
    (low,) = one.sites.values()
    updates = {"q.weight": low.scale * low.B @ low.A, "q.bias": low.scale * low.further["b"]}
    updates["norm"] = norm - base["norm"]
    assert by_command(run, tmp_path, base, [(one, 0.5), (two, 0.7)], "--verify").code == 0
    written = load_checkpoint(tmp_path / "out")
    for name, W in base.items():
        wanted = W + 0.5 * updates[name] + 0.7 * (copies[name] - W)
        assert torch.allclose(written[name], wanted, atol=1e-6), name


@pytest.mark.parametrize("shards", [1, 2])
def test_a_new_classifier_is_added_only_on_request(tmp_path: Path, shards: int) -> None:
    tensors, out = llama_tensors(), tmp_path / "out"
    base = save_checkpoint(tmp_path / "base", tensors, shards, LLAMA)
    part = li.AdapterState({}, {"score.weight": torch.randn(3, 16)})
    with refused(li.CheckpointError, "'score.weight'", "--allow-new"):
        merge(base, [part], out)
    merge(base, [part], out, allow_new=True)
    wanted = tensors | {"score.weight": part.trained["score.weight"].bfloat16()}
    same_tensors(load_checkpoint(out), wanted, set())


@pytest.mark.parametrize("shards", [1, 2])
def test_a_grown_vocabulary_grows_the_config_and_both_ends(tmp_path: Path, shards: int) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors, trained = llama_tensors(), {name: torch.randn(35, 16) for name in names}
    part, config = li.AdapterState({}, trained), {**LLAMA, "vocab_size": 32}
    written = merged(tmp_path, tensors, part, shards=shards, config=config)
    same_tensors(written, tensors | {n: t.bfloat16() for n, t in trained.items()}, set())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 35
    one = li.AdapterState({}, {names[0]: trained[names[0]]})
    with refused(li.CheckpointError, "35", "'lm_head.weight'", "32"):
        merge(tmp_path / "base", [one], tmp_path / "no")


def grown() -> li.AdapterState:
    """A vocabulary of three more rows, at both ends."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return li.AdapterState({}, dict.fromkeys(names, torch.randn(35, 16)))


CONFIGS_OF_GROWN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"text_config": {"vocab_size": 32, "pad": 1}, "qformer_config": {"vocab_size": 77}},
        {"text_config": {"vocab_size": 35, "pad": 1}, "qformer_config": {"vocab_size": 77}},
    ),
    (
        {"vocab_size": 32, "other": {"vocab_size": 5}},
        {"vocab_size": 35, "other": {"vocab_size": 5}},
    ),
]


@pytest.mark.parametrize(("config", "due"), CONFIGS_OF_GROWN)
def test_a_grown_vocabulary_leaves_other_vocabularies_of_the_config(
    config: dict[str, Any], due: dict[str, Any], tmp_path: Path
) -> None:
    """As BLIP-2's: that of its qformer is another."""
    merged(tmp_path, llama_tensors(), grown(), config=config)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == due


Q_PROJ = "model.layers.0.self_attn.q_proj"
GAIN = state_of(linear(Q_PROJ, 16, 16, variant="dora"))
NEW = li.AdapterState({}, {"score.weight": torch.ones(3, 16)})
IN_PART = ["'model.embed_tokens.weight'", "weight other than 1"]
UNWEIGHTED: dict[str, tuple[list[tuple[li.AdapterState, float]], list[str]]] = {
    "half of rows that the base lacks": ([(grown(), 0.5)], IN_PART),
    "twice such rows": ([(grown(), 2.0)], IN_PART),
    "two of them in full": ([(grown(), 1.0), (grown(), 1.0)], IN_PART),
    "less than one in all": ([(grown(), 0.3), (grown(), 0.3)], IN_PART),
    "half of a tensor that the base lacks": ([(NEW, 0.5)], ["'score.weight'", IN_PART[1]]),
    "a gain taken away": ([(GAIN, -1.0)], [f"'{Q_PROJ}.weight'", "DoRA"]),
    "half of a gain": ([(GAIN, 0.5)], [f"'{Q_PROJ}.weight'", "DoRA"]),
}


@pytest.mark.parametrize("case", UNWEIGHTED)
def test_what_has_no_weighted_change_is_refused(case: str, tmp_path: Path, run: Any) -> None:
    parts, named = UNWEIGHTED[case]
    config = {**LLAMA, "vocab_size": 32}
    ran = by_command(run, tmp_path, llama_tensors(), parts, "--allow-new", config=config)
    said = " ".join(ran.err.split())
    assert ran.code == 1
    assert all(name in said for name in named), said
    assert not (tmp_path / "out").exists()


def test_weights_that_add_up_to_1_mix_grown_rows(tmp_path: Path, run: Any) -> None:
    one, two = grown(), grown()
    parts, config = [(one, 0.25), (two, 0.75)], {**LLAMA, "vocab_size": 32}
    ran = by_command(run, tmp_path, llama_tensors(), parts, config=config)
    assert ran.code == 0, ran.err
    written = load_checkpoint(tmp_path / "out")
    for name, rows in one.trained.items():
        due = (0.25 * rows.double() + 0.75 * two.trained[name].double()).bfloat16()
        torch.testing.assert_close(written[name], due, rtol=2**-7, atol=0)


def test_a_layer_of_two_names_gets_every_update_and_bias_under_both(tmp_path: Path) -> None:
    layer = nn.Linear(4, 6)
    model = tree({"one": layer, "two": layer})
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    for name in "ab":
        fill(li.inject(model, {"rank": 2, "targets": ["one"]}, name), name)
    give_biases_of_b(model, "a")
    li.activate(model, {"a": 1.0, "b": 1.0})
    written = merged(tmp_path, tensors, *(li.adapter_state(model, name) for name in "ab"))
    for name, value in dict(li.merged_weights(model)).items():
        torch.testing.assert_close(written[name], value)
        assert torch.equal(written[name.replace("one", "two")], written[name])


@pytest.mark.parametrize("n_new", [0, 3])
def test_a_copy_of_the_base_must_equal_it_and_may_have_grown(tmp_path: Path, n_new: int) -> None:
    tensors, name = llama_tensors(head=False), "model.embed_tokens.weight"
    grown = replace(EMBEDDING, layer=lambda: nn.Embedding(32 + n_new, 16))
    copy = torch.cat([tensors[name], torch.randn(n_new, 16).bfloat16()])
    state = state_of(grown, size=0.3, base_copies={name: copy})
    merged(tmp_path, tensors, state, shards=2, config={**TIED, "vocab_size": 32})
    wanted = tensors | {name: copy.clone(), "lm_head.weight": copy.clone()}
    hold_merged(tmp_path / "out", wanted, state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (32 + n_new, False)
    if not n_new:
        copy[3, 3] += 1
        with refused(li.CheckpointError, f"'{name}'", "differs from the base"):
            merge(tmp_path / "base", [state], tmp_path / "other")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_gain_is_on_the_outputs_of_the_sum(kind: str, tmp_path: Path) -> None:
    """DoRA: its formula, by which `verify` computes some rows, and here the whole matrix."""
    row = SITES[kind].by(variant="dora")
    state = state_of(row)
    site, tensors = (
        state.sites[row.name],
        {f"{row.name}.weight": torch.randn(row.layer().weight.shape)},
    )
    delta, axis = site.scale * site.B.double() @ site.A.double(), 1
    if site.spec.transposed:
        delta, axis = delta.T, 0
    total = tensors[f"{row.name}.weight"].double() + delta
    due = total / total.norm(dim=axis, keepdim=True) * site.further["m"].double().unsqueeze(axis)
    written = merged(tmp_path, tensors, state)
    torch.testing.assert_close(written[f"{row.name}.weight"], due.float())


# Refusals: nothing is written ---------------------------------------------------------------------

Q, P = state_of(linear("q", 4, 6)), state_of(linear("p", 4, 6))
DORA = state_of(linear("q", 4, 6, variant="dora"))
COPY = li.AdapterState({}, {"q.weight": torch.ones(6, 4)})
ROWS = rows_of("q.weight", (1,), torch.ones(1, 4))
GROWN = li.AdapterState({}, {"q.weight": torch.ones(8, 4)})
HOLES = [replace(Q.sites["q"], **{role: torch.full_like(getattr(Q.sites["q"], role), torch.inf)})
         for role in "AB"]  # fmt: skip
INF = li.AdapterState({}, {"norm": torch.full((4,), torch.inf)})
REFUSED: dict[str, tuple[list[li.AdapterState], dict[str, Any], list[str]]] = {
    "no adapter": ([], {}, ["no adapter"]),
    "an empty one": ([li.AdapterState({})], {}, ["no tensors"]),
    "the same twice": ([Q, Q], {}, ["the same adapter", "Give it once"]),
    "its copy": ([Q, replace(Q, config={"rank": 1})], {}, ["the same adapter"]),
    "no dtype": ([Q], {"dtype": "int8"}, ["'int8'", "bfloat16"]),
    "no share": ([Q], {"min_kept": float("nan")}, ["nan", "0.98"]),
    "no workers": ([Q], {"workers": 0}, ["0 workers"]),
    "no floats": ([Q], {"dequantize": "int8"}, ["dequantize 'int8'", "bfloat16"]),
    "both ways": ([Q], {"dequantize": "bfloat16", "requantize": True}, ["requantize"]),
    "infinite A": ([li.AdapterState({"q": HOLES[0]})], {}, ["'q A'"]),
    "infinite B": ([li.AdapterState({"q": HOLES[1]})], {}, ["'q B'"]),
    "infinite copy": ([INF], {}, ["'norm"]),
    "DoRA and a copy": ([DORA, COPY], {}, ["'q.weight'", "DoRA"]),
    "DoRA and rows": ([ROWS, DORA], {}, ["'q.weight'", "DoRA"]),
    "an update of what grows": ([Q, GROWN], {}, ["'q.weight'", "grow"]),
    "an update and a copy in one": ([replace(Q, trained=COPY.trained)], {}, ["'q.weight'"]),
    "a name that is not there": ([P], {}, ["'p.weight'", "--rename OLD=NEW"]),
    "another shape": ([state_of(linear("q", 4, 5))], {}, ["[6, 4]", "[5, 4]"]),
    "no values": ([li.AdapterState({}, {"norm": torch.ones(4, device="meta")})], {}, ["meta"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case: str, tmp_path: Path) -> None:
    parts, options, named = REFUSED[case]
    tensors = {"q.weight": torch.randn(6, 4), "norm": torch.ones(4)}
    with refused(li.CheckpointError, *named):
        merged(tmp_path, tensors, *parts, **options)
    assert not (tmp_path / "out").exists()


def test_rows_with_nan_are_told_without_their_thousands_of_numbers(tmp_path: Path) -> None:
    name, numbers = "model.embed_tokens.weight", tuple(range(4000))
    state = rows_of(name, numbers, torch.full((4000, 16), torch.nan))
    with refused(li.CheckpointError, f"'{name}' holds NaN or Inf") as raised:
        merged(tmp_path, llama_tensors(vocab=4096), state, config=LLAMA)
    assert len(str(raised.value)) < 400


RENAMED: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "without model.": (lambda n: n.removeprefix("model."), {"": "model.", "lm_head": "lm_head"}),
    "with model.": (lambda n: f"model.{n}", {"model.": ""}),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_are_read_as_told(tmp_path: Path, case: str) -> None:
    rename, told = RENAMED[case]
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors)
    state = adapter_of(tensors, "q_proj", "lm_head")
    other = li.algebra.rename(state, rename)
    with refused(li.CheckpointError, "--rename OLD=NEW"):
        merge(base, [other], tmp_path / "out")
    with refused(li.CheckpointError, "'modle.'", "no name of the adapters"):
        merge(base, [other], tmp_path / "out", rename={**told, "modle.": "model."})
    merge(base, [other], tmp_path / "out", rename=told)
    hold_merged(tmp_path / "out", tensors, state)


def test_what_no_rename_is_about_has_the_name_that_the_class_says(tmp_path: Path) -> None:
    """GPT-2's first files lack the prefix that its class has today."""
    model = tiny(transformers.GPT2LMHeadModel)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_checkpoint(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    base = save_checkpoint(tmp_path / "base", old, config=config)
    n_out, n_in = old["h.0.attn.c_attn.weight"].T.shape
    sites = [Site(f"{n}.attn.c_attn", lambda: conv1d(n_in, n_out), n_out)
             for n in ("transformer.h.0", "first")]  # fmt: skip
    merge(base, [state_of(*sites)], tmp_path / "out", rename={"first": "h.1"})
    found = load_checkpoint(tmp_path / "out")
    moved = {name for name in old if not torch.equal(found[name], old[name])}
    assert moved == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"}


def test_what_has_no_place_is_named_with_the_nearest_names(tmp_path: Path) -> None:
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    stray = state_of(linear("model.layers.7.self_attn.q_proj", 16, 16))
    state = li.AdapterState({**adapter_of(tensors).sites, **stray.sites})
    with refused(li.CheckpointError, "layers.7.self_attn", "layers.1.self_attn"):
        merge(base, [state], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, prefix: str) -> None:
    tensors, other = llama_tensors(seed=0), llama_tensors(seed=1)
    layers = {
        n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith("q_proj.weight")
    }
    net = tree({n: nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for n in layers})
    net.load_state_dict({f"{n}.weight": t for n, t in layers.items()})
    state = li.adapter_state(fill(li.inject(net, {"targets": ["q_proj"]})))
    other = {name.removeprefix(prefix): tensor for name, tensor in other.items()}
    base = save_checkpoint(tmp_path / "base", other, 1, LLAMA)
    with refused(li.CheckpointError, "2 of 2", "any_base"):
        merge(base, [state], tmp_path / "out")
    merge(base, [state], tmp_path / "out", any_base=True)

"""W streamed from a checkpoint gives the figures of W in memory, for every kind and layout.

The reference is the dense float64 matrix of W and of the delta, taken from the tensors
that were saved; blocks of rows are made small, so that each weight takes several."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, dense_delta, fill, host, injected
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.analysis import (
    Weights,
    amplification,
    analyze,
    findings,
    inspect_state,
    rounding,
    site_blocks,
    spectrum,
)
from lora_inject.checkpoint import Checkpoint
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files import row_reader
from lora_inject.core.spec.sites import SiteSpec


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_reader, "BLOCK_ELEMENTS", 12)


def saved(model: nn.Module, path: Path) -> Path:
    """The base alone, as one file."""
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".lora_" not in k}
    save_file(state, path / "model.safetensors")
    return path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_streamed_figures_of_every_kind(name, dtype, tmp_path):
    kind = KINDS[name]
    model = injected(kind, dtype)
    W = model.layer._parameters[kind.weight].detach().clone()
    state = li.adapter_state(model)
    site = state.sites[kind.site]
    li.eject(model)
    found = analyze(state, saved(model, tmp_path)).weights[kind.site]

    assert found.stored == str(dtype).removeprefix("torch.")
    matrix = W.reshape(site.spec.matrix_shape)
    delta = dense_delta(kind, site.A.double(), site.B.double()).reshape(matrix.shape)
    for form, wanted in rounding(matrix, delta).items():
        assert found.rounded[form].kept == pytest.approx(wanted.kept, rel=1e-4, abs=1e-4), form
        assert found.rounded[form].error == pytest.approx(wanted.error, rel=1e-3, abs=1e-4), form

    blocks = site_blocks(site)
    assert [b.label for b in found.blocks] == [b.label for b in blocks]
    for block, beside in zip(blocks, found.blocks, strict=True):
        assert beside.tensor == kind.key
        part = matrix[slice(*block.block.rows), slice(*block.block.cols)].double()
        wanted = amplification(part, block.delta, transposed=block.transposed)
        norms = beside.norms
        assert norms.rank == wanted.rank == 2
        for figure in ("delta_norm", "weight_norm", "of_delta", "of_weight", "factor"):
            assert getattr(norms, figure) == pytest.approx(getattr(wanted, figure), rel=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_frozen_start_is_taken_off_beside_w_too(init, tmp_path):
    kind = KINDS["linear"]
    model = li.inject(host(kind), {**kind.config, "init": init})
    W = model.layer._parameters["weight"].detach().clone()
    fill(model)
    state = li.adapter_state(model)
    site = state.sites["layer"]
    li.eject(model)
    norms = analyze(state, saved(model, tmp_path)).weights["layer"].blocks[0].norms
    dense = 1.5 * (site.B @ site.A - site.B0 @ site.A0).double()
    assert norms.delta_norm == pytest.approx(float(dense.norm()), rel=1e-6)
    assert norms.weight_norm == pytest.approx(float(W.double().norm()), rel=1e-9)


def test_a_sharded_checkpoint(tmp_path):
    torch.manual_seed(0)
    W = {f"layers.{i}.q.weight": torch.randn(6, 5).bfloat16() for i in range(2)}
    names = list(W)
    for i, name in enumerate(names):
        save_file({name: W[name]}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    index = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    sites = {}
    for i in range(2):
        spec = SiteSpec(f"layers.{i}.q", "linear", 5, 6, (6, 5), rank=2, alpha=2)
        sites[spec.name] = SiteState(spec, torch.randn(2, 5), torch.randn(6, 2))
    found = analyze(AdapterState(sites), tmp_path)
    assert found.base == str(tmp_path)
    for i, block in enumerate(found.on_weight()):
        assert (block.site, block.at, block.tensor) == (f"layers.{i}.q", str(i), names[i])
        norm = float(W[names[i]].double().norm())
        assert block.norms.weight_norm == pytest.approx(norm, rel=1e-12)


def test_stacked_experts_that_the_file_keeps_apart(tmp_path):
    """gate_up_proj (E, 2 I, H) against `experts.E.gate_proj` and `experts.E.up_proj`."""
    E, inner, width = 2, 6, 8
    config = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
              "vocab_size": 16, "hidden_size": width, "intermediate_size": inner,
              "moe_intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "num_experts": E}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for e in range(E):
        for leaf, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)),
                            ("down_proj", (width, inner))):  # fmt: skip
            tensors[f"model.layers.0.mlp.experts.{e}.{leaf}.weight"] = torch.randn(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    spec = SiteSpec("model.layers.0.mlp.experts.gate_up_proj", "parameter", width, 2 * inner,
                    (E, 2 * inner, width), rank=2, alpha=2, experts=E)  # fmt: skip
    site = SiteState(spec, torch.randn(E, 2, width), torch.randn(E, 2 * inner, 2))
    found = analyze(AdapterState({spec.name: site}), tmp_path).weights[spec.name]
    assert [block.label for block in found.blocks] == ["expert 0"] * 2 + ["expert 1"] * 2
    for number, block in enumerate(found.blocks):
        e, part = divmod(number, 2)
        name = f"model.layers.0.mlp.experts.{e}.{('gate_proj', 'up_proj')[part]}.weight"
        assert block.tensor == name
        rows = slice(part * inner, (part + 1) * inner)
        dense = site.B[e][rows].double() @ site.A[e].double()
        U, _, Vh = np.linalg.svd(dense.numpy())
        of_delta = np.linalg.norm(U[:, :2].T @ tensors[name].double().numpy() @ Vh[:2].T)
        assert block.norms.of_delta == pytest.approx(of_delta, rel=1e-9)
        assert block.norms.delta_norm == pytest.approx(float(dense.norm()), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "unequal slices of conv1d", "turned experts"])
def test_the_top_directions_of_w(name, tmp_path):
    kind = KINDS[name]
    model = injected(kind)
    W = model.layer._parameters[kind.weight].detach().double()
    state = li.adapter_state(model)
    site = state.sites[kind.site]
    li.eject(model)
    weights = Weights(state, Checkpoint.open(saved(model, tmp_path)))
    matrix = W.reshape(site.spec.matrix_shape)
    found = weights.directions(kind.site, 1)
    assert len(found) == len(site.spec.blocks)
    for block, (_, top) in zip(site.spec.blocks, found, strict=True):
        part = matrix[slice(*block.rows), slice(*block.cols)]
        V = torch.linalg.svd(part.T if site.spec.transposed else part).Vh[:1].T
        assert abs(float(top.T @ V)) == pytest.approx(1, abs=1e-6)


def test_a_large_w_is_decomposed_at_random(tmp_path, monkeypatch):
    """Above `EXACT_ELEMENTS` the randomized SVD is asked."""
    monkeypatch.setattr("lora_inject.analysis.weights.EXACT_ELEMENTS", 0)
    kind = KINDS["linear"]
    model = injected(kind)
    W = model.layer._parameters["weight"].detach().double()
    state = li.adapter_state(model)
    li.eject(model)
    norms = analyze(state, saved(model, tmp_path)).weights["layer"].blocks[0].norms
    wanted = float(torch.linalg.svdvals(W)[:2].norm())
    assert norms.of_weight == pytest.approx(wanted, rel=1e-5)


def test_findings_beside_w(tmp_path):
    torch.manual_seed(0)
    spec = SiteSpec("fc", "linear", 64, 32, (32, 64), rank=4, alpha=4)
    A = torch.linalg.qr(torch.randn(64, 4)).Q.T.contiguous()

    def codes(W: Tensor, scale: float) -> set[str]:
        save_file({"fc.weight": W}, tmp_path / "model.safetensors")
        B = scale * torch.linalg.qr(torch.randn(32, 4)).Q
        return {f.code for f in findings(analyze(AdapterState({"fc": SiteState(spec, A, B)}),
                                                 tmp_path))}  # fmt: skip

    W = torch.randn(32, 64)
    assert codes(W.bfloat16(), 1e-4) == {"lost"}
    assert codes(W, 1e-3) == {"noise"}  # of a float32 base, rounding has noise and no bias
    assert codes(W.bfloat16(), 5.0) == set()
    assert codes(W.bfloat16(), 500.0) == {"loud"}
    assert codes(1e5 * W, 1e4) == {"overflow"}


# ----------------------------------------------------------------------------------------- refusals


def test_another_base_is_refused_unless_any_will_do(tmp_path):
    model = injected(KINDS["linear"])
    state = li.adapter_state(model)
    li.eject(model)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    path = saved(model, tmp_path)
    with pytest.raises(li.CheckpointError, match=r"compare sql with .* made on another base"):
        analyze(state, path, label="sql")
    assert analyze(state, path, any_base=True).weights


def test_a_base_without_the_site_is_refused(tmp_path):
    state = li.adapter_state(injected(KINDS["linear"]))
    save_file({"other.weight": torch.ones(6, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(li.CheckpointError, match="have no place in it"):
        analyze(state, tmp_path)


@pytest.mark.parametrize("mark", ["qweight", "weight_scale"])
def test_a_quantized_base_is_refused(tmp_path, mark):
    spec = SiteSpec("fc", "linear", 8, 6, (6, 8), rank=2, alpha=2)
    state = AdapterState({"fc": SiteState(spec, torch.ones(2, 8), torch.ones(6, 2))})
    tensors = {"fc.weight": torch.ones(6, 8), f"fc.{mark}": torch.ones(6, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(li.CheckpointError, match=r"quantized.*Give the 16-bit checkpoint instead"):
        analyze(state, tmp_path)
    save_file({"fc.weight": torch.ones(6, 8).to(torch.int16)}, tmp_path / "model.safetensors")
    with pytest.raises(li.CheckpointError, match="stored as I16"):
        analyze(state, tmp_path)


# ---------------------------------------------------------------------------- and the inspection


@pytest.mark.parametrize("name", KINDS)
def test_inspection_and_spectra_agree_on_the_norm(name):
    kind = KINDS[name]
    state = li.adapter_state(injected(kind, torch.float64))
    site = state.sites[kind.site]
    square = sum(spectrum(block.delta).norm ** 2 for block in site_blocks(site))
    assert inspect_state(state).sites[0].delta_norm == pytest.approx(square**0.5, rel=1e-10)


def test_rows_of_a_table_are_not_updates_and_left_out(tmp_path):
    net = nn.ModuleDict({"e": nn.Embedding(6, 4), "l": nn.Linear(4, 4)})
    base = saved(net, tmp_path)
    state = li.adapter_state(li.inject(net, {"rank": 1, "targets": ["l"], "tokens": {"e": [1]}}))
    assert state.rows
    assert Weights(state, Checkpoint.open(base)).look("l").stored == "float32"

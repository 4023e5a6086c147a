"""W streamed from a checkpoint gives the figures of W in memory, for every kind and layout.

The reference is the dense float64 matrix of W and of the delta, taken from the tensors
that were saved; blocks of rows are made small, so that each weight takes several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, dense_delta, fill, host
from helpers.checkpoints import adapter, save_checkpoint, site
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject.analysis import (
    Weights,
    amplification,
    analyze,
    findings,
    rounding,
    site_blocks,
)
from lora_inject.checkpoint import Checkpoint
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.files import row_reader
from lora_inject.core.spec.sites import SiteSpec


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_reader, "BLOCK_ELEMENTS", 12)


def taken_apart(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An adapter of one kind, its site, W, and the folder that the base was saved to."""
    kind = KINDS[name]
    model = fill(li.inject(host(kind, dtype), {**kind.config, **more}))
    W = model.layer._parameters[kind.weight].detach().clone()
    state = li.adapter_state(model)
    base = {key: tensor.contiguous() for key, tensor in li.eject(model).state_dict().items()}
    save_file(base, folder / "model.safetensors")
    return state, state.sites[kind.site], W


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_streamed_figures_of_every_kind(name, dtype, tmp_path):
    kind = KINDS[name]
    state, site, W = taken_apart(name, tmp_path, dtype)
    streamed = analyze(state, tmp_path).weights[kind.site]
    assert streamed.stored == str(dtype).removeprefix("torch.")
    matrix = W.reshape(site.spec.matrix_shape)
    delta = dense_delta(kind, site.A.double(), site.B.double()).reshape(matrix.shape)
    for form, wanted in rounding(matrix, delta).items():
        got = streamed.rounded[form]
        assert got.kept == pytest.approx(wanted.kept, rel=1e-4, abs=1e-4), form
        assert got.error == pytest.approx(wanted.error, rel=1e-3, abs=1e-4), form
    blocks = site_blocks(site)
    assert [b.label for b in streamed.blocks] == [b.label for b in blocks]
    for block, beside in zip(blocks, streamed.blocks, strict=True):
        assert beside.tensor == kind.key
        part = matrix[slice(*block.block.rows), slice(*block.block.cols)].double()
        wanted = amplification(part, block.delta, transposed=block.transposed)
        assert beside.norms.rank == wanted.rank == 2
        for figure in ("delta_norm", "weight_norm", "of_delta", "of_weight", "factor"):
            value = getattr(beside.norms, figure)
            assert value == pytest.approx(getattr(wanted, figure), rel=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_frozen_start_is_taken_off_beside_w_too(init, tmp_path):
    state, site, W = taken_apart("linear", tmp_path, init=init)
    norms = analyze(state, tmp_path).weights["layer"].blocks[0].norms
    dense = 1.5 * (site.B @ site.A - site.B0 @ site.A0).double()
    assert norms.delta_norm == pytest.approx(float(dense.norm()), rel=1e-6)
    assert norms.weight_norm == pytest.approx(float(W.double().norm()), rel=1e-9)


def test_a_sharded_checkpoint(tmp_path):
    W = {f"layers.{i}.q.weight": torch.randn(6, 5).bfloat16() for i in range(2)}
    save_checkpoint(tmp_path, W, shards=2)
    state = adapter(*(site(name.removesuffix(".weight"), (6, 5)) for name in W))
    analysis = analyze(state, tmp_path)
    assert analysis.base == str(tmp_path)
    for i, block in enumerate(analysis.on_weight()):
        name = f"layers.{i}.q.weight"
        assert (block.site, block.at, block.tensor) == (f"layers.{i}.q", str(i), name)
        assert block.norms.weight_norm == pytest.approx(float(W[name].double().norm()), rel=1e-12)


def test_stacked_experts_that_the_file_keeps_apart(tmp_path):
    """gate_up_proj (E, 2 I, H) against `experts.E.gate_proj` and `experts.E.up_proj`."""
    E, inner, width, where = 2, 6, 8, "model.layers.0.mlp.experts"
    config = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
              "vocab_size": 16, "hidden_size": width, "intermediate_size": inner,
              "moe_intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "num_experts": E}  # fmt: skip
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    tensors = {f"{where}.{e}.{leaf}.weight": torch.randn(shape)
               for e in range(E) for leaf, shape in shapes.items()}  # fmt: skip
    save_checkpoint(tmp_path, tensors, config=config)
    stack = site(f"{where}.gate_up_proj", (E, 2 * inner, width), experts=E)
    streamed = analyze(adapter(stack), tmp_path).weights[stack.spec.name]
    assert [block.label for block in streamed.blocks] == ["expert 0"] * 2 + ["expert 1"] * 2
    for number, block in enumerate(streamed.blocks):
        e, part = divmod(number, 2)
        name = f"{where}.{e}.{('gate_proj', 'up_proj')[part]}.weight"
        assert block.tensor == name
        rows = slice(part * inner, (part + 1) * inner)
        dense = stack.scale * stack.B[e][rows].double() @ stack.A[e].double()
        U, _, Vh = torch.linalg.svd(dense)
        of_delta = float((U[:, :2].T @ tensors[name].double() @ Vh[:2].T).norm())
        assert block.norms.of_delta == pytest.approx(of_delta, rel=1e-9)
        assert block.norms.delta_norm == pytest.approx(float(dense.norm()), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "unequal slices of conv1d", "turned experts"])
def test_the_top_directions_of_w(name, tmp_path):
    state, site, W = taken_apart(name, tmp_path)
    matrix = W.double().reshape(site.spec.matrix_shape)
    tops = Weights(state, Checkpoint.open(tmp_path)).directions(KINDS[name].site, 1)
    for block, (_, top) in zip(site.spec.blocks, tops, strict=True):
        part = matrix[slice(*block.rows), slice(*block.cols)]
        V = torch.linalg.svd(part.T if site.spec.transposed else part).Vh[:1].T
        assert abs(float(top.T @ V)) == pytest.approx(1, abs=1e-6)


def test_a_large_w_is_decomposed_at_random(tmp_path, monkeypatch):
    """Above `EXACT_ELEMENTS` the randomized SVD is asked."""
    monkeypatch.setattr("lora_inject.analysis.weights.EXACT_ELEMENTS", 0)
    state, _, W = taken_apart("linear", tmp_path)
    norms = analyze(state, tmp_path).weights["layer"].blocks[0].norms
    wanted = float(torch.linalg.svdvals(W.double())[:2].norm())
    assert norms.of_weight == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "scale", "codes"),
    [
        (torch.bfloat16, 1, 1e-4, {"lost"}),
        (torch.float32, 1, 1e-3, {"noise"}),  # of a float32 base, rounding has noise and no bias
        (torch.bfloat16, 1, 5.0, set()),
        (torch.bfloat16, 1, 500.0, {"loud"}),
        (torch.float32, 1e5, 1e4, {"overflow"}),
    ],
)
def test_findings_beside_w(tmp_path, dtype, size, scale, codes):
    spec = SiteSpec("fc", "linear", 64, 32, (32, 64), rank=4, alpha=4)
    A, B = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (64, 32))
    save_checkpoint(tmp_path, {"fc.weight": (size * torch.randn(32, 64)).to(dtype)})
    state = adapter(SiteState(spec, A.T.contiguous(), scale * B))
    assert {finding.code for finding in findings(analyze(state, tmp_path))} == codes


# ----------------------------------------------------------------------------------------- refusals


def test_another_base_is_refused_unless_any_will_do(tmp_path):
    state, _, W = taken_apart("linear", tmp_path)
    save_checkpoint(tmp_path, {"layer.weight": W + 1})
    with pytest.raises(li.CheckpointError, match=r"compare sql with .* made on another base"):
        analyze(state, tmp_path, label="sql")
    assert analyze(state, tmp_path, any_base=True).weights


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"fc.qweight": torch.ones(6, 8)}, r"quantized.*Give the 16-bit checkpoint instead"),
        ({"fc.weight_scale": torch.ones(6, 8)}, r"quantized.*Give the 16-bit checkpoint instead"),
        ({"fc.weight": torch.ones(6, 8).to(torch.int16)}, "stored as I16"),
        ({"other.weight": torch.ones(6, 8)}, "have no place in it"),
    ],
)
def test_a_base_without_plain_weights_is_refused(tmp_path, tensors, words):
    more = {} if "other.weight" in tensors else {"fc.weight": torch.ones(6, 8)}
    save_checkpoint(tmp_path, more | tensors)
    with pytest.raises(li.CheckpointError, match=words):
        analyze(adapter(site("fc", (6, 8))), tmp_path)


def test_rows_of_a_table_are_not_updates_and_left_out(tmp_path):
    net = nn.ModuleDict({"e": nn.Embedding(6, 4), "l": nn.Linear(4, 4)})
    save_checkpoint(tmp_path, net.state_dict())
    state = li.adapter_state(li.inject(net, {"rank": 1, "targets": ["l"], "tokens": {"e": [1]}}))
    assert state.rows
    assert Weights(state, Checkpoint.open(tmp_path)).look("l").stored == "float32"

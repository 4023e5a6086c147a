"""Figures of an adapter, each against its definition in dense float64 numpy."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import fill
from contract.kinds import KINDS, SCALE, dense_delta, injected
from helpers.checkpoints import adapter, save_checkpoint, site
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_inject as li
from lora_inject.analysis import (
    FORMATS,
    ThinProduct,
    across_layers,
    amplification,
    analyze,
    compare,
    findings,
    inspect_state,
    rounding,
    site_blocks,
    spectrum,
    subspace_similarity,
)
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files import row_reader

FLOAT64 = 1e-10  # sums of a few hundred float64 products of size 1, with a margin
SEEDS = st.integers(0, 2**31 - 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def phi(A1: np.ndarray, A2: np.ndarray, i: int, j: int, side: str) -> float:
    """Eq. (4) as it is written: the top i and j singular directions of two matrices."""
    tops = []
    for A, n in ((A1, i), (A2, j)):
        U, _, Vh = np.linalg.svd(A, full_matrices=False)
        tops.append(Vh[:n].T if side == "right" else U[:, :n])
    return float(np.linalg.norm(tops[0].T @ tops[1]) ** 2 / min(i, j))


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(6, 20), SEEDS)
def test_phi_is_equation_4(r1, r2, dim, seed):
    A1, A2 = gaussian(r1, dim, seed=seed), gaussian(r2, dim, seed=seed + 1)
    for side in ("right", "left"):
        first, second = (A1, A2) if side == "right" else (A1.T, A2.T)
        grid = subspace_similarity(first, second, side)
        assert grid.shape == (r1, r2)
        for i in range(1, r1 + 1):
            for j in range(1, r2 + 1):
                wanted = phi(first.numpy(), second.numpy(), i, j, side)
                assert float(grid[i - 1, j - 1]) == pytest.approx(wanted, abs=FLOAT64)
        assert ((grid >= 0) & (grid <= 1)).all()
        back = subspace_similarity(second, first, side)
        torch.testing.assert_close(back, grid.T, atol=FLOAT64, rtol=0)


# ------------------------------------------------------------------------------- blocks and spectra


def site_of(kind) -> SiteState:
    return li.adapter_state(injected(kind, torch.float64)).sites[kind.site]


@pytest.mark.parametrize("name", KINDS)
def test_the_blocks_of_every_kind_make_the_dense_delta(name):
    kind = KINDS[name]
    site = site_of(kind)
    wanted = dense_delta(kind, site.A, site.B)  # (E, out, in), or turned
    total = torch.zeros(site.spec.matrix_shape, dtype=torch.float64)
    square = 0.0
    for block in site_blocks(site):
        dense = block.delta.dense()
        rows, cols = slice(*block.block.rows), slice(*block.block.cols)
        total[rows, cols] = dense.T if block.transposed else dense
        values = torch.linalg.svdvals(dense)
        got = spectrum(ThinProduct.of(block.A, block.B, SCALE))
        torch.testing.assert_close(got.values, values[: len(got.values)], atol=1e-12, rtol=1e-10)
        assert got.norm == pytest.approx(float(dense.norm()), rel=1e-12)
        square += got.norm**2
    torch.testing.assert_close(total.reshape(wanted.shape), wanted, atol=1e-12, rtol=0)
    (inspected,) = inspect_state(AdapterState({kind.site: site})).sites
    assert inspected.delta_norm == pytest.approx(square**0.5, rel=1e-10)


def test_a_frozen_start_is_not_part_of_the_delta():
    model = nn.Sequential(nn.Linear(8, 6)).double()
    li.inject(model, {"rank": 2, "alpha": 3, "init": "pissa", "targets": ["0"]})
    assert analyze(li.adapter_state(model)).blocks[0].spectrum.rank == 0
    state = li.adapter_state(fill(model))
    site = state.sites["0"]
    dense = 1.5 * (site.B @ site.A - site.B0 @ site.A0)
    values = torch.linalg.svdvals(dense)[:4]
    got = analyze(state).blocks[0].spectrum.values
    torch.testing.assert_close(got, values, atol=1e-12, rtol=1e-9)
    assert inspect_state(state).sites[0].delta_norm == pytest.approx(float(dense.norm()), rel=1e-9)


@settings(max_examples=25)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), SEEDS)
def test_ranks_are_their_definitions(values, seed):
    n, s = len(values), np.sort(np.array(values))[::-1]
    U = torch.linalg.qr(gaussian(12, n, seed=seed)).Q
    V = torch.linalg.qr(gaussian(9, n, seed=seed + 1)).Q
    got = spectrum(ThinProduct.of((V * torch.tensor(s.copy())).T, U))
    np.testing.assert_allclose(got.values.numpy(), s, rtol=1e-9)
    assert got.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    p = s / s.sum()
    assert got.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    energy = np.cumsum(s**2) / (s**2).sum()
    np.testing.assert_allclose(got.energy.numpy(), energy, rtol=1e-9)
    for share in (0.5, 0.9, 0.95, 0.99, 1.0):
        k = got.rank_for(share)
        assert energy[k - 1] >= share - 1e-9
        assert k == 1 or energy[k - 2] < share + 1e-9


def test_a_spectrum_of_nothing_and_of_a_rank_above_the_widths():
    none = spectrum(ThinProduct.of(torch.randn(3, 5), torch.zeros(4, 3)))
    assert (none.rank, none.stable_rank, none.effective_rank, none.rank_for(0.9)) == (0,) * 4
    A, B = gaussian(6, 3), gaussian(2, 6)
    wanted = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(spectrum(ThinProduct.of(A, B)).values, wanted, atol=1e-12, rtol=0)


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 2), SEEDS)
def test_amplification_is_its_definition(n_out, n_in, rank, seed):
    W, A, B = gaussian(n_out, n_in, seed=seed), gaussian(rank, n_in), gaussian(n_out, rank)
    D, w = 0.5 * B.numpy() @ A.numpy(), W.numpy()
    for asked in range(1, rank + 1):
        got = amplification(W, ThinProduct.of(A, B, 0.5), rank=asked)
        U, _, Vh = np.linalg.svd(D)
        of_delta = np.linalg.norm(U[:, :asked].T @ w @ Vh[:asked].T)
        assert got.rank == asked
        assert got.of_delta == pytest.approx(of_delta, rel=1e-8, abs=FLOAT64)
        own = np.linalg.norm(np.linalg.svd(w)[1][:asked])
        assert got.of_weight == pytest.approx(own, rel=1e-8)
        assert got.delta_norm == pytest.approx(np.linalg.norm(D), rel=1e-10)  # of the whole
        assert got.weight_norm == pytest.approx(np.linalg.norm(w), rel=1e-10)
        assert got.relative == pytest.approx(np.linalg.norm(D) / np.linalg.norm(w), rel=1e-10)
    assert got.factor == pytest.approx(np.linalg.norm(D) / of_delta, rel=1e-6)


def test_the_random_directions_meet_their_expectation():
    """The expectation is `rank |W| / n` for a square W, as in the paper's Table 7."""
    W, delta = gaussian(12, 12), ThinProduct.of(gaussian(2, 12), gaussian(12, 2))
    squares = [amplification(W, delta, seed=2 * s).of_random ** 2 for s in range(200)]
    expected = amplification(W, delta).of_random_expected
    assert expected == pytest.approx(2 * float(W.norm()) / 12)
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - expected**2) < 5 * error


def quantized(values: np.ndarray, levels: int, group: int) -> np.ndarray:
    """Symmetric, by the largest of each group of a row, value by value."""
    out = np.zeros_like(values)
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], group):
            part = values[row, start : start + group]
            scale = np.abs(part).max() / np.float32(levels)
            out[row, start : start + group] = np.round(part / scale) * scale if scale else part
    return out


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 150), st.sampled_from([1e-4, 0.02, 0.5]), SEEDS)
@example(2, 51, 1e-4, 374210)  # less is kept than W + D rounds by, and counts as nothing
def test_what_a_format_leaves_is_its_definition(rows, columns, size, seed):
    W = gaussian(rows, columns, seed=seed).float()
    D = size * gaussian(rows, columns, seed=seed + 1).float()
    round_trips = {
        "bfloat16": lambda x: torch.from_numpy(x).bfloat16().float().numpy(),
        "float16": lambda x: x.astype(np.float16).astype(np.float32),
        "int8": lambda x: quantized(x, 127, columns),
        "int4": lambda x: quantized(x, 7, 64),
    }
    assert FORMATS.keys() == round_trips.keys()
    wanted = (W + D).numpy()
    for name, found in rounding(W, D).items():
        trip, d = round_trips[name], D.numpy().astype(np.float64)
        effect = trip(wanted).astype(np.float64) - trip(W.numpy())
        kept = (effect * d).sum() / (d * d).sum()
        lost = np.linalg.norm(effect - d) / np.linalg.norm(d)
        # Sums of float32 products, relative to |effect| |D| / |D|^2; and W + D rounds in float32,
        # below which nothing counts as kept.
        slack = 1e-4 * (1 + np.linalg.norm(effect) / np.linalg.norm(d))
        slack += 2**-23 * float(W.norm()) / np.linalg.norm(d)
        assert found.kept == pytest.approx(kept, abs=slack), name
        assert found.error == pytest.approx(lost, abs=slack), name
        if np.linalg.norm(effect) > 0.1 * np.linalg.norm(d):
            cosine = (effect * d).sum() / np.linalg.norm(effect) / np.linalg.norm(d)
            # The share that was kept, by |D| / |effect|: so is what counts as nothing of it.
            part = slack * max(1.0, np.linalg.norm(d) / np.linalg.norm(effect))
            assert found.likeness == pytest.approx(cosine, abs=part), name


# -------------------------------------------------------------------------- comparison and findings


def matrices(*names: str, shape: tuple[int, int] = (7, 9), **options: int) -> AdapterState:
    return adapter(*(site(name, shape, **{"rank": 4} | options) for name in names))


def test_a_comparison_is_phi_of_every_common_block():
    one, two = matrices("h.0.q", "h.1.q", "a"), matrices("h.1.q", "h.0.q", "b", rank=6, seed=9)
    compared = compare(one, two)
    assert [pair.name for pair in compared.pairs] == ["h.0.q", "h.1.q"]
    assert (compared.only_first, compared.only_second) == (("a",), ("b",))
    for pair in compared.pairs:
        first, second = one.sites[pair.site], two.sites[pair.site]
        right = subspace_similarity(first.A, second.A)
        assert torch.equal(pair.right.phi, right)
        assert torch.equal(pair.left.phi, subspace_similarity(first.B, second.B, "left"))
        assert (pair.right.first, pair.right.whole) == (float(right[0, 0]), float(right[-1, -1]))
        assert (pair.right.whole_by_chance, pair.left.whole_by_chance) == (6 / 9, 6 / 7)


def test_what_has_nothing_to_compare_is_nan_or_refused():
    one, zero = matrices("a"), matrices("a")
    zero.sites["a"].B.zero_()
    pair = compare(one, zero).pairs[0]
    assert math.isnan(pair.left.whole)
    assert pair.right.whole == pytest.approx(1)
    with pytest.raises(li.StateError, match="of 1 and 1 sites none has the same name"):
        compare(one, matrices("b"))
    with pytest.raises(li.StateError, match=r"1 of 2 updates \[7, 9\] and .* updates \[7, 8\]"):
        compare(one, matrices("a", shape=(7, 8)))


def test_layers_are_compared_by_their_whole_spans_in_the_order_of_the_model():
    state = matrices("h.0.q", "h.10.q", "h.2.q", "head")  # as safetensors sorts them
    (kind, (names, table)), = across_layers(state).items()  # fmt: skip
    assert (kind, names) == ("h.*.q", ["h.0.q", "h.2.q", "h.10.q"])
    for (i, one), (j, two) in product(enumerate(names), repeat=2):
        wanted = subspace_similarity(state.sites[one].A, state.sites[two].A)[-1, -1]
        assert float(table[i, j]) == pytest.approx(float(wanted), abs=FLOAT64)


@pytest.mark.parametrize(
    ("values", "rank", "codes"),
    [
        ((), 4, ["inert"]),
        ((1.0, 0.01), 4, ["one-direction"]),
        ((1.0,), 1, []),  # it is not told that rank 1 would do
        ((1.0, 0.5), 4, ["spare-rank"]),
        ((1.0, 0.9, 0.8), 4, []),
        ((1.0, 1.0, 1.0, 1.0), 4, []),
    ],
)
def test_findings_about_the_adapter_alone(values, rank, codes):
    """One site whose delta has given singular values."""
    (one,) = matrices("h.0.fc", rank=rank, alpha=rank).sites.values()
    B = torch.zeros(7, rank)
    B.diagonal()[: len(values)] = torch.tensor(values)
    state = adapter(replace(one, A=torch.eye(rank, 9), B=B))
    assert [finding.code for finding in findings(analyze(state))] == codes


# ------------------------------------------------------------- beside W, streamed from a checkpoint


@pytest.mark.parametrize("name", KINDS)
def test_streamed_figures_of_every_kind(name, tmp_path, monkeypatch):
    monkeypatch.setattr(row_reader, "BLOCK_ELEMENTS", 12)  # each weight takes several blocks
    kind = KINDS[name]
    model = injected(kind, torch.bfloat16)
    W = model.layer._parameters[kind.weight].detach().clone()
    state = li.adapter_state(model)
    site = state.sites[kind.site]
    base = {k: tensor.contiguous() for k, tensor in li.eject(model).state_dict().items()}
    save_checkpoint(tmp_path, base)
    streamed = analyze(state, tmp_path).weights[kind.site]
    assert streamed.stored == "bfloat16"
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


def test_a_large_w_is_decomposed_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_inject.analysis.weights.EXACT_ELEMENTS", 0)
    W = torch.randn(7, 9)
    save_checkpoint(tmp_path, {"fc.weight": W})
    norms = analyze(matrices("fc"), tmp_path).weights["fc"].blocks[0].norms
    wanted = float(torch.linalg.svdvals(W.double())[:4].norm())
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
    (one,) = matrices("fc", shape=(32, 64), alpha=4).sites.values()
    A, B = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (64, 32))
    save_checkpoint(tmp_path, {"fc.weight": (size * torch.randn(32, 64)).to(dtype)})
    state = adapter(replace(one, A=A.T.contiguous(), B=scale * B))
    assert {finding.code for finding in findings(analyze(state, tmp_path))} == codes


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"fc.qweight": torch.ones(7, 9)}, r"quantized.*Give the 16-bit checkpoint instead"),
        ({"fc.weight": torch.ones(7, 9).to(torch.int16)}, "stored as I16"),
    ],
)
def test_a_base_without_plain_weights_is_refused(tmp_path, tensors, words):
    save_checkpoint(tmp_path, {"fc.weight": torch.ones(7, 9)} | tensors)
    with pytest.raises(li.CheckpointError, match=words):
        analyze(matrices("fc"), tmp_path)

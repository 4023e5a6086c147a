"""Figures of an adapter: subspaces, spectra, amplification, rounding, findings.

Every figure is compared with its definition in dense float64 numpy, written here, for
every kind of site; what is known in closed form (equal, orthogonal and random subspaces, the
paper's own Table 7) is compared with that."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import KINDS, SCALE, dense_delta, fill, injected
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_inject as li
from lora_inject.analysis import (
    FORMATS,
    Rounded,
    Spectrum,
    ThinProduct,
    across_layers,
    amplification,
    analyze,
    compare,
    directions,
    findings,
    gaussian_similarity,
    inspect_state,
    rounding,
    similarity,
    site_blocks,
    spectrum,
    subspace_similarity,
)
from lora_inject.analysis.blocks import Place
from lora_inject.analysis.gallery import layer_names
from lora_inject.analysis.rounding import rounding_of_rows
from lora_inject.analysis.subspaces import block_directions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec

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


# ---------------------------------------------------------------------------------------- subspaces


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


def test_phi_of_equal_and_of_orthogonal_subspaces_is_1_and_0():
    turn = torch.linalg.qr(gaussian(10, 10)).Q
    A, other = gaussian(4, 4) @ turn[:4], gaussian(3, 3) @ turn[4:7]
    spanned_otherwise = (gaussian(4, 4) + 4 * torch.eye(4)) @ A
    assert float(subspace_similarity(A, spanned_otherwise)[-1, -1]) == pytest.approx(1, abs=1e-8)
    inside = subspace_similarity(A, A)[:, -1]
    torch.testing.assert_close(inside, torch.ones(4).double(), atol=FLOAT64, rtol=0)
    assert float(subspace_similarity(A, other).max()) < 1e-12


def test_phi_of_random_subspaces_is_on_average_what_is_known():
    """The mean over 400 draws within five standard errors of the closed form.

    `Var |U1^T U2|_F^2 = 2 i j (d - i)(d - j) / (d^2 (d - 1)(d + 2))` follows from the fourth
    moments of an orthogonal matrix drawn from the Haar measure.
    """
    r1, r2, d, n = 3, 5, 24, 400
    draws = torch.stack([gaussian_similarity(r1, r2, d, seed) for seed in range(n)])
    i, j = torch.arange(1, r1 + 1)[:, None], torch.arange(1, r2 + 1)[None]
    variance = 2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2))
    deviation = variance.sqrt() / torch.minimum(i, j)
    wanted = torch.maximum(i, j) / d
    assert ((draws.mean(0) - wanted).abs() < 5 * deviation / math.sqrt(n)).all()


def test_directions_come_strongest_first_in_any_dtype_without_those_of_zeros():
    assert directions(torch.tensor([[3.0, 0, 0], [6.0, 0, 0]])).shape == (3, 1)
    assert directions(torch.zeros(4, 2), "left").shape == (4, 0)
    A = torch.diag(torch.tensor([1.0, 3.0, 2.0])).to(torch.bfloat16)
    for side in ("right", "left"):
        tops = directions(A, side)
        assert tops.dtype == torch.float64
        assert tops.abs().argmax(0).tolist() == [1, 2, 0]


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


LABELS = {
    "linear": [""],
    "equal slices": ["q", "v"],
    "experts": ["expert 0", "expert 1", "expert 2"],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_name_slices_and_experts(name):
    assert [block.label for block in site_blocks(site_of(KINDS[name]))] == LABELS[name]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_frozen_start_is_not_part_of_the_delta(init):
    model = nn.Sequential(nn.Linear(8, 6)).double()
    li.inject(model, {"rank": 2, "alpha": 3, "init": init, "targets": ["0"]})
    assert analyze(li.adapter_state(model)).blocks[0].spectrum.rank == 0
    state = li.adapter_state(fill(model))
    site = state.sites["0"]
    dense = 1.5 * (site.B @ site.A - site.B0 @ site.A0)
    values = torch.linalg.svdvals(dense)[:4]
    got = analyze(state).blocks[0].spectrum.values
    torch.testing.assert_close(got, values, atol=1e-12, rtol=1e-9)
    assert inspect_state(state).sites[0].delta_norm == pytest.approx(float(dense.norm()), rel=1e-9)
    V = torch.linalg.svd(dense).Vh[:4].T
    grid = similarity(block_directions(site_blocks(site)[0]), V)
    torch.testing.assert_close(grid.diagonal(), torch.ones(4).double(), atol=1e-9, rtol=0)


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


def test_spectra_at_their_ends():
    none = spectrum(ThinProduct.of(torch.randn(3, 5), torch.zeros(4, 3)))
    assert (none.rank, none.stable_rank, none.effective_rank, none.rank_for(0.9)) == (0,) * 4
    assert none.energy.tolist() == [0, 0, 0]
    tiny = Spectrum(torch.tensor([1e-200, 1e-201], dtype=torch.float64))
    assert tiny.stable_rank == pytest.approx(1.01)
    A, B = gaussian(6, 3), gaussian(2, 6)  # a rank above the widths
    wanted = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(spectrum(ThinProduct.of(A, B)).values, wanted, atol=1e-12, rtol=0)


def test_no_matrix_of_the_size_of_w_is_formed():
    """A delta of 2 ** 46 elements: what formed it would not come back."""
    values = ThinProduct.of(torch.ones(1, 1 << 23), torch.ones(1 << 23, 1)).svd()[1]
    assert float(values) == pytest.approx(2.0**23)


def test_nan_is_refused_with_the_name_of_the_site():
    one = adapter("layer")
    one.sites["layer"].A[0, 0] = math.nan
    for verb in (analyze, across_layers, lambda s: compare(s, s)):
        with pytest.raises(li.StateError, match=r"'layer': it holds (1 )?NaN or"):
            verb(one)


# ------------------------------------------------------------------------------------ amplification


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


def test_the_expected_norm_of_random_directions_is_that_of_table_7():
    """GPT-3's layer 48: |W| = 61.95 in 12,288 dimensions; the paper states 0.02 at rank 4."""
    W = torch.zeros(6, 6).double()
    W[0, 0] = 61.95
    got = amplification(W, ThinProduct.of(torch.eye(4, 6), torch.eye(6, 4)))
    assert got.of_random_expected == pytest.approx(4 * 61.95 / 6)
    assert got.of_random_expected * 6 / 12288 == pytest.approx(0.02, abs=0.005)


def test_the_random_directions_meet_their_expectation():
    W, delta = gaussian(12, 10), ThinProduct.of(gaussian(2, 10), gaussian(12, 2))
    squares = [amplification(W, delta, seed=2 * s).of_random ** 2 for s in range(200)]
    expected = amplification(W, delta).of_random_expected ** 2
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - expected) < 5 * error


def test_amplification_where_there_is_nothing():
    W = gaussian(6, 5)
    none = amplification(W, ThinProduct.of(gaussian(3, 5), torch.zeros(6, 3)))
    assert (none.rank, none.of_delta, none.of_weight, none.of_random) == (0, 0.0, 0.0, 0.0)
    assert math.isnan(none.factor)
    e = torch.eye(2)
    assert amplification(torch.diag(e[0]), ThinProduct.of(e[1:], e[:, 1:])).factor == math.inf
    with pytest.raises(li.StateError, match=r"W is \[5, 6\], the delta \[6, 5\].*Conv1D"):
        amplification(W.T, ThinProduct.of(gaussian(1, 5), gaussian(6, 1)))


# ----------------------------------------------------------------------------------------- rounding


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


def test_blocks_of_rows_count_like_the_whole():
    W, D = gaussian(10, 70).bfloat16(), 0.01 * gaussian(10, 70, seed=1)
    steps = [slice(*ends) for ends in pairwise((0, 3, 4, 10))]
    whole = rounding(W, D)
    for name, found in rounding_of_rows((W[step], D[step]) for step in steps).items():
        assert found.kept == pytest.approx(whole[name].kept, rel=1e-4), name
        assert found.error == pytest.approx(whole[name].error, rel=1e-4), name


def test_rounding_in_the_stored_dtype_is_what_merging_reports():
    model = injected(KINDS["linear"], torch.bfloat16)
    site = li.adapter_state(model).sites["layer"]
    W = model.layer._parameters["weight"].detach().clone()
    delta = dense_delta(KINDS["linear"], site.A.float(), site.B.float())[0]
    (merged,) = li.merge(model).tensors.values()
    rounded = rounding(W, delta)["bfloat16"]
    assert rounded.kept == pytest.approx(merged.kept, rel=1e-5)
    assert rounded.error == pytest.approx(merged.error, rel=1e-4)


def test_rounding_at_its_ends():
    zero = rounding(torch.ones(2, 3), torch.zeros(2, 3))
    assert all((r.kept, r.error) == (1.0, 0.0) for r in zero.values())
    lost = rounding(torch.ones(1, 4), torch.full((1, 4), 1e-4))
    assert lost["bfloat16"] == Rounded(0.0, 1.0)
    assert lost["bfloat16"].likeness == 0
    assert lost["int8"].kept == pytest.approx(1, rel=1e-3)  # the scale itself takes it
    large = rounding(torch.full((1, 4), 1e5), torch.ones(1, 4))
    assert math.isnan(large["float16"].kept)


# -------------------------------------------------------------------- places, survey and comparison


@pytest.mark.parametrize(
    ("site", "label", "kind", "at"),
    [
        ("transformer.h.11.attn.c_attn", "q", "transformer.h.*.attn.c_attn [q]", "11"),
        ("down.1.attentions.0.to_q", "", "down.*.attentions.*.to_q", "1.0"),
        ("head", "", "head", "-"),
        ("0", "", "*", "0"),
        ("layers.2.experts.gate_up_proj", "expert 7", "layers.*.experts.gate_up_proj", "2"),
        ("layers.2.experts.7.w1", "", "layers.*.experts.*.w1", "2"),
        ("layers.2.up", "expert 7 up", "layers.*.up [up]", "2"),
    ],
)
def test_places(site, label, kind, at):
    place = Place(site, label)
    assert (place.kind, place.at) == (kind, at)


def adapter(*names: str, rank: int = 4, seed: int = 0, n_in: int = 9, n_out: int = 7):
    sites = {}
    for i, name in enumerate(names):
        spec = SiteSpec(name, "linear", n_in, n_out, (n_out, n_in), rank=rank, alpha=2 * rank)
        A, B = gaussian(rank, n_in, seed=seed + i), gaussian(n_out, rank, seed=seed + 100 + i)
        sites[name] = SiteState(spec, A.float(), B.float())
    return AdapterState(sites)


def test_a_comparison_is_phi_of_every_common_block():
    one, two = adapter("h.0.q", "h.1.q", "a"), adapter("h.1.q", "h.0.q", "b", rank=6, seed=9)
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
        assert pair.ranks == (4, 6)


def test_what_has_nothing_to_compare_is_refused():
    with pytest.raises(li.StateError, match="it has no low-rank sites"):
        analyze(AdapterState({}))
    with pytest.raises(li.StateError, match="of 1 and 1 sites none has the same name"):
        compare(adapter("a"), adapter("b"))
    with pytest.raises(li.StateError, match=r"1 of 2 updates \[7, 9\] and .* updates \[7, 8\]"):
        compare(adapter("a"), adapter("a", n_in=8))


def test_a_delta_of_zero_has_no_directions_to_compare():
    one, zero = adapter("a"), adapter("a")
    zero.sites["a"].B.zero_()
    pair = compare(one, zero).pairs[0]
    assert pair.left.phi.shape == (4, 0)
    assert math.isnan(pair.left.first)
    assert math.isnan(pair.left.whole)
    assert pair.right.whole == pytest.approx(1)


def test_layers_are_compared_by_their_whole_spans_in_the_order_of_the_model():
    state = adapter("h.0.q", "h.10.q", "h.2.q", "h.3.q", "head")  # as safetensors sorts them
    zero = state.sites["h.3.q"]
    zero.A.zero_()
    zero.B.zero_()
    (kind, (names, table)), = across_layers(state).items()  # fmt: skip
    assert (kind, names) == ("h.*.q", ["h.0.q", "h.2.q", "h.3.q", "h.10.q"])
    assert layer_names(names) == ["0", "2", "3", "10"]
    for (i, one), (j, two) in product(enumerate(names), repeat=2):
        if "h.3.q" in (one, two):
            assert math.isnan(table[i, j])
        else:
            wanted = subspace_similarity(state.sites[one].A, state.sites[two].A)[-1, -1]
            assert float(table[i, j]) == pytest.approx(float(wanted), abs=FLOAT64)


# ----------------------------------------------------------------------------------------- findings


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
    spec = SiteSpec("h.0.fc", "linear", 9, 7, (7, 9), rank=rank, alpha=rank)
    A, B = torch.zeros(rank, 9), torch.zeros(7, rank)
    for i, value in enumerate(values):
        A[i, i], B[i, i] = 1.0, value
    told = findings(analyze(AdapterState({"h.0.fc": SiteState(spec, A, B)})))
    assert [finding.code for finding in told] == codes
    assert all(finding.names == ("h.0.fc",) for finding in told)

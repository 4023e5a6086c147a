"""Adapters computed with: sums, truncation, products and other shapes, against dense deltas."""

import math
import os
from dataclasses import replace

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, dense, make_site, make_state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_inject as li
from lora_inject.algebra.svd import decompose
from lora_inject.core.adapter.fingerprint import Fingerprint
from lora_inject.core.adapter.generators import generators_of
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files import row_reader
from lora_inject.core.files.read_at import read_at
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices
from lora_inject.errors import StateError

KINDS = list(KIND_SPECS)
WEIGHTS = st.sampled_from([1.0, -1.0, 0.5, -0.3, 2.0])


def one_site(spec: SiteSpec, **options) -> AdapterState:
    return AdapterState({spec.name: make_site(spec, **options)})


def delta(state: AdapterState) -> Tensor:
    (site,) = state.sites.values()
    return dense(site)


def assert_close(found: Tensor, due: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == due.shape
    assert (found - due).abs().max() <= tolerance * max(1.0, float(due.abs().max()))


@given(
    kind=st.sampled_from(KINDS),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    weights=st.tuples(WEIGHTS, WEIGHTS),
    scaling=st.sampled_from(["standard", "rslora"]),
    derived=st.tuples(st.booleans(), st.booleans()),
)
def test_a_weighted_sum_is_that_of_the_dense_deltas(kind, ranks, weights, scaling, derived):
    spec = replace(KIND_SPECS[kind], scaling=scaling)
    a, b = (
        one_site(replace(spec, rank=r), seed=r, derived=d, dtype=torch.float64)
        for r, d in zip(ranks, derived, strict=True)
    )
    found = a * weights[0] + weights[1] * b
    assert_close(delta(found), weights[0] * delta(a) + weights[1] * delta(b))
    n = sum(r * (2 if d else 1) for r, d in zip(ranks, derived, strict=True))
    (site,) = found.sites.values()
    assert site.spec.rank == n
    assert site.A0 is None
    assert math.isclose(a.distance(found), (delta(a) - delta(found)).norm(), abs_tol=1e-9)
    assert math.isclose(a.cosine(b), cosine(delta(a), delta(b)), abs_tol=1e-9)


def cosine(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()))


def test_scaling_keeps_the_bits_of_the_tensors_and_a_frozen_start():
    a = one_site(KIND_SPECS["slices"], derived=True, dtype=torch.bfloat16)
    half, turned = (a * -0.5).sites["h.0.qkv"], (-a).sites["h.0.qkv"]
    site = a.sites["h.0.qkv"]
    assert torch.equal(half.A, site.A)
    assert torch.equal(half.B, -site.B)
    assert torch.equal(half.B0, -site.B0)
    assert half.spec.alpha == site.spec.alpha / 2
    assert_close(dense(turned), -dense(site))
    assert a * 1.0 == a


def test_a_sum_of_16_bits_keeps_them_where_scales_are_equal_and_is_exact_where_not():
    spec = KIND_SPECS["linear"]
    a, b = (one_site(spec, seed=n, dtype=torch.bfloat16) for n in (1, 2))
    same = (a + b).sites["h.0.fc"]
    assert same.A.dtype == torch.bfloat16
    assert torch.equal(same.A, torch.cat([s.sites["h.0.fc"].A for s in (a, b)]))
    assert (a + b + a).sites[
        "h.0.fc"
    ].B.dtype == torch.bfloat16  # scales as rounded by alpha / rank
    unequal = a + 0.3 * b
    assert unequal.sites["h.0.fc"].B.dtype == torch.float32
    assert_close(delta(unequal), delta(a) + 0.3 * delta(b), 1e-6)


@pytest.mark.parametrize(
    "slices",
    [Slices((("q", 4), ("k", 1), ("v", 3)), ("k",)), Slices((("x", 2), ("y", 6)), ("y",)), None],
)
def test_sites_that_adapt_other_slices_are_added(slices):
    a = one_site(KIND_SPECS["slices"], seed=1, dtype=torch.float64)
    b = one_site(replace(KIND_SPECS["slices"], slices=slices), seed=2, dtype=torch.float64)
    found = a + b * 0.7
    assert_close(delta(found), delta(a) + 0.7 * delta(b))
    assert math.isclose(a.cosine(b), cosine(delta(a), delta(b)), abs_tol=1e-12)
    kept = found.sites["h.0.qkv"].spec.slices
    assert (kept and kept.adapt) == (("q", "k", "v") if slices and "k" in slices.adapt else None)


def test_sites_of_one_of_them_are_kept_and_bases_that_differ_are_refused():
    a, b = make_state(KIND_SPECS["linear"]), make_state(KIND_SPECS["embedding"])
    assert list((a + b).sites) == ["h.0.fc", "wte"]
    assert_close(dense((a - b).sites["wte"]), -dense(b.sites["wte"]))
    marks = [Fingerprint({"w": (2,)}, {"w": (1.0, x)}) for x in (2.0, 3.0)]
    a, b = (replace(a, fingerprint=mark) for mark in marks)
    with pytest.raises(StateError, match=r"different bases: 'w' 1 of 2 sampled values differ"):
        a + b
    with pytest.raises(StateError, match=r"different bases"):
        a.cosine(b)
    both = li.combine([a, b], any_base=True)
    assert (both.fingerprint, b.fingerprint) == (
        a.fingerprint,
        Fingerprint({"w": (2,)}, {"w": (1.0, 3.0)}),
    )
    assert_close(dense(both.sites["h.0.fc"]), 2 * dense(a.sites["h.0.fc"]))
    packed = replace(b, fingerprint=Fingerprint({"w": (1, 1)}, {}, {"w": "Params4bit, nf4"}))
    assert len((a + packed).sites) == 1  # one was trained on a quantized base: nothing to compare
    other = Fingerprint({"v": (1,)}, {"v": (5.0,)})
    assert (a + replace(b, fingerprint=other)).fingerprint == Fingerprint(
        {"w": (2,), "v": (1,)}, {"w": (1.0, 2.0), "v": (5.0,)}
    )


def test_trained_tensors_are_mixed_where_the_base_cancels_out():
    a, b = (
        replace(make_state(KIND_SPECS["linear"]), trained={"head": torch.full((2,), x)})
        for x in (1.0, 4.0)
    )
    with pytest.raises(StateError, match=r"trained tensor 'head': it is a full copy .* 1 \+ 1"):
        a + b
    with pytest.raises(StateError, match=r"weight 0.5"):
        a * 0.5
    assert torch.equal((a - replace(b, trained={})).trained["head"], a.trained["head"])
    mixed = li.combine([a, b], [0.75, 0.25])
    assert mixed.trained["head"].tolist() == [1.75, 1.75]


def test_sites_that_do_not_fit_are_refused_by_name():
    spec = KIND_SPECS["linear"]
    a = one_site(spec)
    wide = one_site(replace(spec, in_features=9, weight_shape=(7, 9)))
    with pytest.raises(
        StateError, match=r"'h.0.fc': adapter 1 of 2 maps 5 to 7 .* adapter 2 of 2 9"
    ):
        a + wide
    square = replace(KIND_SPECS["parameter"], out_features=5, weight_shape=(5, 5))
    with pytest.raises(StateError, match=r"\(out, in\) in adapter 1 .*\(in, out\) in adapter 2"):
        one_site(square) + one_site(replace(square, transposed=True))
    for weight in (0, math.nan, math.inf):
        with pytest.raises(StateError, match=r"the weight of the adapter: it is .*other than 0"):
            a * weight
    poor = AdapterState({"h.0.fc": replace(a.sites["h.0.fc"], A=a.sites["h.0.fc"].A * math.nan)})
    with pytest.raises(StateError, match=r"truncate, A of site 'h.0.fc': it holds 10 NaN"):
        poor.truncate(rank=1)


def test_what_would_overflow_or_has_no_values_is_refused():
    spec = KIND_SPECS["linear"]
    a = one_site(spec)
    tiny = a * 1e-40
    assert_close(delta(tiny + a), delta(a), 1e-6)  # B of the first term is not scaled by 1e40
    for weight in (1e308, 1e-320):
        with pytest.raises(StateError, match=r"site 'h.0.fc': its alpha would become (inf|0.0)"):
            (a * weight) * weight
    big = AdapterState({spec.name: a.sites[spec.name].mapped(lambda t: t * 1e6)})
    with pytest.raises(StateError, match=r"to\(torch.float16\), 'h.0.fc'.* become infinite"):
        big.to(torch.float16)
    meta = AdapterState({spec.name: a.sites[spec.name].mapped(lambda t: t.to("meta"))})
    assert meta == meta + AdapterState({}) != a
    for act in (lambda: meta.truncate(rank=1), lambda: a.distance(meta), lambda: meta.cosine(a)):
        with pytest.raises(StateError, match=r"meta device and has no values"):
            act()


# Truncation -------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 3),
    derived=st.booleans(),
    seed=st.integers(0, 9),
)
def test_truncation_is_the_best_of_its_rank(kind, rank, derived, seed):
    a = one_site(replace(KIND_SPECS[kind], rank=3), derived=derived, seed=seed, dtype=torch.float64)
    (site,) = a.sites.values()
    found, cuts = li.truncate(a, rank=rank)
    left = 0.0
    for block in site.spec.blocks:
        part = dense(site).reshape(site.spec.matrix_shape)[slice(*block.rows), slice(*block.cols)]
        left += float(torch.linalg.svdvals(part)[rank:].square().sum())
    error = (delta(found) - dense(site)).norm()
    assert math.isclose(error, math.sqrt(left), abs_tol=1e-9)
    (cut,) = cuts.values()
    assert math.isclose(cut.error, math.sqrt(left) / dense(site).norm(), abs_tol=1e-9)
    (small,) = found.sites.values()
    assert small.spec.rank == cut.rank <= rank
    assert math.isclose(small.scale, 1)


@pytest.mark.parametrize(("small", "rank"), [(1e-7, 2), (1e-13, 2), (1e-18, 1)])
def test_all_of_the_energy_keeps_all_but_rounding(small: float, rank: int) -> None:
    site = make_site(replace(KIND_SPECS["linear"], rank=2), dtype=torch.float64)
    A, B = torch.eye(*site.A.shape).double(), torch.eye(*site.B.shape).double()
    A[1] *= small
    a = AdapterState({site.spec.name: replace(site, A=A, B=B)})
    found = a.truncate(energy=1.0)
    assert found.sites[site.spec.name].spec.rank == rank
    assert (delta(found) - delta(a)).norm() <= 1e-14 * delta(a).norm()


def test_energy_chooses_the_smallest_rank_that_holds_it():
    spec = replace(KIND_SPECS["linear"], rank=3, alpha=3.0)
    B = torch.eye(7, 3) * torch.tensor([4.0, 3.0, 0.0])
    a = AdapterState({"h.0.fc": SiteState(spec, torch.eye(3, 5), B)})
    ranks = {e: a.truncate(energy=e).sites["h.0.fc"].spec.rank for e in (0.1, 0.64, 0.65, 1.0)}
    assert ranks == {0.1: 1, 0.64: 1, 0.65: 2, 1.0: 2}
    assert a.truncate(energy=1.0, rank=1).sites["h.0.fc"].spec.rank == 1
    nothing = AdapterState({"h.0.fc": SiteState(spec, torch.eye(3, 5), torch.zeros(7, 3))})
    assert li.truncate(nothing, rank=2).sites["h.0.fc"] == (3, 1, 0.0)
    for wrong in ({}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(StateError, match=r"truncate: "):
            a.truncate(**wrong)


def test_truncation_forms_no_dense_delta_and_rounds_once(monkeypatch):
    spec = SiteSpec("big", "linear", 3000, 2000, (2000, 3000), 4, 4.0)
    a = one_site(spec, dtype=torch.bfloat16)
    sizes = []
    watch = type("Watch", (torch.overrides.TorchFunctionMode,), {})

    def seen(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, tuple) else (out,)
        sizes.extend(t.numel() for t in made if isinstance(t, Tensor))
        return out

    watch.__torch_function__ = seen
    with watch():
        small = a.truncate(rank=2)
        assert a.distance(small) > 0
        a.cosine(small)
    assert max(sizes) < 2000 * 3000 // 100
    assert small.sites["big"].A.dtype == torch.bfloat16


# The same update in other shapes ----------------------------------------------------------------


def test_dtype_selection_and_names():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    li.inject(net, {"rank": 2, "targets": ["0", "2"], "train": [r"0\.bias"]})
    state = li.adapter_state(net)
    cast = state.to(torch.bfloat16)
    assert {t.dtype for s in cast.sites.values() for t in s.tensors.values()} == {torch.bfloat16}
    assert cast.trained["0.bias"].dtype == torch.bfloat16
    assert cast.config == state.config
    with pytest.raises(StateError, match=r"not a floating point dtype"):
        state.to(torch.int8)
    assert (list(state.select("2").sites), list(state.select("2").trained)) == (["2"], [])
    assert list(state.select("0").trained) == ["0.bias"]
    with pytest.raises(StateError, match=r"select '5': it matches nothing"):
        state.select("5")

    renamed = state.rename({"^(0|2)": r"net.\1"})
    assert list(renamed.sites) == ["net.0", "net.2"]
    assert list(renamed.trained) == ["net.0.bias"]
    assert set(renamed.fingerprint.shapes) == {"net.0.weight", "net.2.weight", "net.2.bias"}
    assert renamed.rename({"net": ""}) == replace(state, config=None)
    assert renamed.rename(lambda name: name.removeprefix("net.")) == replace(state, config=None)
    li.install(nn.ModuleDict({"net": li.eject(net)}), renamed, "again")
    plain = SiteSpec("fc", "linear", 6, 8, (8, 6), rank=2, alpha=2.0)  # the weight is not named
    poor = AdapterState({"fc": replace(state.sites["0"], spec=plain)}).rename({"fc": "net.fc"})
    assert poor.sites["net.fc"].spec.weight == "net.fc.weight"
    with pytest.raises(StateError, match=r"rename 'et': it occurs in no name"):
        renamed.rename({"et": "x"})
    for bad in ("a b", "../x", "a/b", r"a\\b", "a\n", ""):
        with pytest.raises(StateError, match=r"rename '0': its new name would be"):
            state.rename({"0": bad})
        with pytest.raises(StateError, match=r"rename '0': its new name would be"):
            state.rename(lambda name, bad=bad: bad if name == "0" else name)
    with pytest.raises(StateError, match=r"the name '1': two tensors"):
        state.rename({"0|2": "1"})


@pytest.mark.parametrize("kind", ["slices", "slices of conv1d", "linear", "experts"])
@pytest.mark.parametrize("derived", [False, True])
def test_fused_projections_are_split_and_joined_again(kind, derived):
    spec = KIND_SPECS[kind]
    a = one_site(spec, derived=derived, dtype=torch.float64)
    sizes = dict(spec.slices.sizes) if spec.slices else {"up": 3, "gate": 4}
    apart = a.split(spec.name, sizes)
    adapted = spec.slices.adapt if spec.slices else tuple(sizes)
    head = spec.name.rpartition(".")[0]
    assert list(apart.sites) == [f"{head}.{part}" for part in adapted]
    axis = -1 if spec.transposed else -2
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    for part in adapted:
        rows = delta(a).narrow(axis, starts[part], sizes[part])
        assert_close(dense(apart.sites[f"{head}.{part}"]), rows)
    back = apart.join(spec.name.removeprefix(f"{head}."), sizes)
    assert list(back.sites) == [spec.name]
    assert_close(delta(back), delta(a))
    assert back.sites[spec.name].spec.weight == spec.weight


def test_joined_parts_may_have_other_ranks_and_scales_and_wrong_widths_are_refused():
    q = SiteSpec("h.0.q", "linear", 5, 4, (4, 5), 2, 4.0, weight="h.0.q.weight")
    v = SiteSpec("h.0.v", "linear", 5, 3, (3, 5), 1, 9.0, weight="h.0.v.weight")
    a = make_state(q, v)
    found = a.join("qkv", {"q": 4, "k": 2, "v": 3}).sites["h.0.qkv"]
    zero = torch.zeros(2, 5, dtype=torch.float64)
    due = torch.cat([dense(a.sites["h.0.q"]), zero, dense(a.sites["h.0.v"])])
    assert_close(dense(found), due, 1e-6)
    assert found.spec.slices == Slices((("q", 4), ("k", 2), ("v", 3)), ("q", "v"))
    with pytest.raises(StateError, match=r"'h.0.q' has 4 outputs, not 5"):
        a.join("qkv", {"q": 5, "v": 3})
    with pytest.raises(StateError, match=r"no site ends in x or y"):
        a.join("qkv", {"x": 5, "y": 3})
    with pytest.raises(StateError, match=r"it has 4 outputs"):
        a.split(r"0\.q", {"a": 1, "b": 2})


@pytest.mark.parametrize("kind", ["experts", "turned experts"])
def test_stacks_of_experts_are_split_and_joined_again(kind):
    spec = KIND_SPECS[kind]
    a = one_site(spec, derived=True, dtype=torch.float64)
    apart = a.split_experts(r"moe\.up")
    assert list(apart.sites) == [f"moe.{e}.up" for e in range(3)]
    for e, site in enumerate(apart.sites.values()):
        one = delta(a)[e]
        assert_close(dense(site), one.T if spec.transposed else one)
    back = apart.join_experts("moe", 3)
    assert_close(delta(back), delta(a).mT if spec.transposed else delta(a))
    fewer = AdapterState({"moe.1.up": replace(apart.sites["moe.1.up"], A0=None, B0=None)})
    stack = delta(fewer.join_experts("moe", 3))
    assert not stack[[0, 2]].any()
    with pytest.raises(StateError, match=r"'moe.2.up' is beyond 2 experts"):
        apart.join_experts("moe", 2)
    with pytest.raises(StateError, match=r"is not a stack of experts"):
        one_site(KIND_SPECS["linear"]).split_experts("fc")


def test_what_the_variant_adds_is_refused_by_name():
    site = make_site(KIND_SPECS["linear"])
    odd = type("Odd", (SiteState,), {"tensors": property(lambda s: {"A": s.A, "B": s.B, "m": s.B})})
    a = AdapterState({"h.0.fc": odd(site.spec, site.A, site.B)})
    for use in (lambda: a + a, lambda: 2 * a, lambda: a.truncate(rank=1), lambda: a.cosine(a)):
        with pytest.raises(StateError, match=r"site 'h.0.fc': its update is not B @ A alone .*'m'"):
            use()


def test_a_bias_of_b_is_scaled_added_and_kept_by_truncation():
    """The layer's bias becomes `bias + scale * b`."""
    specs = [
        replace(KIND_SPECS["linear"], alpha=alpha, lora_bias=alpha != 5) for alpha in (4, 3, 5)
    ]
    a, b, c = (
        AdapterState(
            {s.name: SiteState.of(s, {**make_site(s, seed=n).tensors, "b": torch.randn(7)})}
        )
        if s.lora_bias
        else one_site(s, seed=n)
        for n, s in enumerate(specs)
    )

    def bias(state: AdapterState) -> Tensor:
        (site,) = state.sites.values()
        return site.scale * site.further["b"].double()

    due = -0.5 * bias(a) + bias(b)
    found = a * -0.5 + b + c
    assert_close(bias(found), due, 1e-6)
    assert_close(delta(found), -0.5 * delta(a) + delta(b) + delta(c), 1e-6)
    assert_close(bias(c - a), -bias(a), 1e-6)
    assert_close(bias(found.truncate(rank=1)), due, 1e-6)
    assert_close(bias(li.combine([a, b, c], [-0.5, 1, 1], method="svd")), due, 1e-6)
    with pytest.raises(StateError, match=r"with \['b'\]"):
        a.cosine(b)


# Comparison -------------------------------------------------------------------------------------


def test_diff_lists_sites_and_trained_tensors_of_either():
    a = replace(make_state(KIND_SPECS["linear"]), trained={"head": torch.zeros(2)})
    b = replace(a + make_state(KIND_SPECS["embedding"]), trained={"head": torch.ones(2)})
    found = li.diff(a, b)
    assert not found.equal
    assert found.sites["wte"].ranks == (0, 2)
    assert found.sites["wte"].norms[0] == 0
    assert found.sites["wte"].cosine is None
    assert found.sites["h.0.fc"].distance < 1e-12
    assert found.trained == {"head": pytest.approx(math.sqrt(2))}
    assert math.isclose(found.cosine, a.cosine(b))
    assert math.isclose(found.distance, a.distance(b))
    assert li.diff(a, a).equal
    assert found.to_dict()["cosine"] == found.cosine


def test_files_are_read_lazily_and_give_the_same(tmp_path):
    a, b = make_state(KIND_SPECS["linear"]), make_state(KIND_SPECS["linear"], KIND_SPECS["conv"])
    paths = [li.write_adapter(s, tmp_path / n) for n, s in (("a", a), ("b", b))]
    assert li.combine(paths, [1, 0.5]) == li.combine([a, b], [1, 0.5])
    assert li.truncate(paths[0], rank=1) == li.truncate(a, rank=1)
    assert li.diff(*paths) == li.diff(a, b)


@pytest.mark.parametrize(("act", "most"), [("distance", 1), ("cosine", 1), ("diff", 2)])
def test_adapters_in_files_are_compared_in_one_reading(act, most, tmp_path, monkeypatch):
    sizes = []

    def counted(fd: int, buffer: memoryview, offset: int) -> None:
        sizes.append(len(buffer))
        read_at(fd, buffer, offset)

    monkeypatch.setattr(row_reader, "read_at", counted)
    values = []
    for seed in (0, 1):
        state = one_site(KIND_SPECS["linear"], seed=seed)
        path = li.write_adapter(state, tmp_path / f"{seed}.safetensors", "native")
        os.utime(path, (0, 0))  # younger files are read at once
        values.append(li.read_adapter(path))
    all_bytes = sum(t.nbytes for v in values for s in v.sites.values() for t in s.tensors.values())
    (li.diff if act == "diff" else getattr(AdapterState, act))(*values)
    assert all_bytes <= sum(sizes) <= most * all_bytes


def test_a_decomposition_leaves_the_generators_of_all_devices_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # as torch.manual_seed does
    before = torch.get_rng_state()
    found = [decompose(torch.ones(200, 200), rank=2) for _ in range(2)]
    assert not found[0].exact
    assert torch.equal(found[0].U, found[1].U)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_each_device_has_a_generator_besides_the_cpus(monkeypatch):
    own = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", own)
    devices = map(torch.device, ["cpu", "cuda:1", "meta", "cuda:1"])
    assert generators_of(devices) == [torch.default_generator, own[1]]

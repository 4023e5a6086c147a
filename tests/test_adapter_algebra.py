"""Adapters computed with: sums, truncation, other shapes, combination; against dense deltas."""

import copy
import math
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from conftest import COPIES
from helpers.adapter_states import KIND_SPECS, dense, make_site, make_state
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_inject as li
from lora_inject.algebra.combining import METHODS, kept
from lora_inject.algebra.svd import decompose
from lora_inject.core.adapter.fingerprint import Sampled
from lora_inject.core.adapter.other_tensors import mapped
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices
from lora_inject.errors import StateError

KINDS = list(KIND_SPECS)
LINEAR = KIND_SPECS["linear"]
WEIGHT = st.sampled_from([1.0, -1.0, 0.5, -0.3, 2.0])


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
    weights=st.tuples(WEIGHT, WEIGHT),
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
    assert math.isclose(li.diff(a, found).distance, (delta(a) - delta(found)).norm(), abs_tol=1e-9)
    assert math.isclose(li.diff(a, b).cosine, cosine(delta(a), delta(b)), abs_tol=1e-9)


def cosine(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()))


def test_scaling_keeps_the_bits_of_the_tensors_and_a_frozen_start():
    a = one_site(KIND_SPECS["slices"], derived=True, dtype=torch.bfloat16)
    (site,), (half,) = a.sites.values(), (a * -0.5).sites.values()
    assert torch.equal(half.A, site.A)
    assert torch.equal(half.B, -site.B)
    assert torch.equal(half.B0, -site.B0)
    assert half.spec.alpha == site.spec.alpha / 2
    assert_close(delta(-a), -delta(a))
    assert a * 1.0 == a


def test_a_sum_of_16_bits_keeps_them_where_scales_are_equal_and_is_exact_where_not():
    a, b = (one_site(LINEAR, seed=n, dtype=torch.bfloat16) for n in (1, 2))
    same = (a + b + a).sites["h.0.fc"]  # scales as rounded by alpha / rank
    assert same.B.dtype == torch.bfloat16
    assert torch.equal(same.A, torch.cat([s.sites["h.0.fc"].A for s in (a, b, a)]))
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
    assert math.isclose(li.diff(a, b).cosine, cosine(delta(a), delta(b)), abs_tol=1e-12)
    kept = found.sites["h.0.qkv"].spec.slices
    assert (kept and kept.adapt) == (("q", "k", "v") if slices and "k" in slices.adapt else None)


def test_sites_of_one_of_them_are_kept_and_a_tiny_weight_costs_no_precision():
    a, b = make_state(LINEAR), make_state(KIND_SPECS["embedding"])
    assert list((a + b).sites) == ["h.0.fc", "wte"]
    assert_close(dense((a - b).sites["wte"]), -dense(b.sites["wte"]))
    assert_close(delta(a * 1e-40 + a), delta(a), 1e-6)  # B is not scaled by 1e40


def test_bases_that_differ_are_refused():
    a = make_state(LINEAR)
    first, other, elsewhere = (
        replace(a, fingerprint={name: Sampled((2,), (1.0, x))})
        for name, x in (("w", 2.0), ("w", 3.0), ("v", 5.0))
    )
    packed = replace(a, fingerprint={"w": Sampled((1, 1), packed="Params4bit, nf4")})
    for act in (lambda: first + other, lambda: li.diff(first, other)):
        with pytest.raises(StateError, match=r"different bases: 'w' 1 of 2 sampled values differ"):
            act()
    both = li.combine([first, other], any_base=True)
    assert both.fingerprint == first.fingerprint
    assert_close(delta(both), 2 * delta(a))
    assert (first + packed).fingerprint  # trained on a quantized base: nothing to compare
    assert (first + elsewhere).fingerprint == first.fingerprint | elsewhere.fingerprint


def test_trained_tensors_are_mixed_where_the_base_cancels_out():
    a, b = (
        replace(ONE, trained={"head": torch.full((2,), x)}, source="one path") for x in (1.0, 4.0)
    )
    with pytest.raises(StateError, match=r"trained tensor 'head': it is a full copy .* 1 \+ 1"):
        a + b
    with pytest.raises(StateError, match=r"weight 0.5"):
        a * 0.5
    assert torch.equal((a - ONE).trained["head"], a.trained["head"])
    assert li.combine([a, b], [0.75, 0.25]).trained["head"].tolist() == [1.75, 1.75]


SQUARE = replace(KIND_SPECS["parameter"], out_features=5, weight_shape=(5, 5))
ONE = one_site(LINEAR)
WIDE = one_site(replace(LINEAR, in_features=9, weight_shape=(7, 9)))
TURNED = one_site(replace(SQUARE, transposed=True))
META, HUGE = (mapped(ONE, change) for change in (lambda t: t.to("meta"), lambda t: t * 1e6))
REFUSED = {
    r"'h.0.fc': adapter 1 of 2 maps 5 to 7 .* adapter 2 of 2 9": lambda: ONE + WIDE,
    r"\(out, in\) in adapter 1 .*\(in, out\) in adapter 2": lambda: one_site(SQUARE) + TURNED,
    r"the weight of the adapter: it is 0.*other than 0": lambda: ONE * 0,
    r"site 'h.0.fc': its alpha would become inf": lambda: (ONE * 1e308) * 1e308,
    r"as_dtype torch.float16, 'h.0.fc'.* become infinite": lambda: li.as_dtype(HUGE, torch.float16),
    r"not a floating point dtype": lambda: li.as_dtype(ONE, torch.int8),
    r"truncate.* meta device and has no values": lambda: li.truncate(META, rank=1),
    r"truncate: neither rank nor energy": lambda: li.truncate(ONE),
    r"truncate: rank is 0": lambda: li.truncate(ONE, rank=0),
    r"truncate: energy is 1\.5": lambda: li.truncate(ONE, energy=1.5),
    r"subset '5': it matches nothing": lambda: li.subset(ONE, "5"),
    r"rename 'et': it occurs in no name": lambda: li.rename(ONE, {"et": "x"}),
    r"'h.0.fc' is not a stack of experts": lambda: li.split_experts(ONE, "fc"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_right_result_is_refused_by_name(words):
    with pytest.raises(StateError, match=words):
        REFUSED[words]()


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


def test_energy_chooses_the_smallest_rank_that_holds_it():
    spec = replace(LINEAR, rank=3, alpha=3.0)
    B = torch.eye(7, 3) * torch.tensor([4.0, 3.0, 0.0])
    a = AdapterState({"h.0.fc": SiteState(spec, torch.eye(3, 5), B)})
    ranks = {e: li.truncate(a, energy=e).sites["h.0.fc"].rank for e in (0.1, 0.64, 0.65, 1.0)}
    assert ranks == {0.1: 1, 0.64: 1, 0.65: 2, 1.0: 2}
    assert li.truncate(a, energy=1.0, rank=1).sites["h.0.fc"].rank == 1
    nothing = AdapterState({"h.0.fc": SiteState(spec, torch.eye(3, 5), torch.zeros(7, 3))})
    assert li.truncate(nothing, rank=2).sites["h.0.fc"] == (3, 1, 0.0)


def test_truncation_and_comparison_form_no_dense_delta():
    """One of 2 ** 36 elements: what formed it would not come back."""
    n = 1 << 18
    a = one_site(SiteSpec("big", "linear", n, n, (n, n), 2, 4.0), dtype=torch.bfloat16)
    small = li.truncate(a, rank=1).state
    assert small.sites["big"].A.dtype == torch.bfloat16
    difference = li.diff(a, small)
    assert difference.distance > 0
    assert 0 < difference.cosine < 1


# The same update in other shapes ----------------------------------------------------------------


def test_dtype_selection_and_names():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    li.inject(net, {"rank": 2, "targets": ["0", "2"], "train": [r"0\.bias"]})
    state = li.adapter_state(net)
    cast = li.as_dtype(state, torch.bfloat16)
    assert {t.dtype for s in cast.sites.values() for t in s.tensors.values()} == {torch.bfloat16}
    assert cast.trained["0.bias"].dtype == torch.bfloat16
    assert cast.config == state.config
    assert (list(li.subset(state, "2").sites), list(li.subset(state, "2").trained)) == (["2"], [])
    assert list(li.subset(state, "0").trained) == ["0.bias"]
    renamed = li.rename(state, {"^(0|2)": r"net.\1"})
    assert (list(renamed.sites), list(renamed.trained)) == (["net.0", "net.2"], ["net.0.bias"])
    assert set(renamed.fingerprint) == {"net.0.weight", "net.2.weight", "net.2.bias"}
    assert li.rename(renamed, {"net": ""}) == replace(state, config=None)
    back = li.rename(renamed, lambda name: name.removeprefix("net."))
    assert back == replace(state, config=None)
    li.install(nn.ModuleDict({"net": li.eject(net)}), renamed, "again")
    for bad in ("a b", "../x", ""):
        with pytest.raises(StateError, match=r"rename '0': its new name would be"):
            li.rename(state, {"0": bad})
    with pytest.raises(StateError, match=r"the name '1': two tensors"):
        li.rename(state, {"0|2": "1"})


@pytest.mark.parametrize("kind", ["slices", "slices of conv1d", "linear", "experts"])
@pytest.mark.parametrize("derived", [False, True])
def test_fused_projections_are_split_and_joined_again(kind, derived):
    spec = KIND_SPECS[kind]
    a = one_site(spec, derived=derived, dtype=torch.float64)
    sizes = dict(spec.slices.sizes) if spec.slices else {"up": 3, "gate": 4}
    apart = li.split(a, spec.name, sizes)
    head, _, leaf = spec.name.rpartition(".")
    adapted = spec.slices.adapt if spec.slices else tuple(sizes)
    assert list(apart.sites) == [f"{head}.{part}" for part in adapted]
    pieces = delta(a).split([*sizes.values()], dim=-1 if spec.transposed else -2)
    for part, rows in zip(sizes, pieces, strict=True):
        if part in adapted:
            assert_close(dense(apart.sites[f"{head}.{part}"]), rows)
    back = li.join(apart, leaf, sizes)
    assert_close(delta(back), delta(a))
    assert back.sites[spec.name].spec.weight == spec.weight


def test_joined_parts_may_have_other_ranks_and_scales_and_wrong_widths_are_refused():
    q = SiteSpec("h.0.q", "linear", 5, 4, (4, 5), 2, 4.0, weight="h.0.q.weight")
    v = SiteSpec("h.0.v", "linear", 5, 3, (3, 5), 1, 9.0, weight="h.0.v.weight")
    a = make_state(q, v)
    joined = li.join(a, "qkv", {"q": 4, "k": 2, "v": 3})
    zero = torch.zeros(2, 5, dtype=torch.float64)
    due = torch.cat([dense(a.sites["h.0.q"]), zero, dense(a.sites["h.0.v"])])
    assert_close(delta(joined), due, 1e-6)
    kept = joined.sites["h.0.qkv"].spec.slices
    assert kept == Slices((("q", 4), ("k", 2), ("v", 3)), ("q", "v"))
    with pytest.raises(StateError, match=r"'h.0.q' has 4 outputs, not 5"):
        li.join(a, "qkv", {"q": 5, "v": 3})
    with pytest.raises(StateError, match=r"it has 4 outputs"):
        li.split(a, r"0\.q", {"a": 1, "b": 2})


@pytest.mark.parametrize("kind", ["experts", "turned experts"])
def test_stacks_of_experts_are_split_and_joined_again(kind):
    spec = KIND_SPECS[kind]
    a = one_site(spec, derived=True, dtype=torch.float64)
    stack = delta(a)
    apart = li.split_experts(a, r"moe\.up")
    assert list(apart.sites) == [f"moe.{e}.up" for e in range(3)]
    for e, site in enumerate(apart.sites.values()):
        assert_close(dense(site), stack[e])
    assert_close(delta(li.join_experts(apart, "moe", 3)), stack)
    fewer = li.join_experts(li.subset(apart, r"moe\.1\.up"), "moe", 3)
    assert_close(delta(fewer)[1], stack[1])
    assert not delta(fewer)[[0, 2]].any()
    with pytest.raises(StateError, match=r"'moe.2.up' is beyond 2 experts"):
        li.join_experts(apart, "moe", 2)


def test_what_a_variant_adds_has_no_sum_and_is_refused_by_name():
    spec = replace(LINEAR, variant="dora")
    dora = SiteState.of(spec, {**make_site(spec).tensors, "m": torch.ones(7)})
    a = AdapterState({"h.0.fc": dora})
    cut, compared = (lambda: li.truncate(a, rank=1)), (lambda: li.diff(a, a))
    for use in (lambda: a + a, lambda: 2 * a, cut, compared):
        with pytest.raises(StateError, match=r"site 'h.0.fc': its update is not B @ A alone .*'m'"):
            use()


def test_a_bias_of_b_is_scaled_added_and_kept_by_truncation():
    """The layer's bias becomes `bias + scale * b`."""

    def with_bias(alpha: float) -> AdapterState:
        spec = replace(LINEAR, alpha=alpha, lora_bias=True)
        b = torch.randn(7)
        return AdapterState({spec.name: SiteState.of(spec, {**make_site(spec).tensors, "b": b})})

    def bias(state: AdapterState) -> Tensor:
        (site,) = state.sites.values()
        return site.scale * site.further["b"].double()

    a, b, c = with_bias(4), with_bias(3), one_site(LINEAR, seed=2)
    due, total = -0.5 * bias(a) + bias(b), a * -0.5 + b + c
    assert_close(bias(total), due, 1e-6)
    assert_close(delta(total), -0.5 * delta(a) + delta(b) + delta(c), 1e-6)
    assert_close(bias(c - a), -bias(a), 1e-6)
    assert_close(bias(li.truncate(total, rank=1).state), due, 1e-6)
    assert_close(bias(li.combine([a, b, c], [-0.5, 1, 1], method="svd")), due, 1e-6)
    with pytest.raises(StateError, match=r"with \['b'\]"):
        li.diff(a, b)


# Combination: the methods of PEFT's `add_weighted_adapter`, with PEFT's results -------------------

WEIGHTS = [0.7, -0.4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc, self.conv = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Conv2d(2, 4, 3)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """PEFT's model with two adapters, and the same as our values."""
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": ["wte", "fc", "conv"], "init_lora_weights": False}
    model = get_peft_model(Net(), LoraConfig(lora_alpha=6, **options), "one")
    model.add_adapter("two", LoraConfig(lora_alpha=2, **options))
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    return model, [li.read_adapter(folder / name) for name in ("one", "two")]


def peft_deltas(model, method, **options) -> dict[str, Tensor]:
    if "new" in model.peft_config:
        model.delete_adapter("new")
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "new", method, **options)
    layers = {name: model.base_model.model.get_submodule(name) for name in ("wte", "fc", "conv")}
    return {name: layer.get_delta_weight("new").detach().double() for name, layer in layers.items()}


CASES = [*((method, "total") for method in METHODS), ("ties", "frequency")]


@pytest.mark.parametrize(("method", "signs"), CASES)
@pytest.mark.filterwarnings("ignore:.*target.*")
def test_every_method_gives_what_peft_gives(theirs, method, signs, monkeypatch):
    model, states = theirs
    if method.startswith("dare"):
        tensors = "W" if method.endswith("svd") else "AB"
        names = [n for n, _ in model.base_model.model.named_modules() if n in ("wte", "fc", "conv")]
        asked = iter([f"0 {name} {t} {k}" for name in names for t in tensors for k in (0, 1)])

        def drawn(like: Tensor) -> Tensor:
            """Our mask, for a delta `(in, out)` of the embedding and tensors of the convolution."""
            turned = tensors == "W" and like.shape == (9, 6)
            shape = like.flatten(1).shape
            mask = kept(shape[::-1] if turned else shape, 0.5, next(asked))
            return (mask.T if turned else mask).reshape(like.shape).to(like.dtype)

        monkeypatch.setattr(torch, "bernoulli", drawn)
    density = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
    due = peft_deltas(model, method, **density, majority_sign_method=signs)
    combined = li.combine(states, WEIGHTS, method=method, **density, majority_sign=signs)
    for name, delta in due.items():
        site = combined.sites[name]
        assert (dense(site) - delta).norm() <= 2e-6 * delta.norm(), name
        assert site.spec.rank == (6 if method == "cat" else 3)


@pytest.mark.parametrize("kind", ["slices", "experts", "turned experts", "slices of conv1d"])
def test_methods_on_the_delta_hold_for_every_kind(kind):
    """With all values kept, a mix on the dense delta is the plain sum."""
    spec = KIND_SPECS[kind]
    a, b = (AdapterState({spec.name: make_site(spec, seed=n, derived=True)}) for n in (1, 2))
    mixed = li.combine([a, b], WEIGHTS, method="magnitude_prune_svd", density=1.0, rank=5)
    due = 0.7 * dense(a.sites[spec.name]) - 0.4 * dense(b.sites[spec.name])
    assert (dense(mixed.sites[spec.name]) - due).norm() <= 1e-5 * due.norm()


def test_masks_depend_on_seed_site_and_place_and_on_nothing_else():
    a, b = make_state(LINEAR), make_state(LINEAR, KIND_SPECS["conv"])
    options = {"method": "dare_linear", "density": 0.5}
    both = li.combine([b, b], seed=3, **options)
    assert li.combine([a, a], seed=3, **options).sites["h.0.fc"] == both.sites["h.0.fc"]
    assert li.combine([b, b], seed=4, **options) != both
    assert 0.45 < kept((100, 100), 0.5, "x").mean() < 0.55


NOT_COMBINED = [
    ([ONE, ONE], {"method": "mean"}, "no such method"),
    ([], {}, "no adapter"),
    ([ONE], {"weights": [1, 2]}, "2 weights for 1 adapters"),
    ([ONE, ONE], {"method": "ties"}, "density is missing"),
    ([ONE, ONE], {"density": 0.5}, "density is given"),
    ([ONE, ONE], {"rank": 2}, "rank is given"),
    ([ONE, ONE], {"method": "svd", "rank": 0}, "rank is 0"),
    ([ONE, make_state(replace(LINEAR, rank=3))], {"method": "linear"}, "2 of 2 rank 3"),
    ([make_state(LINEAR, derived=True)], {"method": "linear"}, "frozen start"),
]


@pytest.mark.parametrize(("states", "options", "words"), NOT_COMBINED, ids=lambda value: None)
def test_what_cannot_be_combined_is_refused(states, options, words):
    with pytest.raises(StateError, match=words):
        li.combine(states, **options)


def test_the_adapter_whose_trained_tensor_holds_nan_is_named():
    a, broken = (make_state(LINEAR, trained={"head": torch.ones(2)}) for _ in "12")
    broken.trained["head"][0] = torch.nan
    with pytest.raises(StateError, match=r"adapter 2 of 3, trained tensor 'head': it holds 1 NaN"):
        li.combine([a, broken, a], [1, -1, 1])
    with pytest.raises(StateError, match=r"diff, adapter 1 of 2, trained tensor"):
        li.diff(broken, a)


@pytest.mark.parametrize("end", ["weight", "bias"])
def test_an_update_and_a_trained_copy_of_one_tensor_are_refused(end):
    """No model takes such an adapter, so none is made."""
    spec = replace(LINEAR, lora_bias=True)
    site = SiteState.of(spec, {**make_site(spec).tensors, "b": torch.ones(7)})
    trained = AdapterState(
        {}, {f"{spec.name}.{end}": torch.ones(7, 5) if end == "weight" else site.further["b"]}
    )
    with pytest.raises(StateError, match=rf"1 of 2 updates '.*{end}' and adapter 2 of 2 holds"):
        li.combine([AdapterState({spec.name: site}), trained])


def test_diff_lists_sites_and_trained_tensors_of_either():
    a = replace(make_state(LINEAR), trained={"head": torch.zeros(2)})
    b = replace(a + make_state(KIND_SPECS["embedding"]), trained={"head": torch.ones(2)})
    difference = li.diff(a, b)
    assert not difference.equal
    table = difference.sites["wte"]
    assert (table.ranks, table.norms[0], table.cosine) == ((0, 2), 0, None)
    assert difference.sites["h.0.fc"].distance < 1e-12
    assert difference.trained == {"head": pytest.approx(math.sqrt(2))}
    update, further = float(delta(a).norm()), float(dense(b.sites["wte"]).norm())
    assert math.isclose(difference.cosine, update / math.hypot(update, further))
    assert math.isclose(difference.distance, further)
    assert li.diff(a, a).equal


def test_a_decomposition_is_the_same_again_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, two = (decompose(torch.ones(200, 200), rank=2) for _ in range(2))
    assert torch.equal(one.U, two.U)
    assert torch.equal(torch.get_rng_state(), before)


# An adapter as a value --------------------------------------------------------------------------


@pytest.fixture
def state():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    li.inject(net, {"rank": 2, "init": "pissa", "targets": ["0"], "train": [r"2\.bias"]})
    return li.adapter_state(net)


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()])
def test_a_copy_is_equal_with_read_only_mappings_too(state, copied):
    state = replace(state, base_copies=MappingProxyType({"w": torch.ones(2)}))
    assert copied(state) == state


def test_equality_looks_at_every_tensor_its_dtype_and_every_number(state):
    site = state.sites["0"]
    for changed in (
        replace(site, A=site.A + 1),
        replace(site, B0=site.B0 + 1),
        replace(site, A0=None, B0=None),
        replace(site, B=site.B.double()),
        replace(site, spec=replace(site.spec, alpha=3.0)),
    ):
        assert changed != site
        assert replace(state, sites={"0": changed}) != state
    assert replace(state, trained={"2.bias": torch.ones(4)}) != state
    assert replace(state, fingerprint=None) != state

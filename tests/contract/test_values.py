"""Adapters computed with: sums, truncation, other shapes, combination; against dense updates."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import COPIES
from helpers.refusals import refused
from helpers.states import SITES, Site, effect, linear, parameter, state_of, with_biases_of_b
from torch import Tensor, nn

import lora_inject as li

LINEAR, EMBEDDING, SLICES = (SITES[name] for name in ("linear", "embedding", "slices"))
FUSED = {"slices": SLICES, "slices of conv1d": SITES["slices of conv1d"]}
STACKS = {name: SITES[name] for name in ("experts", "turned experts")}


def one(row: Site, seed: int = 0, **rule: Any) -> li.AdapterState:
    """An adapter of one layer in float64."""
    return li.algebra.as_dtype(state_of(row.by(**rule), seed=seed), torch.float64)


def delta(state: li.AdapterState, row: Site | None = None) -> Tensor:
    (site,) = state.sites.values()
    return effect(site, row)


def assert_close(found: Tensor, due: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == due.shape
    assert (found - due).abs().max() <= tolerance * max(1.0, float(due.abs().max()))


def cosine(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()))


# ------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("derived", [False, True], ids=["zero start", "from the weight"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("kind", SITES)
def test_a_weighted_sum_is_that_of_the_dense_updates(
    kind: str, scaling: str, derived: bool
) -> None:
    row, start = SITES[kind], {"init": "pissa"} if derived else {}
    a = one(row, 1, rank=1, scaling=scaling, **start)
    b = one(row, 2, rank=3, scaling=scaling)
    found, due = li.combine([a, b], [0.5, -2.0]), 0.5 * delta(a, row) - 2.0 * delta(b, row)
    assert_close(delta(found, row), due)
    (site,) = found.sites.values()
    assert site.spec.rank == 3 + (2 if derived else 1)
    assert site.A0 is None
    difference = li.diff(a, b)
    assert math.isclose(difference.cosine, cosine(delta(a, row), delta(b, row)), abs_tol=1e-9)
    apart = (delta(a, row) - delta(b, row)).norm()
    assert math.isclose(difference.distance, apart, abs_tol=1e-9)


def test_scaling_keeps_the_bits_of_the_tensors_and_a_frozen_start() -> None:
    a = li.algebra.as_dtype(one(SLICES, init="pissa"), torch.bfloat16)
    (site,), (half,) = a.sites.values(), li.combine([a], [-0.5]).sites.values()
    assert torch.equal(half.A, site.A)
    assert torch.equal(half.B, -site.B)
    assert torch.equal(half.B0, -site.B0)
    assert half.spec.alpha == site.spec.alpha / 2
    assert_close(delta(li.combine([a], [-1]), SLICES), -delta(a, SLICES))
    assert li.combine([a]) == a
    both = li.combine([a, a], [1e-40, 1])  # B is not scaled by 1e40
    assert_close(delta(both, SLICES), delta(a, SLICES), 1e-6)


def test_a_sum_of_16_bits_keeps_them_where_scales_are_equal_and_is_exact_where_not() -> None:
    a, b = (li.algebra.as_dtype(one(LINEAR, seed), torch.bfloat16) for seed in (1, 2))
    same = li.combine([a, b, a]).sites["h.0.fc"]  # scales as rounded by alpha / rank
    assert same.B.dtype == torch.bfloat16
    assert torch.equal(same.A, torch.cat([s.sites["h.0.fc"].A for s in (a, b, a)]))
    unequal = li.combine([a, b], [1, 0.3])
    assert unequal.sites["h.0.fc"].B.dtype == torch.float32
    assert_close(delta(unequal), delta(a) + 0.3 * delta(b), 1e-6)


@pytest.mark.parametrize(
    ("rule", "spans", "union"),
    [
        ({"adapt": ["k"]}, ((4, 5),), ("q", "k", "v")),
        ({"slices": {"x": 2, "y": 6}, "adapt": ["y"]}, ((2, 8),), None),
        ({"slices": None, "adapt": None}, (), None),
    ],
)
def test_sites_that_adapt_other_slices_are_added(rule: Any, spans: Any, union: Any) -> None:
    given = {key: value for key, value in {**SLICES.rule, **rule}.items() if value is not None}
    other = replace(SLICES, rule=given, spans=spans)
    a, b = one(SLICES, 1), one(other, 2)
    found = li.combine([a, b], [1, 0.7])
    (site,) = found.sites.values()
    assert (site.spec.slices and site.spec.slices.adapt) == union
    row = replace(SLICES, spans=((0, 4), (4, 5), (5, 8)))
    assert_close(effect(site, row), delta(a, SLICES) + 0.7 * delta(b, other))
    wanted = cosine(delta(a, SLICES), delta(b, other))
    assert math.isclose(li.diff(a, b).cosine, wanted, abs_tol=1e-12)


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", [*FUSED, *STACKS, "linear"])
def test_the_cosine_of_a_small_update_is_its_own(kind: str, start: str) -> None:
    row = SITES[kind]
    a, b = one(row, init=start), one(row, 1, init=start)
    if start == "pissa":  # small beside its start
        for state in (a, b):
            for site in state.sites.values():
                site.A.copy_(site.A0 + 1e-5 * site.A)
                site.B.copy_(site.B0 + 1e-5 * site.B)
    wanted = cosine(delta(a, row), delta(b, row))
    for size in (1.0, 1e-6, 1e-12, -1e-12):
        small = li.combine([b], [size])
        found = li.diff(a, small).cosine
        assert math.isclose(found, math.copysign(1, size) * wanted, abs_tol=1e-9), size
        assert math.isclose(li.diff(a, li.combine([a], [size])).cosine, math.copysign(1, size))


def test_diff_lists_sites_and_trained_tensors_of_either() -> None:
    a = replace(one(LINEAR), trained={"head": torch.zeros(2)})
    b = replace(li.combine([a, one(EMBEDDING)]), trained={"head": torch.ones(2)})
    difference = li.diff(a, b)
    assert not difference.equal
    assert list(b.sites) == ["h.0.fc", "wte"]
    table = difference.sites["wte"]
    assert (table.ranks, table.norms[0], table.cosine) == ((0, 2), 0, None)
    assert difference.sites["h.0.fc"].distance < 1e-12
    assert difference.trained == {"head": pytest.approx(math.sqrt(2))}
    update, further = float(delta(a).norm()), float(effect(b.sites["wte"]).norm())
    assert math.isclose(difference.cosine, update / math.hypot(update, further))
    assert math.isclose(difference.distance, further)
    assert li.diff(a, a).equal


def of_a_base(seed: int, name: str = "0") -> li.AdapterState:
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(5, 7)})
    return li.adapter_state(li.inject(model, {"rank": 2, "targets": [name]}))


def test_adapters_of_different_bases_are_added_only_if_that_is_said() -> None:
    first, other, elsewhere = of_a_base(0), of_a_base(1), of_a_base(2, "1")
    for act in (lambda: li.combine([first, other]), lambda: li.diff(first, other)):
        with refused(li.StateError, "0.weight"):
            act()
    both = li.combine([first, other], any_base=True)
    assert both.fingerprint == first.fingerprint
    assert_close(delta(both), delta(first) + delta(other), 1e-6)
    of_both = first.fingerprint | elsewhere.fingerprint
    assert li.combine([first, elsewhere]).fingerprint == of_both


def test_trained_tensors_are_mixed_where_the_base_cancels_out() -> None:
    plain = one(LINEAR)
    a, b = (replace(plain, trained={"head": torch.full((2,), x)}) for x in (1.0, 4.0))
    for act in (lambda: li.combine([a, b]), lambda: li.combine([a], [0.5])):
        with refused(li.StateError, "head"):
            act()
    less = li.combine([a, plain], [1, -1])
    assert torch.equal(less.trained["head"], a.trained["head"])
    assert li.combine([a, b], [0.75, 0.25]).trained["head"].tolist() == [1.75, 1.75]
    b.trained["head"][0] = torch.nan
    with refused(li.StateError, "2 of 3", "head", "NaN"):
        li.combine([a, b, a], [1, -1, 1])
    with refused(li.StateError, "1 of 2", "head"):
        li.diff(b, a)


def test_a_bias_of_b_is_scaled_added_and_kept_by_truncation() -> None:
    """The layer's bias becomes `bias + scale * b`."""

    def bias(state: li.AdapterState) -> Tensor:
        (site,) = state.sites.values()
        return site.scale * site.further["b"].double()

    a, b = (with_biases_of_b(one(LINEAR, n, alpha=4.0 - n), seed=n) for n in (0, 1))
    c = one(LINEAR, 2)
    due, total = -0.5 * bias(a) + bias(b), li.combine([a, b, c], [-0.5, 1, 1])
    assert_close(bias(total), due, 1e-6)
    assert_close(delta(total), -0.5 * delta(a) + delta(b) + delta(c), 1e-6)
    assert_close(bias(li.combine([c, a], [1, -1])), -bias(a), 1e-6)
    assert_close(bias(li.truncate(total, rank=1).state), due, 1e-6)
    assert_close(bias(li.combine([a, b, c], [-0.5, 1, 1], method="svd")), due, 1e-6)
    with refused(li.StateError, "h.0.fc", "'b'"):
        li.diff(a, b)


# ------------------------------------------------------------------------------------- truncation


def blocks(kind: str, delta: Tensor) -> list[Tensor]:
    """The matrices that have a low rank of their own: each expert's, each adapted slice's."""
    if SITES[kind].spans:
        return [delta[start:stop] for start, stop in SITES[kind].spans]
    return list(delta) if delta.dim() == 3 else [delta]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", SITES)
def test_truncation_is_the_best_of_its_rank(kind: str, start: str, rank: int) -> None:
    row = SITES[kind]
    a = one(row, rank=2 if start == "pissa" else 3, init=start)
    whole, (found, cuts) = delta(a, row), li.truncate(a, rank=rank)
    left = sum(float(torch.linalg.svdvals(m)[rank:].square().sum()) for m in blocks(kind, whole))
    assert math.isclose((delta(found, row) - whole).norm(), math.sqrt(left), abs_tol=1e-9)
    (cut,), (small,) = cuts.values(), found.sites.values()
    assert math.isclose(cut.error, math.sqrt(left) / whole.norm(), abs_tol=1e-9)
    assert small.spec.rank == cut.rank <= rank
    assert math.isclose(small.scale, 1)


def with_values(*values: float) -> li.AdapterState:
    """An adapter whose update has these singular values."""
    state = one(LINEAR, rank=3, alpha=3.0)
    (site,) = state.sites.values()
    site.A.copy_(torch.eye(3, 5))
    site.B.copy_(torch.eye(7, 3) * torch.tensor(values))
    return state


def test_energy_chooses_the_smallest_rank_that_holds_it() -> None:
    a = with_values(4.0, 3.0, 0.0)
    ranks = {e: li.truncate(a, energy=e).sites["h.0.fc"].rank for e in (0.1, 0.64, 0.65, 1.0)}
    assert ranks == {0.1: 1, 0.64: 1, 0.65: 2, 1.0: 2}
    assert li.truncate(a, energy=1.0, rank=1).sites["h.0.fc"].rank == 1
    assert li.truncate(with_values(0.0, 0.0, 0.0), rank=2).sites["h.0.fc"] == (3, 1, 0.0)


def test_truncation_and_comparison_form_no_dense_update_and_draw_no_numbers() -> None:
    """One of 2 ** 36 elements: what formed it would not come back."""
    n, drawn = 1 << 18, torch.get_rng_state()
    with torch.device("meta"):
        big = li.inject(nn.ModuleDict({"big": nn.Linear(n, n)}), {"rank": 2, "targets": ["big"]})
    (site,) = li.adapter_state(big).sites.values()
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in ((2, n), (n, 2)))
    a = li.AdapterState({"big": li.classes.SiteState(site.spec, A.bfloat16(), B.bfloat16())})
    small, again = (li.truncate(a, rank=1).state for _ in range(2))
    assert small == again
    assert small.sites["big"].A.dtype == torch.bfloat16
    difference = li.diff(a, small)
    assert difference.distance > 0
    assert 0 < difference.cosine < 1
    assert torch.equal(torch.get_rng_state(), drawn)


# ------------------------------------------------------------------ the same update in other shapes


def two_layers(**config: Any) -> Any:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return li.inject(net, {"rank": 2, "targets": ["0", "2"], "train": [r"0\.bias"], **config})


def test_dtype_selection_and_names() -> None:
    net = two_layers()
    state = li.adapter_state(net)
    cast = li.algebra.as_dtype(state, torch.bfloat16)
    assert {t.dtype for s in cast.sites.values() for t in s.tensors.values()} == {torch.bfloat16}
    assert cast.trained["0.bias"].dtype == torch.bfloat16
    assert cast.config == state.config
    assert (
        list(li.algebra.subset(state, "2").sites),
        list(li.algebra.subset(state, "2").trained),
    ) == (["2"], [])
    assert list(li.algebra.subset(state, "0").trained) == ["0.bias"]
    renamed = li.algebra.rename(state, {"^(0|2)": r"net.\1"})
    assert (list(renamed.sites), list(renamed.trained)) == (["net.0", "net.2"], ["net.0.bias"])
    assert set(renamed.fingerprint) == {"net.0.weight", "net.2.weight", "net.2.bias"}
    assert li.algebra.rename(renamed, {"net": ""}) == replace(state, config=None)
    back = li.algebra.rename(renamed, lambda name: name.removeprefix("net."))
    assert back == replace(state, config=None)
    li.install(nn.ModuleDict({"net": li.eject(net)}), renamed, "again")
    for names in ({"0": "a b"}, {"0": "../x"}, {"0": ""}, {"0|2": "1"}):
        with refused(li.StateError, "'0'" if "0" in names else "'1'"):
            li.algebra.rename(state, names)


def test_a_cast_keeps_a_small_update_where_the_dtype_has_room() -> None:
    kept = delta(li.algebra.as_dtype(faint(), torch.bfloat16))
    torch.testing.assert_close(kept, delta(faint()), rtol=0.02, atol=1e-11)


def test_two_names_are_swapped() -> None:
    state = li.adapter_state(two_layers(train=[]))
    swapped = li.algebra.rename(state, {"0": "2", "2": "0"})
    assert {name: swapped.sites[name].spec.in_features for name in "02"} == {"0": 8, "2": 6}
    assert li.algebra.rename(swapped, {"0": "2", "2": "0"}).sites == state.sites
    deep = li.algebra.rename(state, {"0": r"model.layers.0", "2": r"model.2"})
    assert [*deep.sites] == ["model.layers.0", "model.2"]


RENAMED: list[tuple[str, dict[str, str], str]] = [
    ("h.q", {"h": "model.layers", "[^.]+": "x"}, "model.layers.x"),
    ("a.b.c.a.b", {r"b\.c": "x", r"a\.b": "y"}, "a.x.y"),  # the first rule, not the leftmost match
    ("a.b.c", {"b": "", r"a\.c": "x"}, "x"),
    ("net.q", {"net": "", "^q": "x"}, "x"),
    ("h.net.q", {"h": "a", "net": "", "q": "x"}, "a.x"),
    ("a.b.c", {r"(a)\.(b)": r"\2.\1", "[abc]": "x"}, "b.a.x"),
    ("q.q", {"q": "k"}, "k.k"),
    ("q.h.q", {"^q": "k", "q$": "v"}, "k.h.v"),
]


@pytest.mark.parametrize(("name", "new", "due"), RENAMED)
def test_a_rule_changes_nothing_that_one_before_has_made(name, new, due) -> None:
    assert [*li.algebra.rename(state_of(linear(name)), new).sites] == [due]


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", [*FUSED, "linear", "experts"])
def test_fused_projections_are_split_and_joined_again(kind: str, start: str) -> None:
    row = SITES[kind]
    a = one(row, init=start)
    (site,) = a.sites.values()
    sizes = dict(site.spec.slices.sizes) if site.spec.slices else {"up": 3, "gate": 4}
    adapted = site.spec.slices.adapt if site.spec.slices else tuple(sizes)
    apart = li.algebra.split(a, row.name, sizes)
    head, _, leaf = row.name.rpartition(".")
    assert list(apart.sites) == [f"{head}.{part}" for part in adapted]
    for part, rows in zip(sizes, delta(a, row).split([*sizes.values()], dim=-2), strict=True):
        if part in adapted:
            assert_close(effect(apart.sites[f"{head}.{part}"]), rows)
    back, joined = (
        li.algebra.join(apart, leaf, sizes),
        replace(row, spans=row.spans or ((0, 3), (3, 7))),
    )
    assert_close(delta(back, joined), delta(a, row))
    assert back.sites[row.name].spec.weight == site.spec.weight


def test_joined_parts_may_have_other_ranks_and_scales_and_wrong_widths_are_refused() -> None:
    q, v = linear("h.0.q", 5, 4), linear("h.0.v", 5, 3, rank=1, alpha=9.0)
    a = state_of(q, v)
    joined = li.algebra.join(a, "qkv", {"q": 4, "k": 2, "v": 3})
    row = Site("h.0.qkv", q.layer, 9, {}, ((0, 4), (6, 9)))
    zero = torch.zeros(2, 5, dtype=torch.float64)
    due = torch.cat([effect(a.sites["h.0.q"]), zero, effect(a.sites["h.0.v"])])
    assert_close(delta(joined, row), due, 1e-6)
    slices = joined.sites["h.0.qkv"].spec.slices
    assert (dict(slices.sizes), slices.adapt) == ({"q": 4, "k": 2, "v": 3}, ("q", "v"))
    with refused(li.StateError, "h.0.q", "5"):
        li.algebra.join(a, "qkv", {"q": 5, "v": 3})
    with refused(li.StateError, "h.0.q", "4"):
        li.algebra.split(a, r"0\.q", {"a": 1, "b": 2})


# ------------------------------------------------------------------------------------ combination


@pytest.mark.parametrize("kind", [*FUSED, *STACKS])
def test_methods_on_the_dense_update_hold_for_every_kind(kind: str) -> None:
    """With all values kept, a mix on the dense update is the plain sum."""
    row = SITES[kind]
    a, b = (one(row, seed, init="pissa") for seed in (1, 2))
    how = {"method": "magnitude_prune_svd", "density": 1.0, "rank": 5}
    due = 0.7 * delta(a, row) - 0.4 * delta(b, row)
    mixed = delta(li.combine([a, b], [0.7, -0.4], **how), row)
    assert (mixed - due).norm() <= 1e-5 * due.norm()


@pytest.mark.parametrize("method", ["svd", "ties_svd", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_mix_has_the_dtype_of_what_was_mixed(method: str, dtype: torch.dtype) -> None:
    a, b = (li.algebra.as_dtype(one(LINEAR, seed, alpha=3.0 + seed), dtype) for seed in (1, 2))
    how = {"method": method, **({"density": 1.0} if method == "ties_svd" else {})}
    (site,) = li.combine([a, b], [0.3, 0.6], **how).sites.values()
    assert {site.A.dtype, site.B.dtype} == {dtype}


def test_masks_depend_on_seed_site_and_place_and_keep_as_much_as_is_asked() -> None:
    large = linear("h.0.fc", 100, 100, rank=100)
    a, b = state_of(large), state_of(large, large.at("h.1.fc"))
    a, b = (replace(s, sites={n: ones(site) for n, site in s.sites.items()}) for s in (a, b))
    options = {"method": "dare_linear", "density": 0.5}
    first, both = (li.combine([s], seed=3, **options) for s in (a, b))
    assert first.sites["h.0.fc"] == both.sites["h.0.fc"]
    assert not torch.equal(both.sites["h.0.fc"].A, both.sites["h.1.fc"].A)
    assert li.combine([b], seed=4, **options) != both
    assert 0.45 < (first.sites["h.0.fc"].A != 0).double().mean() < 0.55


def test_a_mask_does_not_depend_on_the_other_adapters() -> None:
    rows = [linear(f"h.{n}.fc", 20, 20, rank=8) for n in (0, 1)]
    both, first = state_of(*rows, seed=1), state_of(rows[0])
    empty = state_of(*rows, size=0.0)
    for method in ("dare_linear", "dare_linear_svd"):
        made = [
            li.combine([other, both], method=method, density=0.5).sites["h.1.fc"]
            for other in (first, empty)
        ]
        assert torch.equal(effect(made[0]), effect(made[1])), method


def ones(site: li.classes.SiteState) -> li.classes.SiteState:
    return site.of(site.spec, {role: torch.ones_like(t) for role, t in site.tensors.items()})


# --------------------------------------------------------------------------------------- refusals

ONE, WIDE = one(LINEAR), one(linear("h.0.fc", 9))
SQUARE = parameter("mix.table", 5, 5)
DORA = one(linear("h.0.fc", variant="dora"))
STARTED = one(LINEAR, init="pissa")
TRAINED = li.AdapterState({}, {"h.0.fc.weight": torch.ones(7, 5)})


def huge() -> li.AdapterState:
    state = one(LINEAR)
    state.sites["h.0.fc"].A.mul_(1e6)
    return state


def faint() -> li.AdapterState:
    """All of whose B is too small for float16, which counts in steps of 6e-8."""
    state = one(LINEAR)
    state.sites["h.0.fc"].B.mul_(1e-9)
    return state


def on_meta() -> li.AdapterState:
    with torch.device("meta"):
        return li.adapter_state(two_layers())


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "other widths": (lambda: li.combine([ONE, WIDE]), ["h.0.fc", "5", "9"]),
    "another orientation": (
        lambda: li.combine([one(SQUARE), one(SQUARE.by(layout="in_out"))]),
        ["mix.table", "(in, out)"],
    ),
    "no weight at all": (lambda: li.combine([ONE], [0]), ["0"]),
    "an alpha beyond floats": (
        lambda: li.combine([li.combine([ONE], [1e308])], [1e308]), ["h.0.fc", "alpha"],
    ),
    "beyond a dtype": (lambda: li.algebra.as_dtype(huge(), torch.float16), ["h.0.fc", "float16"]),
    "below a dtype": (
        lambda: li.algebra.as_dtype(faint(), torch.float16),
        ["'h.0.fc'", "float16", "torch.bfloat16"],
    ),
    "no floating point": (lambda: li.algebra.as_dtype(ONE, torch.int8), ["int8"]),
    "8 bits": (lambda: li.algebra.as_dtype(ONE, torch.float8_e4m3fn), ["float8", "bfloat16"]),
    "no values": (lambda: li.truncate(on_meta(), rank=1), ["meta"]),
    "neither rank nor energy": (lambda: li.truncate(ONE), ["rank", "energy"]),
    "no rank": (lambda: li.truncate(ONE, rank=0), ["rank"]),
    "more energy than all": (lambda: li.truncate(ONE, energy=1.5), ["energy"]),
    "an empty subset": (lambda: li.algebra.subset(ONE, "5"), ["'5'"]),
    "a name that is not there": (lambda: li.algebra.rename(ONE, {"et": "x"}), ["'et'"]),
    "a sum of DoRA": (lambda: li.combine([DORA, DORA]), ["h.0.fc", "'m'"]),
    "a multiple of DoRA": (lambda: li.combine([DORA], [2]), ["h.0.fc", "'m'"]),
    "a truncation of DoRA": (lambda: li.truncate(DORA, rank=1), ["h.0.fc", "'m'"]),
    "a difference of DoRA": (lambda: li.diff(DORA, DORA), ["h.0.fc", "'m'"]),
    "an update and a copy": (
        lambda: li.combine([ONE, TRAINED]), ["1 of 2", "2 of 2", "h.0.fc.weight"],
    ),
    "no such method": (lambda: li.combine([ONE, ONE], method="mean"), ["mean"]),
    "no adapter": (lambda: li.combine([]), ["adapter"]),
    "too many weights": (lambda: li.combine([ONE], [1, 2]), ["2", "1"]),
    "no density": (lambda: li.combine([ONE, ONE], method="ties"), ["density"]),
    "a density for nothing": (lambda: li.combine([ONE, ONE], density=0.5), ["density"]),
    **{
        f"a density that keeps nothing: {method}": (
            lambda method=method: li.combine([ONE, ONE], method=method, density=1e-9),
            ["'h.0.fc'", "density", "1e-09"],
        )
        for method in ("ties", "magnitude_prune", "dare_linear", "ties_svd", "dare_ties_svd")
    },
    "a rank for nothing": (lambda: li.combine([ONE, ONE], rank=2), ["rank"]),
    "rank 0": (lambda: li.combine([ONE, ONE], method="svd", rank=0), ["rank"]),
    "unequal ranks": (
        lambda: li.combine([ONE, one(LINEAR, rank=3)], method="linear"), ["2 of 2", "3"],
    ),
    "a frozen start": (lambda: li.combine([STARTED], method="linear"), ["h.0.fc"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_right_result_is_refused_by_name(case: str) -> None:
    run, names = REFUSED[case]
    with refused(li.StateError, *names):
        run()


# --------------------------------------------------------------------------------------- equality


@pytest.fixture
def state() -> li.AdapterState:
    return li.adapter_state(two_layers(init="pissa", targets=["0"], train=[r"2\.bias"]))


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()])
def test_a_copy_is_equal_with_read_only_mappings_too(state: Any, copied: Any) -> None:
    state = replace(state, base_copies=MappingProxyType({"w": torch.ones(2)}))
    assert copied(state) == state


def test_equality_looks_at_every_tensor_its_dtype_and_every_number(state: Any) -> None:
    site = state.sites["0"]
    changes: list[Mapping[str, Any]] = [
        {"A": site.A + 1}, {"B0": site.B0 + 1}, {"A0": None, "B0": None}, {"B": site.B.double()},
        {"spec": replace(site.spec, alpha=3.0)},
    ]  # fmt: skip
    for change in changes:
        changed = replace(site, **change)
        assert changed != site
        assert replace(state, sites={"0": changed}) != state
    assert replace(state, trained={"2.bias": torch.ones(4)}) != state
    assert replace(state, fingerprint=None) != state

"""Adapters combined: the methods of PEFT's `add_weighted_adapter`, with PEFT's results."""

from dataclasses import replace

import pytest
import torch
from conftest import fill
from helpers.adapter_states import KIND_SPECS, dense, make_site, make_state
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_inject as li
from lora_inject.algebra.combining import METHODS, kept
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import StateError

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


def density_of(method: str) -> dict[str, float]:
    return {} if method in ("cat", "svd", "linear") else {"density": 0.5}


@pytest.mark.parametrize("method", [*METHODS, "ties by frequency"])
@pytest.mark.filterwarnings("ignore:.*target.*")
def test_every_method_gives_what_peft_gives(theirs, method, monkeypatch):
    model, states = theirs
    theirs_only, ours_only = {}, {}
    if method == "ties by frequency":
        method = "ties"
        theirs_only, ours_only = (
            {"majority_sign_method": "frequency"},
            {"majority_sign": "frequency"},
        )
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
    density = density_of(method)
    due = peft_deltas(model, method, **density, **theirs_only)
    combined = li.combine(states, WEIGHTS, method=method, **density, **ours_only)
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


def test_a_combination_computes_what_the_mix_of_both_does():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    li.inject(net, {"rank": 2, "init": "pissa", "targets": ["0", "2"]}, "one")
    fused = {"match": "0", "slices": {"q": 6, "k": 2}, "adapt": ["q"], "scaling": "rslora"}
    li.inject(net, {"rank": 1, "targets": [fused]}, "two")
    fill(fill(net, "one"), "two")
    x = torch.randn(5, 6)
    due = li.activate(net, {"one": 0.7, "two": -0.4})(x)
    states = [li.adapter_state(net, name) for name in ("one", "two")]
    for method, rank in (("cat", None), ("svd", 8)):
        made = li.combine(states, WEIGHTS, method=method, rank=rank)
        y = li.activate(li.install(net, made, method), method)(x)
        torch.testing.assert_close(y, due, rtol=1e-5, atol=1e-5)


def test_masks_depend_on_seed_site_and_place_and_on_nothing_else():
    a, b = make_state(KIND_SPECS["linear"]), make_state(KIND_SPECS["linear"], KIND_SPECS["conv"])
    options = {"method": "dare_linear", "density": 0.5}
    both = li.combine([b, b], seed=3, **options)
    assert li.combine([a, a], seed=3, **options).sites["h.0.fc"] == both.sites["h.0.fc"]
    assert li.combine([b, b], seed=4, **options) != both
    assert 0.45 < kept((100, 100), 0.5, "x").mean() < 0.55


A = make_state(KIND_SPECS["linear"])
REFUSED = [
    ([A, A], {"method": "mean"}, "no such method"),
    ([], {}, "no adapter"),
    ([A], {"weights": [1, 2]}, "2 weights for 1 adapters"),
    ([A, A], {"weights": [1, 0]}, "the weight of adapter 2 of 2: it is 0"),
    ([A, A], {"method": "ties"}, "density is missing"),
    ([A, A], {"method": "ties", "density": 1.5}, "density is 1.5"),
    ([A, A], {"density": 0.5}, "density is given"),
    ([A, A], {"rank": 2}, "rank is given"),
    ([A, A], {"method": "svd", "rank": 0}, "rank is 0"),
    ([A, make_state(replace(KIND_SPECS["linear"], rank=3))], {"method": "linear"}, "2 of 2 rank 3"),
    ([make_state(KIND_SPECS["linear"], derived=True)], {"method": "linear"}, "frozen start"),
]


@pytest.mark.parametrize(("states", "options", "words"), REFUSED, ids=lambda value: None)
def test_what_cannot_be_combined_is_refused(states, options, words):
    with pytest.raises(StateError, match=words):
        li.combine(states, **options)


@pytest.mark.parametrize("where", ["A of site", "trained tensor"])
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_that_holds_nan_is_named(method, where):
    a, broken = (make_state(KIND_SPECS["linear"], trained={"head": torch.ones(2)}) for _ in "12")
    bad = broken.trained["head"] if where == "trained tensor" else broken.sites["h.0.fc"].A[0]
    bad[0] = torch.nan
    with pytest.raises(StateError, match=rf"adapter 2 of 3, {where} '.*': it holds 1 NaN"):
        li.combine([a, broken, a], [1, -1, 1], method=method, **density_of(method))
    with pytest.raises(StateError, match=rf"diff, adapter 1 of 2, {where}"):
        li.diff(broken, a)


@pytest.mark.parametrize("end", ["weight", "bias"])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_an_update_and_a_trained_copy_of_one_tensor_are_refused(method, end):
    """No model takes such an adapter, so none is made."""
    spec = replace(KIND_SPECS["linear"], lora_bias=True)
    site = SiteState.of(spec, {**make_site(spec).tensors, "b": torch.ones(7)})
    trained = AdapterState(
        {}, {f"{spec.name}.{end}": torch.ones(7, 5) if end == "weight" else site.further["b"]}
    )
    with pytest.raises(StateError, match=rf"1 of 2 updates '.*{end}' and adapter 2 of 2 holds"):
        li.combine([AdapterState({spec.name: site}), trained], method=method)


def test_trained_tensors_of_two_adapters_of_one_file_are_both_mixed():
    one, two = (
        AdapterState({}, {"0.weight": torch.full((2, 2), value)}, source="one path")
        for value in (1.0, 3.0)
    )
    mixed = li.combine([one, two], [0.5, 0.5], method="cat")
    assert (mixed.trained["0.weight"] == 2).all()
    with pytest.raises(StateError, match=r"with weight 1 \+ 1"):
        li.combine([one, two], method="cat")

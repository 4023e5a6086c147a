"""New values in the Parameters of an adapter, of its form or into room that `reserve` has made."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.models import tiny_llama
from helpers.reference import logits
from helpers.refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_inject as li

RULE = {"rank": 2, "alpha": 3}


class Net(nn.Module):
    """Two layers that are called, a head that trains, a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.down(self.up(self.embed(ids)).relu()))
        return out


CONFIG = {**RULE, "targets": ["up", "down"], "train": [r"head\.weight"], "bias": "adapted"}
IDS = torch.tensor([[0, 3, 6]])


def two(config: Any = CONFIG) -> tuple[Net, li.AdapterState]:
    """A model with a slot, and another adapter of the same config as a value apart from it."""
    net = Net()
    other = fill(li.inject(copy.deepcopy(net), config, "other"), "other")
    return fill(li.inject(net, config, "slot"), "slot"), li.adapter_state(other, "other")


def test_files_are_swapped_in_too(tmp_path: Path) -> None:
    net, state = two()
    wanted = li.install(li.eject(copy.deepcopy(net)), state)
    assert not same_bits(net(IDS), wanted(IDS))
    li.swap_adapter(net, li.save_adapter(wanted, tmp_path / "a"), "slot")
    assert same_bits(net(IDS), wanted(IDS))
    assert list(li.adapters(net)) == ["slot"]

    net, state = two({**RULE, "targets": ["up"]})
    path = li.write_adapter(state, tmp_path / "k.safetensors", "kohya", component="unet")
    save_file(load_file(path), path)  # without the names that this package adds: the model tells
    li.swap_adapter(net, path, "slot", base="any")
    assert same_bits(li.adapter_state(net, "slot").sites["up"].A, state.sites["up"].A)


def test_an_optimizer_keeps_hold_and_the_slot_stays_what_it_was() -> None:
    net, state = two()
    state = dataclasses.replace(state, config={"targets": ["x"]})
    kept = state.sites["up"].A.clone()
    optimizer = torch.optim.SGD(li.parameter_groups(net, lr=0.1), momentum=0.9)
    net(IDS).sum().backward()
    optimizer.step()
    li.swap_adapter(net, state, "slot")
    assert li.adapters(net)["slot"].active
    assert li.adapters(net)["slot"].trainable
    assert li.adapter_state(net, "slot").config == {"targets": ["x"]}  # that is saved
    before = {key: p.detach().clone() for key, p in li.adapter_parameters(net).items()}
    optimizer.zero_grad()
    net(IDS).sum().backward()
    optimizer.step()
    after = li.adapter_parameters(net)
    assert all(not same_bits(before[key], after[key].detach()) for key in before)
    assert same_bits(state.sites["up"].A, kept)


# -------------------------------------------------------------------------------------- refusals


def _site(state: li.AdapterState, tensors: Any, name: str = "up", **spec: Any) -> li.AdapterState:
    """A state in which the site `up`, or a copy of it of another name, is of another form."""
    site = state.sites["up"]
    changed = dataclasses.replace(site.spec, name=name, **spec)
    new = dataclasses.replace(site, spec=changed, **tensors)
    return dataclasses.replace(state, sites={**state.sites, name: new})


def _without(state: li.AdapterState, name: str) -> li.AdapterState:
    sites = {key: site for key, site in state.sites.items() if key != name}
    trained = {key: t for key, t in state.trained.items() if key != name}
    return dataclasses.replace(state, sites=sites, trained=trained)


SMALLER = {"A": torch.zeros(1, 6), "B": torch.zeros(6, 1)}
REFUSED: dict[str, tuple[Callable[[li.AdapterState], li.AdapterState], tuple[str, ...]]] = {
    "a site less": (lambda s: _without(s, "down"), ("'down'",)),
    "another site": (lambda s: _site(s, {}, "upp"), ("'upp'", "'up'")),
    "another rank": (lambda s: _site(s, SMALLER, rank=1), ("'up'", "rank", "1", "2", "reserve")),
    "another scale": (lambda s: _site(s, {}, alpha=6.0), ("'up'", "scale", "3", "1.5")),
    "another shape": (lambda s: _site(s, {"A": torch.zeros(2, 5)}), ("(2, 5)", "(2, 6)")),
    "no values": (lambda s: _site(s, {"A": torch.zeros(2, 6, device="meta")}), ("meta",)),
    "a trained tensor less": (lambda s: _without(s, "up.bias"), ("'up.bias'",)),
    "a trained tensor more": (
        lambda s: dataclasses.replace(s, trained={**s.trained, "x.bias": torch.zeros(6)}),
        ("'x.bias'",),
    ),
    "another base": (lambda s: two()[1], ('base="any"',)),
}


@pytest.mark.parametrize("other", REFUSED)
def test_another_form_or_base_is_refused_and_nothing_changes(other: str) -> None:
    net, state = two()
    change, names = REFUSED[other]
    with refused(li.FormatError, *names, model=net):
        li.swap_adapter(net, change(state), "slot")


def test_the_best_values_so_far_are_not_lost_by_swapping_them_in_from_the_model() -> None:
    net, _ = two()
    best = li.adapter_state(net, "slot")  # of the model's own tensors, which train on
    with refused(li.LoraInjectError, "slot", "copy", model=net):
        li.swap_adapter(net, best, "slot")


def test_a_start_from_W_is_not_a_plain_adapter() -> None:
    net, _ = two({**RULE, "targets": ["up"]})
    _, derived = two({**RULE, "targets": ["up"], "init": "pissa"})
    with refused(li.FormatError, "'up'"):
        li.swap_adapter(net, derived, "slot", base="any")


def test_a_square_parameter_turned_round_is_refused() -> None:
    config = {**RULE, "targets": [{"match": "matrix", "layout": "out_in"}]}
    net = nn.ParameterDict({"matrix": torch.randn(6, 6)})
    state = li.adapter_state(li.inject(copy.deepcopy(net), config))
    li.inject(net, {**RULE, "targets": [{"match": "matrix", "layout": "in_out"}]})
    with refused(li.FormatError, "'matrix'"):
        li.swap_adapter(net, state)


CHANGES: dict[str, Callable[[Any], object]] = {
    "without a count of versions": lambda net: net.up._parameters["weight"].data.mul_(2),
    "replaced": lambda net: net.load_state_dict(
        {f"up.{key}": t for key, t in nn.Linear(6, 6).state_dict().items()},
        strict=False,
        assign=True,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changed_since_is_sampled_again(change: str) -> None:
    net, state = two()
    li.swap_adapter(net, state, "slot")
    twin = copy.deepcopy(net)
    CHANGES[change](twin)
    with refused(li.FormatError, "up.weight", 'base="any"'):
        li.swap_adapter(twin, state, "slot")
    li.swap_adapter(twin, state, "slot", base="any")
    li.swap_adapter(net, state, "slot")


def test_unknown_merged_and_valueless_slots_are_refused() -> None:
    net, state = two()
    with refused(li.StateError, "'slot'"):
        li.swap_adapter(net, state, "slit")
    with torch.device("meta"):
        meta = li.inject(Net(), CONFIG, "slot")
    with refused(li.LayerError, "'slot'", "meta"):
        li.swap_adapter(meta, state, "slot", base="any")
    li.merge(net)
    with refused(li.StateError, "'slot'", "unmerge(model)"):
        li.swap_adapter(net, state, "slot")


def test_a_shared_module_is_found_under_any_of_its_names() -> None:
    layer, config = nn.Linear(4, 4), {**RULE, "targets": ["a"]}
    first, model = (nn.ModuleDict(dict.fromkeys(order, layer)) for order in ("ba", "ab"))
    state = li.adapter_state(fill(li.inject(copy.deepcopy(first), config)))
    li.inject(model, config)
    assert state.sites.keys() != li.adapter_state(model).sites.keys()
    li.swap_adapter(model, state)
    (site,) = state.sites.values()
    assert same_bits(li.adapter_parameters(model)["a.lora_A"].detach(), site.A)


def test_sites_of_two_layers_are_refused_where_both_are_one_layer() -> None:
    apart = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    shared = nn.ModuleDict(dict.fromkeys("ab", nn.Linear(4, 4)))
    state = li.adapter_state(li.inject(apart, {**RULE, "targets": ["a", "b"]}))
    li.inject(shared, {**RULE, "targets": ["a"]})
    before = snapshot(shared)
    with refused(li.FormatError, "'b'"):
        li.swap_adapter(shared, state, base="any")
    assert snapshot(shared) == before


# ---------------------------------------- room for other ranks, scales and sites in one graph

SUBSETS = (["all-linear"], ["q_proj"], ["down_proj", "up_proj"], [r"layers\.1\..*_proj"])


def apart(base: Any, number: int, **changes: Any) -> li.AdapterState:
    """An adapter of another rank, scale and set of sites, made on a copy of a base."""
    rank = 2 + 10 * number
    config = {"rank": rank, "alpha": 1 + number, "targets": [*SUBSETS[number % 4]], **changes}
    return li.adapter_state(fill(li.inject(copy.deepcopy(base), config), std=0.1))


def test_adapters_of_ranks_2_to_52_share_one_graph() -> None:
    base = tiny_llama().double().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=64)
    li.activate(model, "slot")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ranks = set()
    with torch.no_grad():
        logits(compiled)
        for number in range(6):
            state = apart(base, number)
            ranks |= {site.spec.rank for site in state.sites.values()}
            li.swap_adapter(model, state, "slot")
            wanted = li.install(copy.deepcopy(base), state)
            assert error(logits(compiled), logits(wanted)) < 1e-12
    assert counter.frame_count == 1
    assert ranks == {2, 12, 22, 32, 42, 52}


def test_an_empty_slot_is_the_base_and_does_not_train() -> None:
    base = tiny_llama().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=4)
    assert torch.equal(logits(model), logits(base))
    assert not any(p.requires_grad for p in li.adapter_parameters(model, "slot").values())
    li.swap_adapter(model, apart(base, 0, rank=4), "slot")
    assert error(logits(model), logits(base)) > 1e-3
    li.swap_adapter(model, apart(base, 1, rank=2), "slot")
    for name, site in li.adapter_state(model, "slot").sites.items():
        rank = 2 if "q_proj" in name else 0  # nothing is left of the one before
        assert not site.A[rank:].any()
        assert not site.B[:, rank:].any()
        assert bool(site.A[:rank].any()) is bool(rank)
    li.swap_adapter(model, li.adapter_state(li.reserve(base, "slot", rank=1), "slot"), "slot")
    li.eject(base)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "pissa", "rank": 2, "targets": ["q_proj"]},
        {"scaling": "rslora", "rank": 3},
        {"rank": 2, "targets": [{"match": "up_proj", "slices": {"a": 8, "b": 16}, "adapt": ["b"]}]},
    ],
    ids=["frozen start", "rslora", "slices"],
)
def test_other_forms_of_adapters_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama().double().eval()
    state = apart(base, 3, **changes)
    model = li.reserve(copy.deepcopy(base), "slot", rank=8)
    li.write_adapter(state, tmp_path / "a", "native")
    li.swap_adapter(model, tmp_path / "a.safetensors", "slot")
    wanted = li.install(copy.deepcopy(base), state)
    assert error(logits(model), logits(wanted)) < 1e-12


def test_what_a_slot_cannot_hold_is_refused_and_nothing_changed() -> None:
    base = tiny_llama().half().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=8, targets=["q_proj", "down_proj"])
    li.swap_adapter(model, apart(base, 1, rank=3), "slot")
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"rank": 9}, ("9", "8")),
        ({"rank": 2, "targets": ["up_proj"]}, ("up_proj",)),
        ({"rank": 2, "train": ["lm_head"]}, ("lm_head",)),
    ]
    for changes, names in cases:
        with refused(li.FormatError, *names, model=model):
            li.swap_adapter(model, apart(base, 1, **changes), "slot")
    with refused(li.FormatError, "torch.float", model=model):
        li.swap_adapter(model, li.combine([apart(base, 1, rank=2)], [1e42]), "slot")
    with refused(li.FormatError, 'base="any"', model=model):
        li.swap_adapter(model, apart(tiny_llama(initializer_range=0.5), 1, rank=2), "slot")


def test_reserving_badly_is_refused() -> None:
    model = tiny_llama()
    with refused(li.MatchError, "nowhere", model=model):
        li.reserve(model, rank=2, targets=["nowhere"])
    with refused(li.LoraInjectError, "q_proj", model=model):
        li.reserve(model, rank=8, targets=[{"match": "q_proj", "rank": 4}])
    li.reserve(model, rank=2)
    with refused(li.StateError, "'slot'", model=model):
        li.reserve(model, rank=2)


def test_a_slot_travels_with_its_model() -> None:
    base = tiny_llama().eval()
    model = copy.deepcopy(li.reserve(copy.deepcopy(base), "slot", rank=8))
    state = apart(base, 1, rank=3)
    li.swap_adapter(model, state, "slot")
    assert error(logits(model), logits(li.install(base, state))) < 1e-5

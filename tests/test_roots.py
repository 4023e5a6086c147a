"""Models that hold several injected modules: names, parts and shared layers."""

import copy
import gc
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import fill, same_bits, snapshot
from torch import Tensor, nn

import lora_inject as li
from lora_inject.integrations import libraries


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Towers(nn.Module):
    """Two towers that are injected one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = layers(), layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Encoded(nn.Module):
    """A head on an encoder that other models have too."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


RULE = {"rank": 2, "alpha": 3, "targets": ["2"]}
X = torch.randn(3, 4)


def two_towers() -> Towers:
    model = Towers()
    fill(li.inject(model.left, RULE, "a"), "a")
    fill(li.inject(model.right, RULE, "a"), "a")
    return model


def test_two_towers_with_one_adapter_name_are_both_seen_from_the_parent(tmp_path: Path) -> None:
    model = two_towers()
    assert list(li.adapters(model)["a"].sites) == ["left.2", "right.2"]
    keys = ["left.2.lora_A", "left.2.lora_B", "right.2.lora_A", "right.2.lora_B"]
    assert list(li.adapter_parameters(model, "a")) == keys
    assert list(li.adapter_state(model.left, "a").sites) == ["2"]
    path = li.save_adapter(model, tmp_path / "both", "a")
    wanted = model(X)
    assert same_bits(li.load_adapter(li.eject(copy.deepcopy(model)), path)(X), wanted)


def test_a_swap_from_the_parent_writes_each_towers_own_values() -> None:
    model = two_towers()
    other = fill(li.inject(copy.deepcopy(li.eject(copy.deepcopy(model))), RULE, "b"), "b")
    li.swap_adapter(model, li.adapter_state(other, "b"), "a")
    assert same_bits(model(X), other(X))
    values = li.adapter_parameters(model, "a")
    assert not torch.equal(values["left.2.lora_B"], values["right.2.lora_B"])


def test_a_part_that_was_injected_has_the_names_of_the_whole(tmp_path: Path) -> None:
    model = Towers()
    fill(li.inject(model.right, RULE, "part"), "part")
    assert list(li.adapter_state(model, "part").sites) == ["right.2"]
    path = li.save_adapter(model, tmp_path / "part", "part")
    plain = li.eject(copy.deepcopy(model))
    assert same_bits(li.load_adapter(plain, path)(X), model(X))


@pytest.mark.parametrize("verb", ["inject", "install"])
def test_a_model_around_or_inside_an_injected_one_is_refused(verb: str) -> None:
    """Two selections could not say what is active, nor two records what eject restores."""
    state = li.adapter_state(li.inject(Towers(), {**RULE, "targets": [r"right\.0"]}))
    of_part = li.adapter_state(li.inject(layers(), RULE))

    def add(model: nn.Module, state: li.AdapterState) -> None:
        if verb == "install":
            li.install(model, state, "c", base="any")
        else:
            li.inject(model, {**RULE, "targets": [*state.sites]}, "c")

    model = Towers()
    li.inject(model.left, RULE, "a")
    before = snapshot(model)
    with pytest.raises(li.StateError, match="a part of the model, 'left', was injected by itself"):
        add(model, state)
    assert snapshot(model) == before
    add(model.right, of_part)
    whole = li.inject(Towers(), {**RULE, "targets": [r"left\.2"]}, "a")
    before = snapshot(whole)
    for part in (whole.left, whole.right):
        with pytest.raises(li.StateError, match="is a part of a model that was injected"):
            add(part, of_part)
    assert snapshot(whole) == before
    li.eject(whole)
    add(whole.left, of_part)


def test_layers_of_two_models_that_were_injected_apart_take_no_adapter_together() -> None:
    one, two = (li.inject(layers(), RULE, name) for name in "ab")
    both = nn.ModuleDict({"one": one[2], "two": two[2]})
    with pytest.raises(li.StateError, match="layers of models that were injected apart"):
        li.inject(both, {**RULE, "targets": ["one"]}, "c")


def test_eject_of_one_model_leaves_another_that_shares_its_encoder() -> None:
    encoder = layers()
    one, two = Encoded(encoder), Encoded(encoder)
    before = snapshot(one), snapshot(two)
    fill(li.inject(one, {**RULE, "targets": [r"encoder\.0"]}, "a"), "a")
    fill(li.inject(two, {**RULE, "targets": ["head", r"encoder\.\d"]}, "b"), "b")
    assert [info.active for info in li.adapters(one).values()] == [False, True], "one selection"
    with_b, state = two(X), li.adapter_state(two, "b")
    with pytest.raises(li.StateError, match=r"shares only some of its layers.*injected model"):
        li.adapter_state(one, "b")
    with pytest.raises(li.StateError, match="shares only some of its layers"):
        li.eject(one, "b")
    li.eject(one)
    assert same_bits(two(X), with_b)
    assert li.adapter_state(two, "b") == state
    assert not any(p.requires_grad for n, p in two.named_parameters() if "lora" not in n)
    li.eject(two)
    assert (snapshot(one), snapshot(two)) == before


def test_a_layer_that_was_replaced_is_named_and_eject_is_the_way_out(tmp_path: Path) -> None:
    model = layers()
    fill(li.inject(model, {**RULE, "targets": [r"\d"]}))
    old, model[2] = model[2], nn.Linear(4, 4)
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.merge(model),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        with pytest.raises(li.StateError, match="site '2' is not in the model any more"):
            verb()
    li.eject(model)
    assert type(model[0]) is type(old) is nn.Linear
    assert list(old.state_dict()) == ["weight", "bias"]


def test_eject_gives_flags_back_to_the_layers_that_had_them() -> None:
    """A layer that moved keeps its flag; what stands in the place of one that is gone gets it."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].requires_grad_(False)
    li.inject(model, {**RULE, "targets": ["a"]})
    model["a"], model["b"] = model["b"], model["a"]
    model["d"] = model.pop("c")
    li.eject(model)
    frozen = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"a"}
    li.inject(model, {**RULE, "targets": ["b"]})
    old, model["d"] = model["d"], nn.Linear(4, 4).requires_grad_(False)
    li.eject(model)
    assert all(p.requires_grad for layer in (old, model["d"]) for p in layer.parameters())


def test_an_inject_freezes_what_was_made_trainable_on_a_part() -> None:
    model = Towers()
    for name in "ab":
        li.inject(model, {**RULE, "targets": [r"left\.\d", r"right\.2"]}, name)
    li.train_only(model.left, "a")
    assert li.adapters(model)["a"].trainable
    li.inject(model, RULE | {"targets": [r"left\.0"]}, "c")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"left.0.lora_A__c", "left.0.lora_B__c"}


def test_a_verb_on_a_part_of_an_adapter_says_so() -> None:
    model = fill(li.inject(Towers(), {**RULE, "targets": ["2"]}))
    for verb in (li.adapter_state, li.eject):
        with pytest.raises(li.StateError, match="shares only some of its layers"):
            verb(model.left)


def test_what_is_active_on_another_tower_does_not_decide_for_this_one() -> None:
    """An adapter that is loaded onto one tower is active there."""
    model = Towers()
    li.inject(model.right, {**RULE, "targets": ["0"]}, "idle")
    fill(li.inject(model.left, RULE, "left"), "left")
    li.activate(model, {"left": 0.5})
    state = li.adapter_state(fill(li.inject(layers(), RULE)))
    left = model.left(X)
    li.install(model.right, state, "right", base="any")
    assert {n: info.weight for n, info in li.adapters(model).items()} == {
        "idle": None,
        "left": 0.5,
        "right": 1.0,
    }
    assert same_bits(model.left(X), left)
    wanted = li.install(li.eject(copy.deepcopy(model)).right, state, base="any")
    assert same_bits(model.right(X), wanted(X))


def test_a_name_that_a_model_has_that_shares_layers_is_refused() -> None:
    """Both would become active by that name, and the other model would compute something else."""
    encoder = layers()
    one, two = Encoded(encoder), Encoded(encoder)
    li.inject(one, {**RULE, "targets": ["head"]}, "a")
    li.inject(one, {**RULE, "targets": [r"encoder\.0"]}, "b")
    state = li.adapter_state(li.inject(Encoded(layers()), {**RULE, "targets": ["head"]}))
    before = snapshot(two)
    with pytest.raises(li.StateError, match="a model that shares layers, has one of that name"):
        li.install(two, state, "a", base="any")
    assert snapshot(two) == before


def test_unreached_asks_each_tower_for_its_own_adapters() -> None:
    model = Towers()
    for tower, active, other in ((model.left, "a", "b"), (model.right, "b", "a")):
        for name in (other, active):
            li.inject(tower, {**RULE, "targets": ["0"]}, name)
    assert li.unreached(model, lambda: model(X)) == []


def test_two_models_that_share_a_layer_have_one_selection_before_it_is_adapted() -> None:
    shared = nn.Sequential(nn.Linear(4, 4))
    one = nn.ModuleDict({"enc": shared, "head": nn.Linear(4, 2)})
    two = nn.ModuleDict({"enc": shared, "head": nn.Linear(4, 2)})
    li.inject(one, {"rank": 1, "targets": ["head"]}, "a")
    li.inject(two, {"rank": 1, "targets": [r"enc\.0"]}, "b")
    nn.init.normal_(shared[0].lora_B__b)
    x = torch.randn(2, 4)
    with torch.no_grad():
        adapted = shared(x)
        li.merge(one, name="b")
        torch.testing.assert_close(shared(x), adapted)
        li.unmerge(one)
    li.inject(one, {"rank": 1, "targets": ["head"]}, "c")
    assert {"a", "c"} <= {*li.adapters(one)}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_part_of_a_copy_of_a_root_is_refused_like_a_part_of_the_root(copied: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    li.inject(model, {"rank": 1, "targets": ["all-linear"]}, "a")
    with pytest.raises(li.StateError, match="a part of a model that was injected"):
        li.inject(copied(model)[0], {"rank": 1, "targets": ["0"]}, "b")


def heads_on(trunk: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(4, 2)})


def test_models_that_share_only_what_neither_adapts_have_a_selection_each() -> None:
    trunk = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    actor, critic = heads_on(trunk), heads_on(trunk)
    li.inject(actor, {"rank": 1, "targets": ["head"]}, "a")
    li.inject(critic, {"rank": 1, "targets": ["head"]}, "b")
    assert li.adapters(actor)["a"].active
    li.activate(critic, None)
    assert li.adapters(actor)["a"].active


def test_a_layer_of_two_models_that_were_injected_apart_is_not_adapted() -> None:
    trunk = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    actor, critic = heads_on(trunk), heads_on(trunk)
    li.inject(actor, {"rank": 1, "targets": ["head"]}, "a")
    li.inject(critic, {"rank": 1, "targets": ["head"]}, "b")
    before = snapshot(critic)
    with pytest.raises(li.StateError, match="also in a model that was injected apart"):
        li.inject(critic, {"rank": 1, "targets": [r"trunk\.0"]}, "c")
    assert snapshot(critic) == before


def test_a_part_of_a_model_that_is_gone_takes_an_adapter_after_eject() -> None:
    model = heads_on(nn.Sequential(nn.Linear(4, 4)))
    li.inject(model, {"rank": 1, "targets": ["all-linear"]}, "a")
    part = model["trunk"]
    del model
    gc.collect()
    with pytest.raises(li.StateError, match="if it is gone, eject this part first"):
        li.inject(part, {"rank": 1, "targets": ["0"]}, "b")
    li.inject(li.eject(part), {"rank": 1, "targets": ["0"]}, "b")
    assert list(li.adapters(part)) == ["b"]


def in_a_cycle(model: nn.Module) -> nn.Module:
    """Nobody else holds it, and yet it stays until the collector runs."""
    model.__dict__["itself"] = model
    return model


def test_a_model_that_only_a_cycle_holds_stands_in_nobodys_way() -> None:
    """The collector runs now and then: a second run of a cell of a notebook was refused, or not."""
    gc.disable()
    try:
        trunk = nn.Sequential(nn.Linear(4, 4))
        whole = in_a_cycle(heads_on(trunk))
        li.inject(whole, {"rank": 1, "targets": ["head"]}, "a")
        del whole
        li.inject(trunk, {"rank": 1, "targets": ["0"]}, "a")
        mine = heads_on(nn.Sequential(nn.Linear(4, 4)))
        li.inject(mine, {"rank": 1, "targets": ["head"]}, "a")
        other = in_a_cycle(heads_on(mine["trunk"]))
        li.inject(other, {"rank": 1, "targets": ["head"]}, "b")
        del other
        li.inject(mine, {"rank": 1, "targets": [r"trunk\.0"]}, "c")
    finally:
        gc.enable()
    assert list(li.adapters(trunk)) == ["a"]
    assert list(li.adapters(mine)) == ["a", "c"]


@pytest.mark.parametrize("verb", ["inject", "load"])
def test_what_becomes_the_only_trainable_one_stops_adapters_of_models_that_share_a_layer(
    verb: str, tmp_path: Path
) -> None:
    """The other adapter stayed trainable, inactive, and a step with weight decay moved it."""
    encoder = layers()
    one, two = Encoded(encoder), Encoded(encoder)
    both = {**RULE, "targets": ["head", r"encoder\.0"]}
    li.inject(one, both, "a")
    one(X).sum().backward()
    if verb == "inject":
        li.inject(two, both, "b")
    else:
        apart = fill(li.inject(Encoded(layers()), both, "b"), "b")
        path = li.save_adapter(apart, tmp_path / "b", "b")
        li.load_adapter(two, path, "b", trainable=True, base="any")
    assert {name: info.trainable for name, info in li.adapters(one).items()} == {
        "a": False,
        "b": True,
    }
    held = li.adapter_parameters(one, "a")
    assert len(held) == 4
    assert not any(p.requires_grad or p.grad is not None for p in held.values())
    assert all(p.requires_grad for p in li.adapter_parameters(two, "b").values())
    li.train_only(one, "a")
    li.activate(one, "a")
    assert all(p.requires_grad for p in held.values())


def test_a_refused_inject_leaves_an_adapter_of_a_model_that_shares_a_layer_training() -> None:
    encoder = layers()
    one, two = Encoded(encoder), Encoded(encoder)
    li.inject(one, {**RULE, "targets": ["head", r"encoder\.0"]}, "a")
    before = snapshot(one)

    def fails() -> None:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        li.inject(two, {**RULE, "targets": [r"encoder\.2"]}, "b", probe=fails)
    assert snapshot(one) == before
    assert li.adapters(one)["a"].trainable


@pytest.mark.parametrize("verb", ["inject", "install"])
def test_what_a_library_does_after_a_load_is_a_part_of_all_or_nothing(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = li.adapter_state(li.inject(layers(), RULE))

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    def add(model: nn.Module) -> None:
        if verb == "install":
            li.install(model, state, "b", base="any")
        else:
            li.inject(model, RULE, "b")

    models = [layers(), fill(li.inject(layers(), RULE, "a"), "a")]
    guard: Any = ModuleType("guard_of_a_library")
    guard.after_load = fails
    monkeypatch.setitem(sys.modules, guard.__name__, guard)
    monkeypatch.setitem(libraries.GUARDS, guard.__name__, ("torch",))
    for model in models:
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="out of memory"):
            add(model)
        assert snapshot(model) == before

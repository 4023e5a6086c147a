"""Models that hold several injected modules: names, parts and shared layers."""

import copy
import gc
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import fill, same_bits, snapshot
from helpers.reference import refused
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
X = torch.linspace(-1, 1, 12).view(3, 4)


def at(*targets: str) -> dict[str, Any]:
    return {**RULE, "targets": list(targets)}


def two_heads() -> tuple[Encoded, Encoded]:
    encoder = layers()
    return Encoded(encoder), Encoded(encoder)


def test_two_towers_with_one_adapter_name_are_both_seen_from_the_parent(tmp_path: Path) -> None:
    model = Towers()
    for tower in (model.left, model.right):
        fill(li.inject(tower, RULE, "a"), "a")
    assert list(li.adapters(model)["a"].sites) == ["left.2", "right.2"]
    keys = ["left.2.lora_A", "left.2.lora_B", "right.2.lora_A", "right.2.lora_B"]
    assert list(li.adapter_parameters(model, "a")) == keys
    assert list(li.adapter_state(model.left, "a").sites) == ["2"]
    plain = li.eject(copy.deepcopy(model))
    path = li.save_adapter(model, tmp_path / "both", "a")
    assert same_bits(li.load_adapter(copy.deepcopy(plain), path)(X), model(X))
    other = fill(li.inject(plain, RULE, "b"), "b")
    li.swap_adapter(model, li.adapter_state(other, "b"), "a")
    assert same_bits(model(X), other(X))


def test_a_model_around_or_inside_an_injected_one_is_refused() -> None:
    """Two selections could not say what is active, nor two records what eject restores."""
    model = Towers()
    li.inject(model.left, RULE, "a")
    words = "a part of the model, 'left', was injected by itself"
    refused(model, lambda: li.inject(model, at(r"right\.0"), "b"), li.StateError, words)
    li.inject(model.right, RULE, "b")
    whole = li.inject(Towers(), at(r"left\.2"), "a")
    words = "is a part of a model that was injected"
    for part in (whole.left, whole.right):
        refused(whole, lambda part=part: li.inject(part, RULE, "b"), li.StateError, words)
    li.inject(li.eject(whole).left, RULE, "b")


def test_a_layer_that_was_replaced_is_named_and_eject_is_the_way_out(tmp_path: Path) -> None:
    model = fill(li.inject(layers(), at(r"\d")))
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
    li.inject(model, at("a"))
    model["a"], model["b"] = model["b"], model["a"]
    model["d"] = model.pop("c")
    li.eject(model)
    frozen = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"a"}
    li.inject(model, at("b"))
    old, model["d"] = model["d"], nn.Linear(4, 4).requires_grad_(False)
    li.eject(model)
    assert all(p.requires_grad for layer in (old, model["d"]) for p in layer.parameters())


def test_eject_of_one_model_leaves_another_that_shares_its_encoder() -> None:
    one, two = two_heads()
    before = snapshot(one), snapshot(two)
    fill(li.inject(one, at(r"encoder\.0"), "a"), "a")
    fill(li.inject(two, at("head", r"encoder\.\d"), "b"), "b")
    assert [info.active for info in li.adapters(one).values()] == [False, True], "one selection"
    with_b, state = two(X), li.adapter_state(two, "b")
    for verb in (li.adapter_state, li.eject):
        with pytest.raises(li.StateError, match=r"shares only some of its layers.*injected model"):
            verb(one, "b")
    li.eject(one)
    assert same_bits(two(X), with_b)
    assert li.adapter_state(two, "b") == state
    assert not any(p.requires_grad for n, p in two.named_parameters() if "lora" not in n)
    li.eject(two)
    assert (snapshot(one), snapshot(two)) == before


def test_a_name_that_a_model_has_that_shares_layers_is_refused() -> None:
    """Both would become active by that name, and the other model would compute something else."""
    one, two = two_heads()
    li.inject(one, at("head"), "a")
    li.inject(one, at(r"encoder\.0"), "b")
    state = li.adapter_state(li.inject(Encoded(layers()), at("head")))
    words = "a model that shares layers, has one of that name"
    refused(two, lambda: li.install(two, state, "a", base="any"), li.StateError, words)


def test_two_models_that_share_a_layer_have_one_selection_before_it_is_adapted() -> None:
    one, two = two_heads()
    li.inject(one, at("head"), "a")
    fill(li.inject(two, at(r"encoder\.0"), "b"), "b")
    adapted = one.encoder(X)
    li.merge(one, name="b")
    torch.testing.assert_close(one.encoder(X), adapted)
    li.unmerge(one)
    li.inject(one, at("head"), "c")
    assert {"a", "c"} <= {*li.adapters(one)}


def test_models_that_share_only_what_neither_adapts_are_apart_and_stay_so() -> None:
    one, two = two_heads()
    li.inject(one, at("head"), "a")
    li.inject(two, at("head"), "b")
    li.activate(two, None)
    assert li.adapters(one)["a"].active
    words = "also in a model that was injected apart"
    refused(two, lambda: li.inject(two, at(r"encoder\.0"), "c"), li.StateError, words)
    both = nn.ModuleDict({"one": one.head, "two": two.head})
    with pytest.raises(li.StateError, match="layers of models that were injected apart"):
        li.inject(both, at("one"), "c")


def test_a_model_that_only_a_cycle_holds_stands_in_nobodys_way() -> None:
    """The collector runs now and then: a second run of a cell of a notebook was refused, or not."""

    def inject_and_go(encoder: nn.Module) -> None:
        model = Encoded(encoder)
        model.__dict__["itself"] = model
        li.inject(model, at("head"), "a")

    encoder, other = layers(), li.inject(Encoded(layers()), at("head"), "a")
    gc.disable()
    try:
        inject_and_go(encoder)
        li.inject(encoder, RULE, "a")
        inject_and_go(other.encoder)
        li.inject(other, at(r"encoder\.0"), "b")
    finally:
        gc.enable()
    assert list(li.adapters(encoder)) == ["a"]


def test_what_becomes_the_only_trainable_one_stops_adapters_of_models_that_share_a_layer() -> None:
    """The other adapter stayed trainable, inactive, and a step with weight decay moved it."""
    one, two = two_heads()
    li.inject(one, at("head", r"encoder\.0"), "a")
    one(X).sum().backward()
    li.inject(two, at("head", r"encoder\.0"), "b")
    assert [info.trainable for info in li.adapters(one).values()] == [False, True]
    held = li.adapter_parameters(one, "a").values()
    assert len(held) == 4
    assert not any(p.requires_grad or p.grad is not None for p in held)
    li.train_only(one, "a")
    assert all(p.requires_grad for p in held)


def test_what_a_library_does_after_a_load_is_a_part_of_all_or_nothing(monkeypatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("out of memory")

    models = [layers(), fill(li.inject(layers(), RULE, "a"), "a")]
    guard: Any = ModuleType("guard_of_a_library")
    guard.after_load = failing
    monkeypatch.setitem(sys.modules, guard.__name__, guard)
    monkeypatch.setitem(libraries.GUARDS, guard.__name__, ("torch",))
    for model in models:
        refused(model, lambda m=model: li.inject(m, RULE, "b"), RuntimeError, "out of memory")

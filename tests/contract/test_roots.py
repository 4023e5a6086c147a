"""Models that hold several injected modules: names, parts and shared layers."""

import copy
import gc
from pathlib import Path
from typing import Any

import torch
from conftest import fill, same_bits
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li


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
    with refused(li.StateError, "'left'", model=model):
        li.inject(model, at("right\\.0"), "b")
    li.inject(model.right, RULE, "b")
    whole = li.inject(Towers(), at(r"left\.2"), "a")
    for part in (whole.left, whole.right):
        with refused(li.StateError, "'b'", model=whole):
            li.inject(part, RULE, "b")
    li.inject(li.eject(whole).left, RULE, "b")


def test_a_layer_that_was_replaced_is_named_and_eject_is_the_way_out(tmp_path: Path) -> None:
    model = fill(li.inject(layers(), at(r"\d")))
    old, model[2] = model[2], nn.Linear(4, 4)
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.merge(model),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        with refused(li.StateError, "'2'"):
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


def test_models_that_share_only_what_neither_adapts_are_apart_and_stay_so() -> None:
    one, two = two_heads()
    li.inject(one, at("head"), "a")
    li.inject(two, at("head"), "b")
    li.activate(two, None)
    assert li.adapters(one)["a"].active
    with refused(li.StateError, "'c'", model=two):
        li.inject(two, at("encoder\\.0"), "c")
    both = nn.ModuleDict({"one": one.head, "two": two.head})
    with refused(li.StateError, "'c'"):
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

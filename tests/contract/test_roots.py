"""The root of an injected model: names, parts, copies and shared layers."""

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


def test_a_module_that_holds_one_root_stands_for_it(tmp_path: Path) -> None:
    """Names are those of the root: what was injected is what is saved and loaded."""
    model = Encoded(layers())
    plain = copy.deepcopy(model)
    fill(li.inject(model.encoder, RULE, "a"), "a")
    assert list(li.adapters(model)["a"].sites) == ["2"]
    path = li.save_adapter(model, tmp_path / "a", "a")
    li.load_adapter(plain.encoder, path)
    assert same_bits(plain(X), model(X))
    li.activate(model, None)
    assert not li.adapters(model.encoder)["a"].active


def test_a_model_around_or_inside_an_injected_one_is_refused() -> None:
    """Two records could not say what is active, nor what eject restores."""
    model = nn.ModuleList([layers(), layers()])
    li.inject(model[0], RULE, "a")
    with refused(li.StateError, "'0'", model=model):
        li.inject(model, at("1\\.0"), "b")
    li.inject(model[1], RULE, "b")
    with refused(li.StateError, "'0', '1'", model=model):
        li.activate(model, None)
    whole = li.inject(nn.ModuleList([layers(), layers()]), at(r"0\.2"), "a")
    for part in whole:
        with refused(li.StateError, "'b'", model=whole):
            li.inject(part, RULE, "b")
    with refused(li.StateError, "given to inject", model=whole):
        li.activate(whole[0], None)
    li.inject(li.eject(whole)[0], RULE, "b")


def test_a_part_whose_root_is_gone_can_be_ejected_and_injected_again() -> None:
    encoder = li.inject(Encoded(layers()), at(r"encoder\.2"), "a").encoder
    gc.collect()
    with refused(li.StateError, "eject", model=encoder):
        li.inject(encoder, RULE, "b")
    li.inject(li.eject(encoder), RULE, "b")
    assert list(li.adapters(encoder)) == ["b"]


def test_a_layer_that_was_replaced_is_named_and_eject_is_the_way_out(tmp_path: Path) -> None:
    model = fill(li.inject(layers(), at(r"\d")))
    old, model[2] = model[2], nn.Linear(4, 4)
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.adapter_state(model),
        lambda: li.merge(model),
        lambda: li.activate(model, "default"),
        lambda: li.disabled(model).__enter__(),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        with refused(li.StateError, "'2'", model=model):
            verb()
    li.eject(model)
    assert type(model[0]) is type(old) is nn.Linear
    assert list(old.state_dict()) == ["weight", "bias"]


def test_eject_gives_flags_back_to_the_layers_that_had_them() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].requires_grad_(False)
    li.inject(model, at("a"))
    model["a"], model["b"] = model["b"], model["a"]
    model["d"] = model.pop("c")
    li.eject(model)
    frozen = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"a"}


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

"""Names: a module under several, the root under none, and those that parts of an adapter have."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.reference import EXACT, Block, adapted, config, dense, hold, random, saved
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import KINDS, injected


class Recurrent(nn.Module):
    """A block under three names, one of them on another path."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])
        self.last = nn.ModuleDict({"again": self.blocks[0]})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last["again"](x)


@pytest.mark.parametrize("targets", [["up"], [r"blocks\.2\.up"], [r"again\.up", "down"]], ids=str)
def test_a_block_under_three_names_is_adapted_once(targets: list[str], tmp_path: Path) -> None:
    plain, x = Recurrent().double(), random(3, 4)
    model = adapted(plain, *targets)
    sites = li.adapters(model)["default"].sites
    assert sites["blocks.0.up"].aliases == ("blocks.2.up", "last.again.up")
    assert all(name.startswith(("blocks.0", "blocks.1")) for name in sites)
    hold(plain, model, lambda m: m(x))
    assert li.unreached(model, lambda: model(x)) == []
    for layout in ("native", "peft"):
        path, _ = saved(model, tmp_path, layout)
        again = li.load_adapter(copy.deepcopy(plain), path)
        assert error(again(x), model(x)) < EXACT
    before = snapshot(plain)
    li.eject(fill(li.inject(plain, config(*targets))))
    assert snapshot(plain) == before


def test_the_root_is_a_site(tmp_path: Path) -> None:
    plain, x = nn.Linear(5, 4).double(), random(3, 5)
    model = adapted(plain, "^$")
    hold(plain, model, lambda m: m(x))
    with refused(li.FormatError, 'format="native"'):
        saved(model, tmp_path, "peft")
    path, _ = saved(model, tmp_path, "native")
    assert error(li.load_adapter(copy.deepcopy(plain), path)(x), model(x)) < EXACT
    attention = nn.MultiheadAttention(8, 2)
    with refused(li.MatchError, "'in_proj_weight'", "'out_proj'", model=attention):
        li.inject(attention, config("^$"))


PARTS = ["lora_A", "lora_B__default", "weight", "base_layer", "base_model", "lora_in"]


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_base_modules_named_like_parts_of_an_adapter(layout: str, tmp_path: Path) -> None:
    names = [f"0.model.{part}" for part in [*PARTS, "parametrize"]]

    def run(m: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
        for name in names:
            x = torch.tanh(m.get_submodule(name)(x))
        return x

    layers = {name.rpartition(".")[2]: nn.Linear(4, 4) for name in names}
    plain = nn.Sequential(nn.ModuleDict({"model": nn.ModuleDict(layers)})).double()
    targets = [rf"^0\.model\.{part}" for part in PARTS]
    model = adapted(plain, *targets)
    assert set(li.adapters(model)["default"].sites) == {*names[:-1]}
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {f"{name}.lora_{side}__default" for name in names[:-1] for side in "AB"}
    hold(plain, model, run)
    path, _ = saved(model, tmp_path, layout)
    assert error(run(li.load_adapter(copy.deepcopy(plain), path)), run(model)) < EXACT


ADAPTERS = [
    "mlp",
    "lora_A",
    "weight",
    "default.1",
    "a%2E1",
    "a:b",
    "forward",
    "_parameters",
    "ünï c",
]
ADAPTERS += ["x" * 100, "None", "__class__"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_named_like_modules_and_parameters(name: str, tmp_path: Path) -> None:
    parts = ["lora_in", "mlp", "lora_A"]
    plain = nn.Sequential(*[nn.ModuleDict({part: nn.Linear(5, 5)}) for part in parts]).double()

    def run(m: Any) -> Tensor:
        return m[2]["lora_A"](m[1]["mlp"](m[0]["lora_in"](x)))

    model, x = copy.deepcopy(plain), random(2, 5)
    before = snapshot(model)
    for each in ("other", name):
        fill(li.inject(model, config(*parts, bias="all"), each), each)
    trained = li.adapter_state(model, name).trained
    wide = dense(plain, model, name)
    wide.load_state_dict({**wide.state_dict(), **trained})
    assert error(run(model), run(wide)) < EXACT
    assert set(li.adapters(model)) == {"other", name}
    wanted = run(model)
    li.save_adapter(model, tmp_path / "a", name)
    li.eject(model)
    assert snapshot(model) == before
    li.load_adapter(model, tmp_path / "a", name)
    assert same_bits(run(model), wanted)


@pytest.mark.parametrize("name", ["", None, 3, "default"])
def test_names_that_cannot_be_are_refused_at_once(name: Any) -> None:
    model = injected(KINDS["linear"])
    with refused(li.StateError, repr(name), model=model):
        li.inject(model, config("layer"), name)
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].lora_A__default = 3
    with refused(li.LayerError, "'lora_A__default'", model=net):
        li.inject(net, config("0"))

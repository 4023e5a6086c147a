"""The root as a site, and base modules with the names of parts of an adapter."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import error, fill, snapshot
from helpers.reference import EXACT, Block, adapted, config, hold, random, refused, saved
from torch import Tensor, nn

import lora_inject as li


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


@pytest.mark.parametrize(
    "targets", [["up"], [r"blocks\.2\.up"], [r"again\.up"], [r"again\.up", "down"]], ids=str
)
def test_a_block_under_three_names_is_adapted_once(targets: list[str], tmp_path: Path) -> None:
    plain, x = Recurrent().double(), random(3, 4)
    before = snapshot(plain)
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
    li.eject(fill(li.inject(plain, config(*targets))))
    assert snapshot(plain) == before


def test_the_root_is_a_site(tmp_path: Path) -> None:
    plain, x = nn.Linear(5, 4).double(), random(3, 5)
    before = snapshot(plain)
    model = adapted(plain, "^$")
    hold(plain, model, lambda m: m(x))
    for layout in ("native", "peft"):
        if layout == "peft":
            with pytest.raises(li.FormatError, match="native"):
                saved(model, tmp_path, layout)
            continue
        path, _ = saved(model, tmp_path, layout)
        assert error(li.load_adapter(copy.deepcopy(plain), path)(x), model(x)) < EXACT
    li.eject(fill(li.inject(plain, config("^$"))))
    assert snapshot(plain) == before


def test_a_container_as_the_root_is_refused_and_its_contents_named() -> None:
    model = nn.MultiheadAttention(8, 2)
    run = lambda: li.inject(model, config("^$"))  # noqa: E731
    refused(model, run, li.MatchError, "'in_proj_weight', 'out_proj'")


NAMES = [
    "lora_A",
    "lora_B__default",
    "weight",
    "base_layer",
    "base_model",
    "lora_in",
    "parametrize",
]


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_base_modules_named_like_parts_of_an_adapter(layout: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 4) for name in NAMES}
        return nn.Sequential(nn.ModuleDict({"model": nn.ModuleDict(layers)})).double()

    def run(m: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
        for name in NAMES:
            x = torch.tanh(m.get_submodule(f"0.model.{name}")(x))
        return x

    plain = build()
    before = snapshot(plain)
    named = [rf"^0\.model\.{name}" for name in NAMES[:-1]]
    model = adapted(plain, *named)
    assert set(li.adapters(model)["default"].sites) == {f"0.model.{n}" for n in NAMES[:-1]}
    flags = {n for n, p in model.named_parameters() if p.requires_grad}
    assert flags == {f"0.model.{n}.lora_{side}__default" for n in NAMES[:-1] for side in "AB"}, (
        "the base's own tensors are frozen, whatever they are called"
    )
    hold(plain, model, run)
    path, _ = saved(model, tmp_path, layout)
    again = li.load_adapter(build(), path)
    assert error(run(again), run(model)) < EXACT
    li.eject(fill(li.inject(plain, config(*named))))
    assert snapshot(plain) == before

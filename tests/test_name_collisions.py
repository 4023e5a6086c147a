"""Adapters with the names of modules or parameters work, or are refused at once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPHA, KINDS, RANK, TOLERANCE, error, fill, injected, same_bits, snapshot
from helpers.reference import with_deltas
from torch import Tensor, nn

import lora_inject as li

CONFIG = {"rank": RANK, "alpha": ALPHA}


NAMES = [
    "mlp", "lora_A", "lora_B", "weight", "bias", "default.1", "a%2E1", "%", "a:b", "A", "forward",
    "training", "_parameters", "layer", "with space", "ünïcode", "x" * 100, "base", "None",
    "__class__",
]  # fmt: skip


def test_a_layer_that_has_an_attribute_of_that_name_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].lora_A__default = 3
    before = snapshot(net)
    with pytest.raises(li.LayerError, match=r"has an attribute 'lora_A__default'\. Choose"):
        li.inject(net, {"rank": 1, "targets": ["0"]})
    assert snapshot(net) == before


@pytest.mark.parametrize("name", NAMES)
def test_name_collisions(name: str, tmp_path: Path) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_in = nn.Linear(5, 5)
            self.mlp = nn.Linear(5, 5)
            self.lora_A = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora_A(self.mlp(self.lora_in(x)))

    model = Mlp()
    plain, before = copy.deepcopy(model), snapshot(model)
    config = {**CONFIG, "targets": ["mlp", "lora_in", "lora_A"], "bias": "all"}
    li.inject(model, config, "other")
    li.inject(model, config, name)
    fill(fill(model, name), "other")
    x = torch.randn(2, 5)
    wide = with_deltas(plain, model, name)
    wide.load_state_dict(
        {k: v.double() for k, v in li.adapter_state(model, name).trained.items()}, strict=False
    )
    assert error(model(x), wide(x.double())) < TOLERANCE[torch.float32]
    assert set(li.adapters(model)) == {"other", name}
    assert len(model.state_dict()) == len(plain.state_dict()) + 2 * (6 + 3) + 3
    wanted = model(x)
    li.save_adapter(model, tmp_path / "a", name)
    li.eject(model)
    assert snapshot(model) == before
    li.load_adapter(model, tmp_path / "a", name)
    assert same_bits(model(x), wanted)


@pytest.mark.parametrize("name", ["", None, 3, "default"])
def test_name_collisions_are_refused_at_once(name: Any) -> None:
    model = injected(KINDS["linear"])
    before = snapshot(model)
    with pytest.raises(li.StateError, match="adapter"):
        li.inject(model, {**CONFIG, "targets": ["layer"]}, name)
    assert snapshot(model) == before

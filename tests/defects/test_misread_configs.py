"""Configs that were taken for something else than they say."""

import pytest
import torch
from helpers.refusals import refused
from torch import nn

import lora_inject as li


class Decoder(nn.Module):
    """Six layers, of which only each second has a `mixer`, and two of another list."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            {"q": nn.Linear(4, 4)} | ({"mixer": nn.Linear(4, 4)} if n % 2 else {}) for n in range(6)
        ]
        self.layers = nn.ModuleList(nn.ModuleDict(each) for each in layers)
        self.vision = nn.ModuleList(nn.ModuleDict({"key": nn.Linear(4, 4)}) for _ in range(9))


@pytest.mark.parametrize(("match", "layers", "wanted"), [
    ("mixer", "0-5", [1, 3, 5]), ("q", [0, "4-5"], [0, 4, 5]), ("q|key", "5-8", [5, 5, 6, 7, 8]),
])  # fmt: skip
def test_what_a_rule_matches_need_not_be_in_each_of_its_layers(match, layers, wanted):
    sites = li.plan(Decoder(), {"targets": [{"match": match, "layers": layers}]}).sites
    assert sorted(int(site.name.split(".")[1]) for site in sites) == wanted


@pytest.mark.parametrize("field", ["alpha", "init"])
def test_a_number_that_float32_cannot_hold_is_refused_where_it_stands(field):
    value = {"normal": 1e308} if field == "init" else 1e308
    with refused(li.ConfigError, field):
        li.Config.from_dict({"targets": ["q"], field: value})
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"alpha": 1e38, "rank": 1, "targets": ["0"]})
    assert torch.isfinite(model(torch.zeros(1, 4))).all()

"""A probe and `unreached` find sites that take no part, and leave no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    fill,
    same_bits,
    snapshot,
)
from helpers.reference import (
    config,
    refused,
)
from torch import Tensor, nn

import lora_inject as li


class WeightUpdate(nn.Module):
    """Calls one layer, reads another, and never touches a third."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.drop(F.linear(self.called(x), self.read.weight))
        return found


@pytest.mark.parametrize("targets", [["idle"], ["called", "read", "idle"]], ids=str)
def test_a_probe_refuses_inert_sites_and_leaves_no_trace(targets: list[str]) -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    model.drop.eval()
    bad = config(*targets)
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"'idle'.*reached"):
        li.inject(model, bad, probe=lambda: model(x))
    assert snapshot(model) == before
    assert model.training
    assert not model.drop.training


def test_a_probe_lets_sites_that_take_part_through() -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    li.inject(model, config("called", "read"), probe=lambda: model(x))
    assert li.unreached(model, lambda: model(x)) == []
    assert model.training
    assert li.adapters(model)["default"].active


def test_a_probe_that_raises_leaves_no_trace() -> None:
    model = WeightUpdate()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        li.inject(model, config("called"), probe=lambda: 1 / 0)
    assert snapshot(model) == before


def test_a_second_adapter_is_probed_for_its_own_sites() -> None:
    model, x = WeightUpdate(), torch.randn(2, 4)
    fill(li.inject(model, config("called")))
    wanted = model.eval()(x)
    run = lambda: li.inject(model, config("idle"), "b", probe=lambda: model(x))  # noqa: E731
    refused(model, run, li.LayerError, "'idle'")
    assert same_bits(model(x), wanted)
    li.inject(model, config("read"), "b", probe=lambda: model(x))
    assert li.adapters(model)["b"].active


def test_unreached_sees_branches_and_restores() -> None:
    model = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("used", "idle")})
    li.inject(model, {"rank": 1, "targets": ["used", "idle"]})
    x = torch.randn(2, 3)
    assert li.unreached(model, lambda: model["used"](x)) == ["idle"]
    with li.routed(model, ["default", None]):
        assert li.unreached(model, lambda: model["idle"](x)) == ["used"]
    compiled = torch.compile(model["used"], backend="eager")
    compiled(x)
    assert li.unreached(model, lambda: compiled(x)) == ["idle"]
    with pytest.raises(ZeroDivisionError):
        li.unreached(model, lambda: 1 / 0)
    assert li.unreached(model, lambda: None) == ["used", "idle"]
    li.activate(model, None)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.unreached(model, lambda: model["used"](x))


def test_a_convolution_under_routed_took_part() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1))
    li.inject(model, {"rank": 1, "targets": ["0"]})
    with li.routed(model, ["default", None]):
        assert li.unreached(model, lambda: model(torch.ones(2, 3, 4))) == []

"""A probe, `unreached` and saving after training find sites that take no part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, snapshot
from helpers.reference import config
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li


class WeightUpdate(nn.Module):
    """Calls one layer, reads another, and never touches a third."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.idle = (nn.Linear(4, 4) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(self.called(x), self.read.weight))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [["idle"], ["called", "read", "idle"]], ids=str)
def test_a_probe_refuses_inert_sites_and_leaves_no_trace(targets: list[str]) -> None:
    model = WeightUpdate()
    model.drop.eval()
    with refused(li.LayerError, "'idle'", model=model):
        li.inject(model, config(*targets), probe=lambda: model(X))
    assert [module.training for module in (model, model.drop)] == [True, False]
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        li.inject(model, config("called"), probe=lambda: 1 / 0)
    assert snapshot(model) == before
    li.inject(model, config("called", "read"), probe=lambda: model(X))
    assert li.unreached(model, lambda: model(X)) == []


def test_a_second_adapter_is_probed_for_its_own_sites() -> None:
    model = WeightUpdate()
    fill(li.inject(model, config("called")))
    with refused(li.LayerError, "'idle'", model=model):
        li.inject(model, config("idle"), "b", probe=lambda: model(X))
    li.inject(model, config("read"), "b", probe=lambda: model(X))
    assert li.adapters(model)["b"].active


def test_unreached_sees_branches_and_restores() -> None:
    model = nn.ModuleDict(
        {n: nn.Linear(4, 4) for n in ("used", "idle")} | {"c": nn.Conv1d(4, 4, 1)}
    )
    li.inject(model, config("used", "idle", "c"))
    conv = torch.ones(2, 4, 4)
    assert li.unreached(model, lambda: (model["used"](X), model["c"](conv))) == ["idle"]
    with li.routed(model, ["default", None]):
        assert li.unreached(model, lambda: (model["idle"](X), model["c"](conv))) == ["used"]
    compiled = torch.compile(model["used"], backend="eager")
    compiled(X)
    assert li.unreached(model, lambda: compiled(X)) == ["idle", "c"]
    with pytest.raises(ZeroDivisionError):
        li.unreached(model, lambda: 1 / 0)
    assert li.unreached(model, lambda: None) == ["used", "idle", "c"]
    li.activate(model, None)
    with refused(li.StateError, "unreached", "activate(model, name)"):
        li.unreached(model, lambda: model["used"](X))


class Routed(nn.Module):
    """Experts, of which a batch uses one, a layer that is dropped, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.tasks = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("code", "text")})
        self.spare, self.table = nn.Linear(4, 4), nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tasks["text"](self.layers[1](self.experts[2](self.first(x))))


class Cut(Routed):
    """The output of one layer is detached."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.spare(x).detach()


EXPERTS = (r"experts\.\d", r"layers\.\d\.0", r"tasks\..*")


def trained(model: nn.Module, *targets: str, compiled: bool = False, **options: Any) -> nn.Module:
    li.inject(model, config(*targets, **options))
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), 0.1)
    run = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        optimizer.zero_grad()  # what a compiled step leaves behind are its gradients
        run(X).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("make", [Routed, Cut], ids=["never used", "detached"])
def test_a_trained_adapter_with_a_site_that_nothing_reached_is_not_saved(
    make: Any, init: str, compiled: bool, tmp_path: Path
) -> None:
    model = trained(make(), "first", "spare", *EXPERTS, compiled=compiled, init=init)
    with refused(li.StateError, "'spare'", "(1 such site"):
        li.save_adapter(model, tmp_path / "a")
    assert not any(tmp_path.iterdir())
    li.save_adapter(model, tmp_path / "a", unused=["spare"])
    sites = li.read_adapter(tmp_path / "a").sites
    assert sites.keys() == li.adapters(model)["default"].sites.keys()


@pytest.mark.parametrize("options", [{"train": ["spare"]}, {"tokens": {"table": [1]}}], ids=str)
def test_a_trained_copy_that_nothing_read_is_not_saved(options: Any, tmp_path: Path) -> None:
    with refused(li.StateError, "unused=["):
        li.save_adapter(trained(Routed(), "first", **options), tmp_path / "a")


@pytest.mark.parametrize("compiled", [False, True])
def test_members_of_a_list_may_be_unused(compiled: bool, tmp_path: Path) -> None:
    model = trained(Routed(), "first", *EXPERTS, compiled=compiled)
    idle = ("experts.0", "experts.1", "layers.0.0", "tasks.code")
    assert compiled or li.adapters(model)["default"].idle == idle
    li.save_adapter(model, tmp_path / "a")


def test_what_does_not_train_may_be_unused(tmp_path: Path) -> None:
    fresh, filled = (li.inject(Routed(), config("first", "spare")) for _ in range(2))
    loaded = li.install(Routed(), li.adapter_state(fill(filled)), base="any")
    loaded(X)
    other_trains = li.inject(trained(Routed(), "first", "spare"), config("first"), "other")
    frozen: Any = trained(Routed(), "first", "spare")
    frozen.spare.requires_grad_(False)
    for n, model in enumerate((fresh, loaded, other_trains, frozen)):
        li.save_adapter(model, tmp_path / str(n))


def steps(model: nn.Module, *runs: Callable[[Tensor], Tensor]) -> None:
    """Train as Trainer does, with a forward for each step."""
    callback = li.AdapterCheckpoint()
    for run in runs:
        model.zero_grad()
        run(X).sum().backward()
        callback.on_pre_optimizer_step(None, None, None, model)


def test_a_first_step_asks_for_all_but_lists_of_layers() -> None:
    model: Any = li.inject(Routed(), config("first", *EXPERTS))
    steps(model, model.first, model)
    model = li.inject(Cut(), config("first", "spare"))
    with refused(li.StateError, "'spare'", "(1"):
        steps(model, model)

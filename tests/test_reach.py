"""A probe, `unreached` and saving after training find sites that take no part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, same_bits, snapshot
from helpers.reference import config, refused
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
        return self.drop(F.linear(self.called(x), self.read.weight))


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


# ------------------------------------------------------- what training has left unused, when saved


class Routed(nn.Module):
    """Experts, of which a batch uses one, a layer that is dropped, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.tasks = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("code", "text")})
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tasks["text"](self.layers[1](self.experts[2](self.first(x))))


def trained(model: nn.Module, *targets: str, compiled: bool = False, **options: Any) -> nn.Module:
    li.inject(model, config(*targets, **options))
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), 0.1)
    run = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        optimizer.zero_grad()  # what a compiled step leaves behind are its gradients
        run(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return model


EXPERTS = (r"experts\.\d", r"layers\.\d\.0", r"tasks\..*")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_trained_adapter_with_a_site_that_nothing_reached_is_not_saved(
    compiled: bool, init: str, tmp_path: Path
) -> None:
    targets = ("first", "spare", *EXPERTS)
    model = trained(Routed(), *targets, compiled=compiled, init=init)
    with pytest.raises(li.StateError, match=r"save adapter.*reached 'spare' \(1 such site\)"):
        li.save_adapter(model, tmp_path / "a")
    assert not any(tmp_path.iterdir())
    li.save_adapter(model, tmp_path / "a", unused=["spare"])
    sites = li.read_adapter(tmp_path / "a").sites
    assert sites.keys() == li.adapters(model)["default"].sites.keys()


@pytest.mark.parametrize("compiled", [False, True])
def test_members_of_a_list_may_be_unused(compiled: bool, tmp_path: Path) -> None:
    model = trained(Routed(), "first", *EXPERTS, compiled=compiled)
    if not compiled:
        assert li.adapters(model)["default"].idle == (
            "experts.0", "experts.1", "layers.0.0", "tasks.code",
        )  # fmt: skip
    li.save_adapter(model, tmp_path / "a")


def test_a_trained_copy_that_nothing_read_is_not_saved(tmp_path: Path) -> None:
    for train, options in ((["spare"], {}), ([], {"tokens": {"other": [1]}})):
        model = Routed()
        model.other = nn.Embedding(3, 4)
        trained(model, "first", train=train, **options)
        with pytest.raises(li.StateError, match=r"reached '(spare|other)\.weight'"):
            li.save_adapter(model, tmp_path / "a")


BEFORE: dict[str, Callable[[nn.Module], Any]] = {
    "not trained": lambda m: li.inject(m, config("first", "spare")),
    "not trained, but run": lambda m: li.inject(m, config("first", "spare"))(torch.ones(1, 4)),
    "loaded": lambda m: li.install(m, filled(), base="any")(torch.ones(1, 4)),
    "set by hand": lambda m: nn.init.ones_(
        li.adapter_parameters(li.inject(m, config("first", "spare")))["first.lora_B"]
    ),
    "from a state dict": lambda m: li.inject(m, config("first", "spare")).load_state_dict(
        trained(Routed(), "first", "spare").state_dict()
    ),
    "another is trained": lambda m: (
        trained(m, "first", "spare"),
        li.inject(m, config("first"), "other"),
    ),
    "frozen there": lambda m: (trained(m, "first", "spare"), m.spare.requires_grad_(False)),
}


def filled() -> li.AdapterState:
    other = li.inject(Routed(), config("first", "spare"))
    nn.init.ones_(li.adapter_parameters(other)["first.lora_B"])
    return li.adapter_state(other)


@pytest.mark.parametrize("how", BEFORE)
def test_what_does_not_train_may_be_unused(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Routed()
    BEFORE[how](model)
    li.save_adapter(model, tmp_path / "a")


class Cut(Routed):
    """The output of one layer is detached."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.spare(x).detach()


def test_a_site_whose_output_is_detached_is_not_saved(tmp_path: Path) -> None:
    model = trained(Cut(), "first", "spare", *EXPERTS)
    with pytest.raises(li.StateError, match=r"forwards used 'spare' \(1 .*\), and no gradient"):
        li.save_adapter(model, tmp_path / "a")
    li.save_adapter(model, tmp_path / "a", unused=["spare"])
    model.zero_grad()  # nothing tells any more
    li.save_adapter(model, tmp_path / "b")


def steps(model: nn.Module, *runs: Callable[[Tensor], Tensor]) -> None:
    """Train as Trainer does, with a forward for each step."""
    callback = li.AdapterCheckpoint()
    for run in runs:
        model.zero_grad()
        run(torch.randn(2, 4)).sum().backward()
        callback.on_pre_optimizer_step(None, None, None, model)


def test_a_list_of_layers_has_ten_steps_to_be_reached() -> None:
    model: Any = li.inject(Routed(), config("first", *EXPERTS))
    steps(model, model.first, model.first, model, *[model.first] * 9)
    model = li.inject(Routed(), config("first", r"layers\.\d\.0"))
    with pytest.raises(li.StateError, match=r"train adapter.* reached 'layers\.0\.0', 'layers"):
        steps(model, *[model.first] * 10)
    model = li.inject(Cut(), config("first", "spare"))
    with pytest.raises(li.StateError, match=r"train adapter.* used 'spare' \(1 .* no gradient"):
        steps(model, model)

"""Two processes of which each has other layers of a model: one adapter, as on the whole model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import error
from helpers.forks import Forks
from helpers.refusals import said
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

WORLD = 2
RULES: dict[str, Any] = {
    "rank": 2,
    "alpha": 3.0,
    "targets": [r"layers\.[01]", {"match": "out", "rank": 3}],
    "train": [r"norm"],
    "expect": {"sites": 3, "trainable": 3 * 2 * 8 - 2 * 8 + 3 * 11 + 8},
}
FIRST_ONLY = {"rank": 2, "targets": [r"layers\.0"], "expect": {"sites": 1}}
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(2)})
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return self.out(self.norm(x)) if hasattr(self, "out") else x


def whole() -> Net:
    torch.manual_seed(0)
    return Net().double()


def stage(rank: int) -> Net:
    """The first layer, or the rest."""
    model = whole()
    if rank == 0:
        del model.layers["1"], model.norm, model.out
    else:
        del model.layers["0"]
    return model


def filled(model: nn.Module) -> nn.Module:
    """Noise by the name of each tensor, the same in any part of the model."""
    with torch.no_grad():
        for key, parameter in li.adapter_parameters(model).items():
            generator = torch.Generator().manual_seed(sum(map(ord, key)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise)
    return model


def forward_and_backward(model: Net, rank: int) -> None:
    """One step of a pipeline by hand."""
    if rank == 0:
        y = model(X)
        dist.send(y.detach(), 1)
        dist.recv(gradient := torch.empty_like(y), 1)
        y.backward(gradient)
    else:
        dist.recv(x := torch.empty_like(X), 0)
        model(x.requires_grad_()).square().sum().backward()
        dist.send(x.grad, 0)


def steps(model: nn.Module, run: Callable[[], object]) -> None:
    optimizer = torch.optim.AdamW(li.adapter_parameters(model).values(), lr=0.1)
    for _ in range(3):
        run()
        optimizer.step()
        optimizer.zero_grad()


def trained(folder: Path, rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    model = li.inject(stage(rank), RULES, group=group)
    filled(model)
    steps(model, lambda: forward_and_backward(model, rank))
    li.save_adapter(model, folder / "whole", group=group)
    apart = li.save_adapter(model, folder / f"stage {rank}")
    again = li.load_adapter(stage(rank), folder / "whole", group=group, trainable=True)
    from_parts = li.load_adapter(stage(rank), apart)
    state = li.read_adapter(folder / "whole")
    installed = li.install(stage(rank), state, group=group)
    plan = li.plan(stage(rank), RULES, group=group)
    return {
        "planned": [[site.name for site in plan.sites], [each.name for each in plan.trained]],
        "installed": copy.deepcopy(li.adapter_state(installed)),
        "end": copy.deepcopy(li.adapter_state(model)),
        "again": copy.deepcopy(li.adapter_state(again)),
        "from parts": copy.deepcopy(li.adapter_state(from_parts)),
        "sites": list(li.adapter_state(model).sites),
    }


def idle(folder: Path, rank: int) -> dict[str, Any]:
    """The second process gets nothing."""
    group = dist.group.WORLD
    model = li.inject(stage(rank), FIRST_ONLY, group=group)
    filled(model)
    seen: dict[str, Any] = {"n": len(li.adapter_parameters(model)), "names": [*li.adapters(model)]}
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    x = X[:, :4]
    with_it = model(x)
    with li.disabled(model):
        seen["acts"] = not torch.equal(model(x), with_it)
    li.save_adapter(model, folder / "idle", group=group)
    li.eject(model)
    seen["ejected"] = torch.equal(model(x), stage(rank)(x))
    li.load_adapter(model, folder / "idle", group=group)
    seen["loaded"] = torch.equal(model(x), with_it)
    return seen


def refused(folder: Path, rank: int) -> dict[str, str]:
    group = dist.group.WORLD
    torch.manual_seed(0)  # both write the same file
    model = stage(rank)
    before = {name: type(module) for name, module in model.named_modules()}

    def inject(config: Any, on: nn.Module = model, **how: Any) -> str:
        saying = said(lambda: li.inject(on, config, group=group, **how))
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not li.adapters(model)
        return saying

    def probe() -> None:
        if rank == 0:
            model(X)

    taken = li.inject(stage(rank), FIRST_ONLY | {"targets": [r"layers\.\d"]}) if rank else model
    saved = li.save_adapter(li.inject(whole(), {"rank": 2, "targets": ["out"]}), folder / "out")
    narrow = stage(rank)
    if rank:
        narrow.out = nn.Identity()
    return {
        "nothing": inject(RULES | {"targets": ["layer_0"]}),
        "expect": inject(RULES | {"expect": {"sites": 4}}),
        "config": inject(RULES | {"rank": 0}),
        "taken": inject(FIRST_ONLY, taken) if rank else inject(FIRST_ONLY),
        "unreached": inject(RULES, probe=probe),
        "each has all": inject(RULES, whole()),
        "plan": said(lambda: li.plan(model, RULES | {"expect": {"sites": 4}}, group=group)),
        "plan alone": said(lambda: li.plan(model, RULES)),
        "install nowhere": said(
            lambda: li.install(narrow, li.read_adapter(saved), group=group),
        ),
        "install alone": said(lambda: li.install(narrow, li.read_adapter(saved))),
        "nowhere": said(lambda: li.load_adapter(narrow, saved, group=group)),
        "no group": said(lambda: li.inject(model, RULES, group="pp")),
    }


def work(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        return {
            "trained": trained(folder, rank),
            "idle": idle(folder, rank),
            "refused": refused(folder, rank),
        }
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    return [rank.result() for rank in forks.start_ranks(WORLD, work, folder)]


def test_an_adapter_of_stages_trains_as_that_of_the_whole_model(ranks: Any) -> None:
    model = filled(li.inject(whole(), RULES))
    steps(model, lambda: model(X).square().sum().backward())
    wanted = li.adapter_state(model)
    parts = [rank["trained"]["end"] for rank in ranks]
    assert [rank["trained"]["sites"] for rank in ranks] == [["layers.0"], ["layers.1", "out"]]
    sites = {name: site for part in parts for name, site in part.sites.items()}
    assert sites.keys() == wanted.sites.keys()
    for name, site in wanted.sites.items():
        assert error(sites[name].A, site.A) < 1e-12
        assert error(sites[name].B, site.B) < 1e-12
    for name, tensor in wanted.trained.items():
        assert error(parts[1].trained[name], tensor) < 1e-12


def test_what_stages_save_together_is_one_adapter(ranks: Any, folder: Path) -> None:
    saved = li.adapter_state(li.load_adapter(whole(), folder / "whole"))
    for rank in ranks:
        end = rank["trained"]["end"]
        loaded = (rank["trained"][how] for how in ("again", "from parts", "installed"))
        for other in (*loaded, saved):
            assert {*other.sites} >= {*end.sites}
            assert all(torch.equal(other.sites[name].A, s.A) for name, s in end.sites.items())
            assert all(torch.equal(other.sites[name].B, s.B) for name, s in end.sites.items())
            assert all(torch.equal(other.trained[name], t) for name, t in end.trained.items())
    file = li.read_adapter(folder / "whole")
    assert file.fingerprint is not None
    assert {*file.fingerprint.samples} >= {"layers.0.weight", "out.weight", "out.bias"}


def test_a_plan_of_stages_is_what_each_gets_of_the_plan_of_the_whole_model(ranks: Any) -> None:
    assert [rank["trained"]["planned"] for rank in ranks] == [
        [["layers.0"], []],
        [["layers.1", "out"], ["norm.weight", "norm.bias"]],
    ]
    whole_plan = li.plan(whole(), RULES)
    assert [site.name for site in whole_plan.sites] == ["layers.0", "layers.1", "out"]


def test_a_stage_without_sites_has_the_adapter_as_well(ranks: Any) -> None:
    first, second = (rank["idle"] for rank in ranks)
    wanted = {"names": ["default"], "ejected": True, "loaded": True}
    assert first == wanted | {"n": 2, "acts": True}
    assert second == wanted | {"n": 0, "acts": False}


def test_all_stages_refuse_or_none(ranks: Any) -> None:
    first, second = (rank["refused"] for rank in ranks)
    assert all({**first, **second}.values())
    for name in ("nothing", "expect", "config", "each has all", "nowhere", "no group", "plan"):
        assert first[name] == second[name], name
    assert first["nothing"].startswith("MatchError: rule 1 ('layer_0'): ")
    assert "found sites: 3" in first["expect"]
    assert "found sites: 3" in first["plan"]
    assert "matched" in first["plan alone"]
    assert first["plan alone"] != second["plan alone"]
    assert "no process of the group has 'out'" in first["install nowhere"]
    assert first["install alone"].startswith("FormatError: ")
    assert "processes 0, 1 of the group each have 'layers.0.weight'" in first["each has all"]
    assert "no process of the group has 'out'" in first["nowhere"]
    assert "process 1 of the group refused it" in first["taken"]
    assert second["taken"].startswith("StateError: ")
    assert "process 1 of the group refused it" in first["unreached"]
    assert "group is 'pp'" in first["no group"]

"""Two processes of which each has other layers of a model: one adapter, as on the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.ranks import in_a_group, near, same, values
from helpers.refusals import said
from torch import nn

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
    plan = li.plan(stage(rank), RULES, group=group)
    model = filled(li.inject(stage(rank), RULES, group=group))
    steps(model, lambda: forward_and_backward(model, rank))
    li.save_adapter(model, folder / "whole", group=group)
    apart = li.save_adapter(model, folder / f"stage {rank}")
    state = li.read_adapter(folder / "whole")
    others = [
        li.load_adapter(stage(rank), folder / "whole", group=group, trainable=True),
        li.load_adapter(stage(rank), apart),
        li.install(stage(rank), state, group=group),
    ]
    return {
        "planned": [[site.name for site in plan.sites], [each.name for each in plan.trained]],
        "end": values(model),
        "others": [values(other) for other in others],
    }


def idle(folder: Path, rank: int) -> dict[str, Any]:
    """The second process gets nothing."""
    group = dist.group.WORLD
    model = filled(li.inject(stage(rank), FIRST_ONLY, group=group))
    seen: dict[str, Any] = {"n": len(li.adapter_parameters(model)), "names": [*li.adapters(model)]}
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    with_it = model(X)
    with li.disabled(model):
        seen["acts"] = not torch.equal(model(X), with_it)
    li.save_adapter(model, folder / "idle", group=group)
    li.eject(model)
    seen["ejected"] = torch.equal(model(X), stage(rank)(X))
    li.load_adapter(model, folder / "idle", group=group)
    return seen | {"loaded": torch.equal(model(X), with_it)}


def refused(folder: Path, rank: int) -> dict[str, str]:
    group = dist.group.WORLD
    model, narrow, taken = stage(rank), stage(rank), stage(rank)
    before = {name: type(module) for name, module in model.named_modules()}
    out = li.inject(whole(), {"rank": 2, "targets": ["out"]})
    saved = li.save_adapter(out, folder / f"out {rank}")
    if rank:
        narrow.out = nn.Identity()
        li.inject(taken, FIRST_ONLY | {"targets": [r"layers\.\d"]})

    def inject(config: Any, on: nn.Module = model, **how: Any) -> str:
        saying = said(lambda: li.inject(on, config, group=group, **how))
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not li.adapters(model)
        return saying

    def probe() -> None:
        if rank == 0:
            model(X)

    four = RULES | {"expect": {"sites": 4}}
    state = li.read_adapter(saved)
    return {
        "nothing": inject(RULES | {"targets": ["layer_0"]}),
        "expect": inject(four),
        "config": inject(RULES | {"rank": 0}),
        "taken": inject(FIRST_ONLY, taken),
        "unreached": inject(RULES, probe=probe),
        "each has all": inject(RULES, whole()),
        "plan": said(lambda: li.plan(model, four, group=group)),
        "plan alone": said(lambda: li.plan(model, RULES)),
        "install nowhere": said(lambda: li.install(narrow, state, group=group)),
        "install alone": said(lambda: li.install(narrow, state)),
        "nowhere": said(lambda: li.load_adapter(narrow, saved, group=group)),
        "no group": said(lambda: li.inject(model, RULES, group="pp")),
    }


def work(folder: Path) -> dict[str, Any]:
    jobs = {"trained": trained, "idle": idle, "refused": refused}
    return in_a_group(lambda: {name: job(folder, dist.get_rank()) for name, job in jobs.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def ranks(folder: Path, forks: Forks) -> list[dict[str, Any]]:
    return [rank.result() for rank in forks.start_ranks(2, work, folder)]


def test_an_adapter_of_stages_trains_as_that_of_the_whole_model(ranks: Any) -> None:
    model = filled(li.inject(whole(), RULES))
    steps(model, lambda: model(X).square().sum().backward())
    first, rest = (rank["trained"]["end"] for rank in ranks)
    near(first | rest, values(model), 1e-12)
    assert {name.rpartition(".")[0] for name in first} == {"layers.0"}
    assert not first.keys() & rest.keys()


def test_what_stages_save_together_is_one_adapter(ranks: Any, folder: Path) -> None:
    saved = values(li.load_adapter(whole(), folder / "whole"))
    same(saved, ranks[0]["trained"]["end"] | ranks[1]["trained"]["end"])
    for seen in (rank["trained"] for rank in ranks):
        for other in seen["others"]:
            same(other, seen["end"])
    fingerprint = li.read_adapter(folder / "whole").fingerprint
    assert fingerprint is not None
    assert {*fingerprint.samples} >= {"layers.0.weight", "out.weight", "out.bias"}


def test_a_plan_of_stages_is_what_each_gets_of_the_plan_of_the_whole_model(ranks: Any) -> None:
    assert [rank["trained"]["planned"] for rank in ranks] == [
        [["layers.0"], []],
        [["layers.1", "out"], ["norm.weight", "norm.bias"]],
    ]


def test_a_stage_without_sites_has_the_adapter_as_well(ranks: Any) -> None:
    first, second = (rank["idle"] for rank in ranks)
    wanted = {"names": ["default"], "ejected": True, "loaded": True}
    assert first == wanted | {"n": 2, "acts": True}
    assert second == wanted | {"n": 0, "acts": False}


def test_all_stages_refuse_or_none(ranks: Any) -> None:
    first, second = (rank["refused"] for rank in ranks)
    assert all({**first, **second}.values())
    for name in ("nothing", "expect", "config", "each has all", "no group", "plan"):
        assert first[name] == second[name], name
    for name, words in {
        "nothing": "MatchError: rule 1 ('layer_0'): ",
        "expect": "found sites: 3",
        "plan": "found sites: 3",
        "plan alone": "matched",
        "install nowhere": "no process of the group has 'out'",
        "install alone": "FormatError: ",
        "each has all": "processes 0, 1 of the group each have 'layers.0.weight'",
        "nowhere": "no process of the group has 'out'",
        "taken": "process 1 of the group refused it",
        "unreached": "process 1 of the group refused it",
        "no group": "group is 'pp'",
    }.items():
        assert words in first[name], name
    assert second["taken"].startswith("StateError: ")

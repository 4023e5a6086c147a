"""Two processes of which each has other layers of a model: one adapter, as on the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.ranks import failures, from_first, near, same, values
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


def trains_like_the_whole_model(folder: Path) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    model = filled(li.inject(stage(rank), RULES, group=group))
    all_of_it = filled(li.inject(whole(), RULES))
    steps(model, lambda: forward_and_backward(model, rank))
    steps(all_of_it, lambda: all_of_it(X).square().sum().backward())
    wanted, end = values(all_of_it), values(model)
    here = [key for key in wanted if key.startswith("layers.0") == (rank == 0)]
    near(end, {key: wanted[key] for key in here}, 1e-12)
    li.save_adapter(model, folder / "whole", group=group)
    apart = li.save_adapter(model, folder / f"stage {rank}")
    state = li.read_adapter(folder / "whole")
    for other in (
        li.load_adapter(stage(rank), folder / "whole", group=group, trainable=True),
        li.load_adapter(stage(rank), apart),
        li.install(stage(rank), state, group=group),
    ):
        same(values(other), end)
    near(values(li.load_adapter(whole(), folder / "whole")), wanted, 1e-12)
    assert state.fingerprint is not None
    assert {*state.fingerprint} >= {"layers.0.weight", "out.weight", "out.bias"}
    plan = li.plan(stage(rank), RULES, group=group)
    assert [site.name for site in plan.sites] == [["layers.0"], ["layers.1", "out"]][rank]
    assert [each.name for each in plan.trained] == [[], ["norm.weight", "norm.bias"]][rank]


def a_stage_without_sites_has_the_adapter_as_well(folder: Path) -> None:
    """The second process gets nothing."""
    group, rank = dist.group.WORLD, dist.get_rank()
    model = filled(li.inject(stage(rank), FIRST_ONLY, group=group))
    assert [*li.adapters(model)] == ["default"]
    assert len(li.adapter_parameters(model)) == [2, 0][rank]
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    with_it = model(X)
    with li.disabled(model):
        assert torch.equal(model(X), with_it) == (rank == 1)
    li.save_adapter(model, folder / "idle", group=group)
    li.eject(model)
    assert torch.equal(model(X), stage(rank)(X))
    li.load_adapter(model, folder / "idle", group=group)
    assert torch.equal(model(X), with_it)


def all_stages_refuse_or_none(folder: Path) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    model, narrow, taken = stage(rank), stage(rank), stage(rank)
    before = {name: type(module) for name, module in model.named_modules()}
    out = li.inject(whole(), {"rank": 2, "targets": ["out"]})
    saved = li.save_adapter(out, folder / f"out {rank}")
    if rank:
        narrow.out = nn.Identity()
        li.inject(taken, FIRST_ONLY | {"targets": [r"layers\.\d"]})
    four = RULES | {"expect": {"sites": 4}}
    layer_0 = RULES | {"targets": ["layer_0"]}
    state = li.read_adapter(saved)
    probe = (lambda: model(X)) if rank == 0 else (lambda: None)
    by_both = [
        ("MatchError: rule 1 ('layer_0'): ", lambda: li.inject(model, layer_0, group=group)),
        ("found sites: 3", lambda: li.inject(model, four, group=group)),
        ("ConfigError", lambda: li.inject(model, RULES | {"rank": 0}, group=group)),
        ("processes 0, 1 of the group each have", lambda: li.inject(whole(), RULES, group=group)),
        ("group is 'pp'", lambda: li.inject(model, RULES, group="pp")),
    ]
    for words, verb in by_both:
        refused = said(verb)
        assert words in refused
        assert refused == from_first(refused)
    no_out = "no process of the group has 'out'"
    by_the_other = "process 1 of the group refused it"
    of_each = [
        (by_the_other, "StateError", lambda: li.inject(taken, FIRST_ONLY, group=group)),
        (by_the_other, "reached", lambda: li.inject(model, RULES, group=group, probe=probe)),
        (no_out, "out", lambda: li.install(narrow, state, group=group)),
        (no_out, no_out, lambda: li.load_adapter(narrow, saved, group=group)),
    ]
    for *words, verb in of_each:
        assert words[rank] in said(verb)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not li.adapters(model)


JOBS = {
    job.__name__: job
    for job in (
        trains_like_the_whole_model,
        a_stage_without_sites_has_the_adapter_as_well,
        all_stages_refuse_or_none,
    )
}


def work(folder: Path) -> dict[str, str]:
    return failures(JOBS, folder)


@pytest.fixture(scope="module")
def ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    started = forks.start_ranks(2, work, tmp_path_factory.mktemp("stages"))
    return [rank.result() for rank in started]


@pytest.mark.parametrize("job", JOBS)
def test_two_stages_come_to_what_the_whole_model_does(job: str, ranks: Any) -> None:
    failed = "\n".join(rank[job] for rank in ranks)
    assert not failed.strip(), failed

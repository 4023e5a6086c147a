"""Two processes of which each has other layers of a model: one adapter, as on the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.forks import Forks
from helpers.ranks import failures, from_first, near, same, steps, values
from helpers.refusals import said
from torch import Tensor, nn

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


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Noise by the name of each tensor, the same in any part of the model."""
    for key, parameter in li.adapter_parameters(model).items():
        generator = torch.Generator().manual_seed(sum(map(ord, key)))
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def loss_of_a_stage(model: Net, rank: int) -> Tensor:
    """Whose backward is that of a pipeline's step, by hand."""
    if rank:
        dist.recv(x := torch.empty_like(X), 0)
        x.requires_grad_().register_hook(lambda gradient: dist.send(gradient, 0))
        return model(x).square().sum()
    y = model(X)
    dist.send(y.detach(), 1)
    dist.recv(gradient := torch.empty_like(y), 1)
    return (y * gradient).sum()


def trains_like_the_whole_model(folder: Path) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    model = filled(li.inject_stages(stage(rank), RULES, group=group))
    all_of_it = filled(li.inject(whole(), RULES))
    steps(model, lambda: loss_of_a_stage(model, rank), torch.optim.AdamW)
    steps(all_of_it, lambda: all_of_it(X).square().sum(), torch.optim.AdamW)
    wanted, end = values(all_of_it), values(model)
    here = [key for key in wanted if key.startswith("layers.0") == (rank == 0)]
    near(end, {key: wanted[key] for key in here}, 1e-12)
    li.save_stages(model, folder / "whole", group=group)
    apart = li.save_adapter(model, folder / f"stage {rank}")
    state = li.read_adapter(folder / "whole")
    for other in (
        li.load_stages(stage(rank), folder / "whole", group=group, trainable=True),
        li.load_adapter(stage(rank), apart),
    ):
        same(values(other), end)
    near(values(li.load_adapter(whole(), folder / "whole")), wanted, 1e-12)
    assert state.fingerprint is not None
    assert {*state.fingerprint} >= {"layers.0.weight", "out.weight", "out.bias"}
    info = li.adapters(model)["default"]
    assert list(info.sites) == [["layers.0"], ["layers.1", "out"]][rank]
    assert info.trained == [(), ("norm.weight", "norm.bias")][rank]


def a_stage_without_sites_has_the_adapter_as_well(folder: Path) -> None:
    """The second process gets nothing."""
    group, rank = dist.group.WORLD, dist.get_rank()
    model = filled(li.inject_stages(stage(rank), FIRST_ONLY, group=group))
    assert [*li.adapters(model)] == ["default"]
    assert len(li.adapter_parameters(model)) == [2, 0][rank]
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    with_it = model(X)
    with li.disabled(model):
        assert torch.equal(model(X), with_it) == (rank == 1)
    li.save_stages(model, folder / "idle", group=group)
    li.eject(model)
    assert torch.equal(model(X), stage(rank)(X))
    li.load_stages(model, folder / "idle", group=group)
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
    by_both = [
        ("'layer_0'", model, RULES | {"targets": ["layer_0"]}, group),
        ("3", model, RULES | {"expect": {"sites": 4}}, group),
        ("ConfigError", model, RULES | {"rank": 0}, group),
        ("0, 1", whole(), RULES, group),
        ("'pp'", model, RULES, "pp"),
    ]
    for words, on, rules, of in by_both:
        refused = said(lambda on=on, rules=rules, of=of: li.inject_stages(on, rules, group=of))
        assert words in refused
        assert refused == from_first(refused)
    no_out = "'out'"
    by_the_other = "process 1"
    of_each = [
        (by_the_other, "StateError", lambda: li.inject_stages(taken, FIRST_ONLY, group=group)),
        (no_out, no_out, lambda: li.load_stages(narrow, saved, group=group)),
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


def jobs() -> dict[str, Any]:
    return JOBS


@pytest.fixture(scope="module")
def failed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures(forks, 2, jobs, tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("job", JOBS)
def test_two_stages_come_to_what_the_whole_model_does(job: str, failed: dict[str, str]) -> None:
    assert not failed[job], failed[job]

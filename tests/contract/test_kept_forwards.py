"""Forwards that somebody keeps, wraps or replicates: hooks of accelerate, patches, DataParallel."""

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import error, fill, same_bits
from helpers.reference import with_deltas
from torch import Tensor, nn

import lora_inject as li

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

N = 6
X = torch.linspace(-1, 1, 4 * N, dtype=torch.float64).view(4, N)
TARGETS = {"forward update": "^0$", "weight update": r"^0\.weight"}
every_way = pytest.mark.parametrize("way", TARGETS)


def made(way: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(N, N)).double()
    config = {"rank": 2, "alpha": 3.0, "targets": [TARGETS[way]]}
    return plain, fill(li.inject(copy.deepcopy(plain), config))


@every_way
def test_eject_after_accelerate_has_hooked_the_layer(way: str) -> None:
    plain, model = made(way)
    add_hook_to_module(model[0], ModelHook())
    add_hook_to_module(plain[0], ModelHook())
    assert error(model(X), plain(X)) > 0.01
    li.eject(model)
    assert same_bits(model(X), plain(X))
    assert model[0]._old_forward.__func__ is nn.Linear.forward
    remove_hook_from_module(model[0])
    assert same_bits(model(X), plain(X))


@every_way
def test_eject_after_somebody_has_kept_the_bound_forward(way: str) -> None:
    plain, model = made(way)
    kept = model[0].forward
    model[0].forward = lambda x: 2 * kept(x)
    assert error(model(X), 2 * plain(X)) > 0.01
    li.inject(model, {"rank": 2, "targets": [r"^0\.weight"]}, "other")
    li.eject(model, "default")
    assert same_bits(kept(X), plain(X))
    fill(model, "other")
    assert error(kept(X), plain(X)) > 0.01
    li.eject(model)
    assert same_bits(model(X), 2 * plain(X))


@pytest.mark.parametrize("when", ["before inject", "under a hook", "after it"])
def test_a_forward_on_the_instance_computes_with_the_dense_weight(when: str) -> None:
    """Not known, so its weight reads as W + delta; eject leaves it where it is."""
    layer, config = nn.Linear(N, N).double(), {"rank": 2, "alpha": 3.0, "targets": ["0"]}
    model, plain = nn.Sequential(layer), copy.deepcopy(layer)
    if when == "after it":
        li.inject(model, config)
    layer.forward = lambda x: 3 * torch.relu(x @ layer.weight.t())
    if when == "under a hook":
        add_hook_to_module(layer, ModelHook())
    own = layer.forward
    if when != "after it":
        li.inject(model, config)
    W = with_deltas(nn.Sequential(plain), fill(model))[0].weight
    assert error(model(X), 3 * torch.relu(X @ W.t())) < 1e-12
    li.eject(model)
    assert layer.forward is own
    assert same_bits(model(X), 3 * torch.relu(X @ plain.weight.t()))


def test_a_forward_that_is_an_object_which_calls_another_is_right() -> None:
    """What accelerate makes of the forward of a model in mixed precision."""
    from accelerate.utils.operations import ConvertOutputsToFp32

    plain = nn.Sequential(nn.Linear(N, N))
    model = copy.deepcopy(plain)
    model[0].forward = MethodType(ConvertOutputsToFp32(nn.Linear.forward), model[0])
    fill(li.inject(model, {"rank": 2, "alpha": 3.0, "targets": ["0"]}))
    assert error(model(X.float()), with_deltas(plain, model)(X)) < 1e-6


def replicated(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes of one module on each device."""
    replica = module._replicate_for_data_parallel()  # type: ignore[operator]
    replica._former_parameters = OrderedDict()
    for key, parameter in module._parameters.items():
        copied = parameter * 1  # type: ignore[operator]
        setattr(replica, key, copied)
        replica._former_parameters[key] = copied
    return replica


@every_way
def test_a_replica_of_data_parallel_computes_the_same_and_passes_gradients(way: str) -> None:
    _, model = made(way)
    parameters = list(li.adapter_parameters(model).values())
    ys = [model(X), replicated(model[0])(X)]
    assert error(*ys) < 1e-12
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in ys]
    assert all(error(one, other) < 1e-12 for one, other in zip(*grads, strict=True))


class Traced(nn.Module):
    """Looks up, multiplies, and multiplies with a table that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.table = nn.Embedding(N, N), nn.Linear(N, N), nn.Embedding(N, N)

    def forward(self, ids: Tensor) -> Tensor:
        return self.a(self.emb(ids)) @ self.table.weight.t()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_a_trace_holds_for_any_number_of_rows_and_ids(shape: tuple[int, int]) -> None:
    """The shape of its example was a constant of the graph."""
    torch.manual_seed(0)
    model = fill(li.inject(Traced(), {"rank": 2, "targets": ["emb", "a", "table"]})).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.randint(N, shape),))
        for other in ((1, 1), (2, 1), (4, 1), (3, 5)):
            ids = torch.randint(N, other)
            assert error(traced(ids), model(ids).double()) < 1e-6


@pytest.mark.parametrize("verb", ["inject", "load"])
def test_an_adapter_made_in_inference_mode_trains_outside_of_it(verb, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = {"rank": 2, "targets": ["0"], "train": ["1"], "init": "pissa"}
    path = li.save_adapter(fill(li.inject(model, config)), tmp_path / "a")
    li.eject(model)
    with torch.inference_mode():
        if verb == "load":
            li.load_adapter(model, path)
        else:
            li.inject(model, config)
    li.train_only(model, "default")
    model(torch.ones(2, 4)).square().sum().backward()
    parameters = li.adapter_parameters(model).values()
    torch.optim.AdamW(parameters, fused=True).step()
    assert all(p.grad is not None for p in parameters)

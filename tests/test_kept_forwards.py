"""Forwards that somebody keeps, wraps or replicates: hooks of accelerate, patches, DataParallel."""

import copy
import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    plain, model = made(way)
    add_hook_to_module(model[0], ModelHook())
    add_hook_to_module(plain[0], ModelHook())
    assert error(model(X), plain(X)) > 0.01
    li.eject(model)
    assert same_bits(model(X), plain(X))
    assert model[0]._old_forward.__func__ is nn.Linear.forward
    remove_hook_from_module(model[0])
    assert same_bits(model(X), plain(X))
    fill(li.inject(model, {"rank": 2, "targets": ["0"]}))
    assert error(model(X), plain(X)) > 0.01


@every_way
def test_eject_after_somebody_has_kept_the_bound_forward(way: str) -> None:
    plain, model = made(way)
    kept = model[0].forward
    model[0].forward = lambda x: 2 * kept(x)
    with_adapter = model(X)
    li.eject(model)
    assert same_bits(model(X), 2 * plain(X))
    assert error(with_adapter, 2 * plain(X)) > 0.01


PRODUCTS: dict[str, tuple[Any, Any]] = {
    "linear": (nn.Linear, lambda W, x: x @ W.t()),
    "conv1d": (Conv1D, lambda W, x: x @ W),
    "embedding": (nn.Embedding, lambda W, ids: W[ids]),
}


@pytest.mark.parametrize("when", ["before inject", "after it"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_forward_on_the_instance_computes_with_the_dense_weight(kind: str, when: str) -> None:
    """Not known, so its weight reads as W + delta; eject leaves it where it is."""
    torch.manual_seed(0)
    make, product = PRODUCTS[kind]
    layer, x = make(N, N).double(), torch.arange(N) if kind == "embedding" else X
    model, config = nn.Sequential(layer), {"rank": 2, "alpha": 3.0, "targets": ["0"]}
    if when == "after it":
        li.inject(model, config)
    layer.forward = own = lambda x: 3 * torch.relu(product(layer.weight, x))
    if when == "before inject":
        li.inject(model, config)
    site = li.adapter_state(fill(model)).sites["0"]
    delta = site.scale * site.B @ site.A
    W = layer._parameters["weight"] + (delta if kind == "linear" else delta.t())
    assert error(model(x), 3 * torch.relu(product(W, x))) < 1e-12
    li.eject(model)
    assert layer.forward is own
    assert same_bits(model(x), 3 * torch.relu(product(layer.weight, x)))


def test_a_kept_forward_of_a_layer_that_keeps_a_weight_update() -> None:
    plain, model = made("forward update")
    kept = model[0].forward
    li.inject(model, {"rank": 2, "targets": [r"^0\.weight"]}, "other")
    li.eject(model, "default")
    assert same_bits(kept(X), plain(X))
    fill(model, "other")
    assert same_bits(kept(X), model(X))


def replicated(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes of one module on each device."""
    replica = module._replicate_for_data_parallel()  # type: ignore[operator]
    replica._former_parameters = OrderedDict()
    for key, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[key] = None
        else:
            copied = parameter * 1
            setattr(replica, key, copied)
            replica._former_parameters[key] = copied
    return replica


@every_way
@pytest.mark.parametrize("bias", [True, False])
def test_a_replica_of_data_parallel_computes_the_same_and_passes_gradients(way, bias) -> None:
    _, model = made(way)
    if not bias:
        model[0].bias = None
    before = snapshot(model)
    wanted = model(X)
    replica = replicated(model[0])
    assert type(replica) is type(model[0])
    assert error(replica(X), wanted) < 1e-12
    assert snapshot(model) == before
    wanted.square().sum().backward()
    parameters = li.adapter_parameters(model).values()
    grads = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for p in parameters:
        p.grad = None
    replica(X).square().sum().backward()
    assert all(error(p.grad, g) < 1e-12 for p, g in zip(parameters, grads, strict=True))  # type: ignore[arg-type]


def test_scripting_says_what_to_do_before_anything_changed() -> None:
    plain, model = made("forward update")
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"torch\.jit\.script of a Linear.*merge\(model"):
        torch.jit.script(model)
    assert snapshot(model) == before
    li.eject(model)
    assert same_bits(torch.jit.script(model)(X), plain(X))


@pytest.mark.parametrize("n_rows", [1, 4])
def test_a_trace_holds_for_any_number_of_rows(n_rows: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(N, N)
            self.emb = nn.Embedding(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.emb.weight.t()

    torch.manual_seed(0)
    model = fill(li.inject(Net(), {"rank": 2, "targets": ["a", "emb"]})).eval()
    x = X.float()
    with torch.no_grad():
        traced = torch.jit.trace(model, (x[:n_rows],))
        for n in (1, 2, 4):
            assert error(traced(x[:n]), model(x[:n]).double()) < 1e-6


def test_a_trace_of_an_embedding_holds_for_any_number_of_ids() -> None:
    """The shape of its example was a constant of the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(N, N), nn.Linear(N, 2))
    fill(li.inject(model, {"rank": 2, "targets": ["0", "1"]}))
    traced = torch.jit.trace(model, (torch.tensor([[0, 1, 2], [2, 1, 0]]),))
    for shape in ((1, 1), (4, 1), (3, 5)):
        ids = torch.randint(N, shape)
        assert error(traced(ids), model(ids).double()) < 1e-6


def test_an_adapter_injected_in_inference_mode_trains_outside_of_it() -> None:
    plain, _ = made("forward update")
    with torch.inference_mode():
        li.inject(plain, {"rank": 2, "targets": ["0"], "train": [r"0\.bias"], "init": "pissa"})
        plain(X)
    assert same_bits(plain(X), plain[0].eval()(X))
    plain(X).square().sum().backward()
    torch.optim.AdamW(li.adapter_parameters(plain).values(), fused=True).step()
    assert all(p.grad is not None for p in li.adapter_parameters(plain).values())


def test_classes_of_layers_that_are_gone_are_freed() -> None:
    def once() -> weakref.ref[type]:
        class Own(nn.Linear):
            pass

        model = nn.Sequential(Own(N, N), Own(N, N))
        li.inject(model, {"rank": 1, "targets": ["0", r"1\.weight"]})
        return weakref.ref(Own)

    found = once()
    for _ in range(3):  # a class is freed by one collection, its plain class by the next
        gc.collect()
    assert found() is None


@pytest.mark.parametrize("more", [{}, {"train": ["1"]}, {"init": "pissa"}], ids=str)
def test_an_adapter_loaded_in_inference_mode_trains_outside_of_it(more, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    li.inject(model, {"rank": 2, "targets": ["0"], **more})
    li.save_adapter(fill(model), tmp_path / "a")
    li.eject(model)
    with torch.inference_mode():
        li.load_adapter(model, tmp_path / "a")
    li.train_only(model, "default")
    model(torch.ones(2, 4)).square().sum().backward()
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())

"""accelerate's hooks: they hide no adapter, and what they offload is not trained in vain."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from conftest import error, fill, refusal, same_bits, snapshot
from helpers.packages import loaded
from helpers.reference import Block, adapted, config, dense, hold, random
from helpers.refusals import refused
from torch import nn

import lora_inject as li

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms
TARGETS = ("up", r"down\.weight")
CPU = torch.device("cpu")


def blocks() -> nn.Sequential:
    return nn.Sequential(Block(), Block())


def hooked(model: nn.Module) -> nn.Module:
    """What device_map does to a model that fits: a hook on every module, nothing offloaded."""
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


@pytest.mark.parametrize("first", ["hooks", "inject"])
def test_hooks_that_move_inputs_hide_no_adapter(first: str) -> None:
    plain = blocks().double()
    x, model, targets = random(3, 4), copy.deepcopy(plain), config(*TARGETS)
    if first == "hooks":
        before = snapshot(hooked(model))
        li.inject(model, targets)
    else:
        hooked(li.inject(model, targets))
    fill(model)
    assert li.unreached(model, lambda: model(x)) == []
    hold(plain, model, lambda m: m(x))
    if first == "hooks":
        li.eject(model)
        assert snapshot(model) == before
        fill(li.inject(model, targets))
    wanted = model(x)
    remove_hook_from_submodules(model)
    assert same_bits(model(x), wanted)
    li.eject(model)
    assert same_bits(model(x), plain(x))


OFFLOADS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


def test_offloaded_weights_are_refused() -> None:
    model = blocks()
    OFFLOADS["cpu"](model, "")

    def look() -> list[Any]:
        modules = [(id(m), type(m), [*m.__dict__]) for m in model.modules()]
        return [*modules, *((n, id(p), p.requires_grad) for n, p in model.named_parameters())]

    before = look()
    with refused(li.LayerError, "'0.up'", "before dispatch"):
        li.inject(model, config("up"))
    assert look() == before


@pytest.mark.parametrize("how", OFFLOADS)
def test_a_model_offloaded_after_inject_serves_its_adapter(how: str, tmp_path: Path) -> None:
    """Weights lie on meta between the forwards of their layers."""
    plain, x = blocks(), torch.randn(3, 4)
    model = adapted(plain, *TARGETS)
    wanted = dense(plain, model)(x.double())
    assert error(plain(x), wanted) > 0.01
    OFFLOADS[how](model, str(tmp_path))
    for _ in range(2):
        with torch.no_grad():
            assert error(model(x), wanted) < FLOAT32
        for run in (lambda: li.merge(model), lambda: li.save_adapter(model, "never")):
            with refused(li.LoraInjectError, "meta"):
                run()


def test_training_under_offload_is_never_in_vain() -> None:
    model = adapted(blocks(), "up")
    OFFLOADS["cpu"](model, "")
    x = torch.randn(3, 4)
    said = refusal(lambda: model.train()(x).sum().backward(), li.LayerError)
    assert said is None or "offload" in str(said)
    if said is None:
        assert all(p.grad is not None for p in li.adapter_parameters(model).values())


def test_training_under_the_offload_of_compressed_tensors_is_refused(monkeypatch) -> None:
    """Its cache, in the place of a module's dict of parameters, gives a forward copies."""
    loaded(monkeypatch, "compressed_tensors.quantization")
    cache = type("OffloadCache", (dict,), {"onload_device": "cuda:0", "offload_device": "cpu"})
    net = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]})
    net[0]._parameters = cache(net[0]._parameters)
    with refused(li.LayerError, "offloaded"):
        net(torch.ones(2, 4))
    with torch.no_grad():
        net.eval()(torch.ones(2, 4))
    cache.offload_device = "cuda"
    net.train()(torch.ones(2, 4))

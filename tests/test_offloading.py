"""accelerate's hooks: they hide no adapter, and what they offload is not trained in vain."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.packages import loaded
from helpers.reference import Block, adapted, config, dense, hold, random
from torch import nn

import lora_inject as li

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms


def hooked(model: nn.Module) -> nn.Module:
    """What device_map does to a model that fits: a hook on every module, nothing offloaded."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


@pytest.mark.parametrize("first", ["hooks", "inject"])
def test_hooks_that_move_inputs_hide_no_adapter(first: str) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    plain = nn.Sequential(Block(), Block()).double()
    x, model = random(3, 4), copy.deepcopy(plain)
    targets = config("up", r"down\.weight")
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


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_refused(where: str, tmp_path: Path) -> None:
    import accelerate

    model = nn.Sequential(Block(), Block())
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    classes = [(id(m), type(m), [*m.__dict__]) for m in model.modules()]
    keys = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(li.LayerError, match=r"'0\.up'.*offloaded its weights.*before dispatch"):
        li.inject(model, config("up"))
    assert [(id(m), type(m), [*m.__dict__]) for m in model.modules()] == classes
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == keys


def test_a_model_offloaded_after_inject_serves_its_adapter() -> None:
    import accelerate

    plain, x = nn.Sequential(Block(), Block()), torch.randn(3, 4)
    model = adapted(plain, "up", r"down\.weight")
    wanted = dense(plain, model)(x.double())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert error(model(x), wanted) < FLOAT32
    shapes = [(type(m), [*m._parameters]) for m in model.modules()]
    for run in (lambda: li.merge(model), lambda: li.save_adapter(model, "never")):
        with pytest.raises((li.LayerError, li.FormatError), match="meta device"):
            run()
    assert [(type(m), [*m._parameters]) for m in model.modules()] == shapes
    with torch.no_grad():
        assert error(model(x), wanted) < FLOAT32


OFFLOADS = {
    "cpu": lambda model, _: accelerate().cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate().disk_offload(model, folder, execution_device=CPU),
    "dispatched": lambda model, folder: accelerate().dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}
CPU = torch.device("cpu")


def accelerate() -> Any:
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("how", OFFLOADS)
def test_what_is_read_of_weights_that_move_is_the_dense_weight(how: str, tmp_path: Path) -> None:
    """Weights lie on meta between the forwards of their layers."""
    plain, x = nn.Sequential(Block(), Block()), torch.randn(3, 4)
    model = adapted(plain, "up", r"down\.weight")
    wanted = dense(plain, model)(x.double())
    assert error(plain(x), wanted) > 0.01
    OFFLOADS[how](model, str(tmp_path))
    for _ in range(2):
        with torch.no_grad():
            assert error(model(x), wanted) < FLOAT32


def test_training_under_offload_is_never_in_vain() -> None:
    import accelerate

    model = adapted(nn.Sequential(Block(), Block()), "up")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        model.train()(torch.randn(3, 4)).sum().backward()
    except li.LayerError as raised:
        assert "offload" in str(raised)  # noqa: PT017 - refused, or right
        return
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())


def test_training_under_the_offload_of_compressed_tensors_is_refused(monkeypatch) -> None:
    """Its cache, in the place of a module's dict of parameters, gives a forward copies."""
    loaded(monkeypatch, "compressed_tensors.quantization")
    cache = type("OffloadCache", (dict,), {"onload_device": "cuda:0", "offload_device": "cpu"})
    net = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]})
    net[0]._parameters = cache(net[0]._parameters)
    with pytest.raises(li.LayerError, match="that is offloaded"):
        net(torch.ones(2, 4))
    with torch.no_grad():
        net.eval()(torch.ones(2, 4))
    cache.offload_device = "cuda"
    net.train()(torch.ones(2, 4))

"""Modules without a class to swap or without values, and modules that hold their parent."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ALPHA, RANK, fill
from helpers.reference import Block, config, saved
from torch import nn

import lora_inject as li


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("target", [r"0\.weight", "0", ".+"])
def test_a_scripted_module_is_refused(target: str) -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(5, 4)), nn.Linear(4, 3))
    classes = [type(m) for m in model.modules()]
    with pytest.raises((li.LayerError, li.MatchError), match="ScriptModule") as raised:
        li.inject(model, config(target))
    assert "'0" in str(raised.value)
    assert [type(m) for m in model.modules()] == classes
    assert all("lora_" not in key for key in model.state_dict())


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv1d(3, 1)])
def test_a_lazy_module_is_refused_until_it_has_run(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), make())
    with pytest.raises(li.LayerError, match=r"'1'.*lazy and not initialized.*Run the model once"):
        li.inject(model, config(r"\d"))
    assert not any("lora_" in key for key in model._modules["0"]._parameters)
    x = torch.randn(2, 4, 1) if isinstance(model[1], nn.LazyConv1d) else torch.randn(2, 4)
    model[1](x)
    assert len(li.adapters(li.inject(model, config(r"\d")))["default"].sites) == 2


def test_a_model_without_values_is_planned_and_injected_but_not_merged(tmp_path: Path) -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(Block(), nn.Embedding(7, 4))
    targets = config("up", r"down\.weight", "1")
    planned = {s.name for s in li.plan(model, targets).sites}
    assert planned == {"0.up", "0.down.weight", "1"}
    li.inject(model, targets)
    assert {p.device.type for p in li.adapter_parameters(model).values()} == {"meta"}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(li.LayerError, match=r"meta device.*Load the base"):
        li.merge(model)
    for layout in ("native", "peft"):
        with pytest.raises(li.FormatError, match=r"meta device|native"):
            saved(model, tmp_path, layout)
    assert [*tmp_path.iterdir()] == []
    assert [type(m) for m in model.modules()] == classes
    li.eject(model)
    assert [type(m) for m in model[0].modules()] == [Block, nn.Linear, nn.Linear]


CONFIG = {"rank": RANK, "alpha": ALPHA}


def test_a_module_that_holds_its_parent() -> None:
    """Its names have no end: an error, and not all memory."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].parent = net
    with pytest.raises(li.LayerError, match=r"0\.parent\.0.*a module holds one that holds it"):
        li.inject(net, {"rank": 1, "targets": ["1"]})
    assert type(net[1]) is nn.Linear


def test_half_done() -> None:
    """The third of three sites cannot carry an adapter, which only its class can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(5, 5), torch.randn(1, 5))
    for third in (scripted, nn.LazyLinear(5)):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), third)
        before = [(n, id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
        keys = list(model.state_dict())
        with pytest.raises((li.LayerError, li.MatchError), match="2"):
            li.inject(model, {**CONFIG, "targets": ["0", "1", r"2(\.\w+)?"]})
        assert [(n, id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()] == before
        assert list(model.state_dict()) == keys
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_elements_is_left_out() -> None:
    """torch's adaptive softmax makes clusters of width 0 where there are many."""
    model = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])
    assert model.tail[1][0].weight.shape == (0, 8)
    li.inject(model, {"rank": 2, "targets": ["all-linear"]})
    assert "tail.1.0" not in li.adapters(model)["default"].sites
    for name in (r"tail\.1\.0", r"tail\.1\.1\.weight"):
        with pytest.raises(li.MatchError, match=r"empty Linear|2-d parameter"):
            li.plan(model, {"rank": 2, "targets": [name]})


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d])
@pytest.mark.parametrize("more", [{}, {"bias": "all"}, {"train": ["1"]}], ids=str)
def test_a_lazy_module_beside_the_sites_is_refused_until_it_has_run(lazy, more) -> None:
    model = nn.Sequential(nn.Linear(4, 4), lazy(), nn.Identity())
    with pytest.raises(li.LayerError, match=r"'1\.weight': it is lazy.*Run the model once first"):
        li.inject(model, {"rank": 1, "targets": ["0"], **more})
    assert type(model[0]) is nn.Linear
    model(torch.ones(2, 4))
    li.inject(model, {"rank": 1, "targets": ["0"]})


def test_what_is_pefts_own_in_a_model_that_it_has_wrapped_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    lora = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(net, lora)
    x = torch.randn(3, 6, dtype=torch.float64)
    classes, due = [type(m) for m in model.modules()], model(x)
    problem = r"'base_model\.model\.0\.lora_A\.default' is a part of an adapter of PEFT \(2 such"
    with pytest.raises(li.LayerError, match=problem):
        li.inject(model, config("all-linear"))
    assert "inject would refuse this" in str(li.plan(model, config("all-linear")))
    assert ([type(m) for m in model.modules()], model(x).equal(due)) == (classes, True)

    li.inject(model, {**config("all-linear"), "exclude": [r"lora_[AB]\.default"]})
    names = ["base_model.model.0.base_layer", "base_model.model.2"]
    assert list(li.adapters(model)["default"].sites) == names
    state = li.adapter_state(fill(model))
    theirs = model.base_model.model[0]
    first = theirs.base_layer.get_parameter("weight") + theirs.get_delta_weight("default")
    weights = [first, model.base_model.model[2].get_parameter("weight")]
    for i, name in enumerate(names):
        site = state.sites[name]
        weights[i] = weights[i] + site.scale * site.B @ site.A
    hidden = nn.functional.linear(x, weights[0], net[0].bias).relu()
    torch.testing.assert_close(model(x), nn.functional.linear(hidden, weights[1], net[2].bias))

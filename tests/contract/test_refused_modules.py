"""Modules without a class to swap or without values, and modules that hold their parent."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from conftest import fill, snapshot
from helpers.reference import config
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d])
@pytest.mark.parametrize("more", [{}, {"bias": "all"}, {"train": ["1"]}], ids=str)
def test_a_lazy_module_is_refused_until_it_has_run(make: Any, more: dict[str, Any]) -> None:
    """Also beside the sites: it makes its parameters anew when it runs."""
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Identity())
    with refused(li.LayerError, "'1"):
        li.inject(model, config("0", **more))
    assert type(model[0]) is nn.Linear
    model(torch.ones(2, 4))
    li.inject(model, config("0"))


def test_what_is_pefts_own_in_a_model_that_it_has_wrapped_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    lora = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(net, lora)
    with refused(li.LayerError, "'base_model.model.0.lora_A.default'", "(2 such", model=model):
        li.inject(model, config("all-linear"))
    assert "inject would refuse this" in str(li.plan(model, config("all-linear")))

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
    x = torch.randn(3, 6, dtype=torch.float64)
    hidden = nn.functional.linear(x, weights[0], net[0].bias).relu()
    torch.testing.assert_close(model(x), nn.functional.linear(hidden, weights[1], net[2].bias))


def test_a_scripted_part_of_a_model_stays_as_it_is_beside_adapters() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 4)).double().eval()
    for part in ("1.0", "1.0.weight"):
        with refused(li.LoraInjectError, "ScriptModule" if "weight" in part else part):
            li.inject(model, config(part))
    x = torch.randn(3, 4, dtype=torch.float64)
    li.inject(model, config("all-linear"))
    assert list(li.adapters(model)["default"].sites) == ["0", "2"]
    fill(model)
    sites = li.adapter_state(model).sites
    W, V = (
        m.get_parameter("weight") + s.scale * s.B @ s.A
        for m, s in zip(model[::2], sites.values(), strict=True)
    )
    hidden = scripted(nn.functional.linear(x, W, model[0].bias))
    torch.testing.assert_close(model(x), nn.functional.linear(hidden, V, model[2].bias))
    before = {name: buffer.clone() for name, buffer in scripted.named_buffers()}
    model.train()(x)
    with refused(li.StateError, "'1.1.running_mean'"):
        li.merged_weights(model)
    li.eject(model)
    assert all(torch.equal(b, before[name]) for name, b in scripted.named_buffers())


class Bilinear(nn.Module):
    """A layer of torch that no kind stands for, behind one that it could be taken with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Bilinear(3, 4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x), y)
        return out


@pytest.mark.parametrize("more", [{}, {"kind": "bilinear"}], ids=str)
def test_a_layer_of_no_kind_is_refused_by_name_and_its_weight_is_adapted(more: Any) -> None:
    model = Bilinear().double()
    with refused(li.MatchError, "'second' (Bilinear)", "'second.weight'", model=model):
        li.inject(model, {"targets": [{"match": "second", **more}]})
    with refused(li.MatchError, "layout", "{in: [0], out: [1, 2]}", model=model):
        li.inject(model, config(r"second\.weight"))
    layout = {"out": [0], "in": [1, 2]}
    fill(li.inject(model, {"rank": 2, "targets": [{"match": r"second\.weight", "layout": layout}]}))
    site = li.adapter_state(model).sites["second.weight"]
    delta = site.scale * site.B @ site.A
    x, y = torch.randn(2, 3).double(), torch.randn(2, 4).double()
    wanted = nn.functional.bilinear(
        model.first(x), y, dict(model.named_parameters())["second.weight"] + delta.view(5, 3, 4)
    )
    torch.testing.assert_close(model(x, y), wanted + model.second.bias)


class Computed(nn.Module):
    """Its class has an attribute of the name of its parameter."""

    weight = property(lambda self: self._parameters["weight"])

    def __init__(self) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.ones(4, 4))


def with_an_adapter() -> nn.Module:
    return fill(li.inject(nn.Sequential(nn.Linear(4, 4)), config("0")))


def around_an_injected_part() -> nn.Module:
    return nn.Sequential(li.inject(nn.Sequential(nn.Linear(4, 4)), config("0")), nn.Linear(4, 4))


def with_a_layer_without_autograd() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(net, {"1"})


def merged() -> nn.Module:
    model = with_an_adapter()
    li.merge(model)
    return model


REFUSED_FOR_THE_MODEL: dict[str, Callable[[], Any]] = {
    "a name in use": with_an_adapter,
    "merged": merged,
    "around a root": around_an_injected_part,
    "without autograd": with_a_layer_without_autograd,
    "computed by its class": Computed,
}


@pytest.mark.filterwarnings("ignore")  # torch's, of its own quantization
@pytest.mark.parametrize("why", REFUSED_FOR_THE_MODEL)
def test_a_plan_says_what_inject_would_refuse(why: str) -> None:
    model = REFUSED_FOR_THE_MODEL[why]()
    rule = config("0" if why != "computed by its class" else "weight")
    with refused(li.LoraInjectError, model=model) as raised:
        li.inject(model, rule)
    before = snapshot(model)
    assert f"inject would refuse this: {raised.value}" in li.plan(model, rule).notes
    assert snapshot(model) == before
